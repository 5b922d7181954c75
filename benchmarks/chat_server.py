"""A server that answers like an OpenAI endpoint, and fails on demand: canned but varied answers, the same for the same
question. `python chat_server.py PORT SHARE LATENCY [WORDS]` prints a line when it listens; what it was asked is at
/asked.
"""

import asyncio
import hashlib
import json
import random
import re
import sys
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

NOUNS = [
    "river",
    "lamp",
    "garden",
    "engine",
    "letter",
    "market",
    "bridge",
    "forest",
    "kitchen",
    "clock",
    "island",
    "harbour",
]
VERBS = [
    "describe",
    "compare",
    "explain",
    "repair",
    "measure",
    "paint",
    "count",
    "plan",
    "translate",
    "improve",
    "draw",
    "sort",
]
WHYS = [
    "for a school",
    "before winter",
    "without money",
    "in one week",
    "for my mother",
    "by hand",
    "at night",
    "with friends",
]


def numbers(text: str) -> random.Random:
    """Random numbers that follow from a text."""
    return random.Random(hashlib.sha256(text.encode()).digest())


def sentence(choice: random.Random) -> str:
    """A sentence of words that hardly ever comes twice."""
    words = [choice.choice(VERBS), "the", *(choice.choice(NOUNS) for _ in range(3)), "and"]
    words += [choice.choice(VERBS), "its", *(choice.choice(NOUNS) for _ in range(3)), *choice.sample(WHYS, 2)]
    return " ".join(words).capitalize() + f" number {choice.randrange(10**6)}"


def answer(prompt: str) -> str:
    """What a model might say to a prompt of ours."""
    choice = numbers(prompt)
    wanted = re.search(r"(?:Name|For|Write) (\d+) (?:of them|messages|new messages)", prompt)
    count = int(wanted[1]) if wanted else 1
    solved = '"reference"' in prompt

    def instruction() -> dict[str, str]:
        one = {"instruction": sentence(choice) + "?"}
        return {**one, "reference": str(choice.randrange(100))} if solved else one

    if '{"topics"' in prompt:
        return json.dumps({"topics": [sentence(choice) for _ in range(count)]})
    if '{"sub_topics"' in prompt:
        keys = ("name", "relevance", "use_case")
        return json.dumps({"sub_topics": [{key: sentence(choice) for key in keys} for _ in range(count)]})
    if '{"instructions"' in prompt:
        return json.dumps({"instructions": [instruction() for _ in range(count)]})
    if '{"instruction"' in prompt:
        return json.dumps(instruction())
    return f"{sentence(choice)}. {sentence(choice)}."


def create_app(fault_share: float, latency_s: float, refused: str | None = None) -> FastAPI:
    """The server.

    Args:
        fault_share: of requests that get something else than an answer.
        latency_s: of every request.
        refused: words that it does not want to read.
    """
    app = FastAPI()
    asked: list[list[Any]] = []
    chance = random.Random(7)

    @app.get("/asked")
    async def show() -> Any:
        return asked

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Any:
        loop = asyncio.get_running_loop()
        arrived_s = loop.time()
        body = await request.json()
        prompt = "\n".join(message["content"] for message in body["messages"])
        asked.append([hashlib.sha256(prompt.encode()).hexdigest()[:16], body.get("seed")])
        fault = chance.choice(FAULTS) if chance.random() < fault_share else None
        text = answer(prompt)
        await asyncio.sleep(max(arrived_s + latency_s - loop.time(), 0))
        if refused is not None and refused in prompt:
            return JSONResponse({"error": {"message": f"not a word of {refused}"}}, 400)
        if fault == "429":
            return JSONResponse({"error": {"message": "slow down"}}, 429, headers={"retry-after": "0.05"})
        if fault == "500":
            return JSONResponse({"error": {"message": "oh"}}, 500)
        if fault == "time":
            await asyncio.sleep(3)
        if fault == "cut":

            async def half() -> AsyncIterator[bytes]:
                yield b'{"id": "x", "choi'
                raise ConnectionError

            return StreamingResponse(
                half(), media_type="application/json", headers={"content-length": "5000"}
            )
        if fault == "broken":
            return Response('{"id": "x", "choices": [', media_type="application/json")
        if fault == "half":
            text = text[: len(text) // 2] if text.startswith("{") else ""
        if fault == "empty":
            text = ""
        if fault == "enormous":
            text = "word " * 100_000
        message = {"role": "assistant", "content": text}
        return {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4, "total_tokens": 0},
        }  # fmt: skip

    return app


FAULTS = ["429", "500", "time", "cut", "broken", "half", "empty", "enormous"]

if __name__ == "__main__":
    port, share, latency = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    app = create_app(share, latency, *sys.argv[4:])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical"))
    print("listening", flush=True)
    server.run()
