"""`ultrafuser serve` under clients that come, leave and err: nothing breaks, nothing is wrong, nothing is left behind.

Many clients stream at once from a server on loopback. A third of the requests are left at a random chunk, a tenth
are mistakes, each of which has to be refused with its own status; all others have to be answered with the very tokens
and gate weights that the same request got alone, before. Afterwards the server must be idle; and its memory, in a run
of a minute or more, what it was before, within five percent.

    ultrafuser demo --no-chat -o runs/demo
    python benchmarks/soak.py runs/demo

It ends with exit code 1 if anything was found, and says what.
"""

import asyncio
import json
import math
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import httpx
import psutil
import typer
from conversations import first_questions
from loopback import free_port, wait_until_it_answers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ultrafuser.cli.report import provenance, write_metrics

LEAVING, ERRING = 1 / 3, 1 / 10
LEAK = 0.05
FILLED_S = 60.0
"""Seconds of a run from which on memory is judged: a shorter one warms up too little to fill what a server keeps."""
START_S = 600.0
"""Seconds that the server may take to start."""

Body = dict[str, Any]
Said = tuple[list[str], list[list[float]]]
"""Texts of tokens, and their gate weights."""


class Mistake(NamedTuple):
    """A request that has to be refused, the status, and a word of what is said about it."""

    method: str
    path: str
    content: bytes
    status: int
    word: str


@dataclass
class Findings:
    """What clients have seen."""

    counts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    tokens: int = 0


@contextmanager
def server(model: str, max_waiting: int) -> Iterator[tuple[str, psutil.Process]]:
    """`ultrafuser serve` on a free port of loopback: its address and its process."""
    code = "from ultrafuser.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", model, "--name", "m", "--max-waiting", str(max_waiting)]
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.NamedTemporaryFile() as file,  # a pipe that nobody reads would be full some day
        subprocess.Popen([*command, "--port", str(port)], stderr=file) as process,
    ):
        log = Path(file.name)
        try:
            wait_until_it_answers(f"{url}/health", START_S, process, log)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()
            print(log.read_text(), end="", file=sys.stderr)


def good_requests(count: int, seed: int) -> list[Body]:
    """Different questions and settings, half of them sampled with a seed."""
    choice = random.Random(seed)
    bodies = []
    for index, text in enumerate(choice.sample(first_questions(), count)):
        body: Body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}
        body |= {"max_tokens": choice.randint(6, 24), "temperature": 0}
        if index % 2:
            body |= {"temperature": 0.8, "top_p": 0.9, "seed": choice.randrange(2**31)}
        bodies.append(body)
    return bodies


def mistakes(good: Body) -> list[Mistake]:
    """Requests that have to be refused."""
    chat = "/v1/chat/completions"

    def changed(word: str, status: int = 400, **change: Any) -> Mistake:
        return Mistake("POST", chat, json.dumps({**good, **change}).encode(), status, word)

    return [
        changed("another", 404, model="another"),
        changed("temperature", temperature=-1),
        changed("temperature", temperature="hot"),
        changed("no_such_setting", no_such_setting=1),
        changed("nobody", specialist="nobody"),
        changed("messages", messages=[]),
        changed("reads at most", messages=[{"role": "user", "content": "x " * 50_000}]),
        Mistake("POST", chat, b'{"model": "m", "messages": [', 400, "not JSON"),
        Mistake(
            "POST",
            "/v1/completions",
            json.dumps({"model": "m", "prompt": [2**40]}).encode(),
            400,
            "token ids",
        ),
        Mistake("GET", chat, b"", 405, "Method Not Allowed"),
        Mistake("POST", "/v1/nothing", b"{}", 404, "Not Found"),
    ]


async def stream(
    client: httpx.AsyncClient, body: Body, findings: Findings, most_chunks: int | None = None
) -> Said:
    """The tokens of a response, or of its first chunks; it is left then."""
    tokens: list[str] = []
    weights: list[list[float]] = []
    start, chunks = time.perf_counter(), 0
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        findings.statuses[response.status_code] += 1
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code}: {(await response.aread()).decode()[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if not chunks:
                findings.first_token_s.append(time.perf_counter() - start)
            fusion = event["choices"][0]["fusion"]
            tokens += fusion["tokens"]
            weights += fusion["gate_weights"]
            findings.tokens += len(fusion["tokens"])
            chunks += 1
            if most_chunks is not None and chunks >= most_chunks:
                break
    return tokens, weights


async def one_client(
    client: httpx.AsyncClient,
    expected: list[tuple[Body, Said]],
    choice: random.Random,
    end_s: float,
    findings: Findings,
) -> None:
    """Ask, leave and err until the time is over."""
    while time.perf_counter() < end_s:
        body, (tokens, weights) = choice.choice(expected)
        kind = choice.random()
        try:
            if kind < ERRING:
                mistake = choice.choice(mistakes(body))
                headers = {"content-type": "application/json"}
                response = await client.request(
                    mistake.method, mistake.path, content=mistake.content, headers=headers
                )
                findings.statuses[response.status_code] += 1
                findings.counts["erring"] += 1
                message = response.json()["error"]["message"]
                if response.status_code != mistake.status or mistake.word not in message:
                    findings.problems.append(
                        f"{mistake.method} {mistake.path} {mistake.content[:80]!r}: expected {mistake.status} and "
                        f"{mistake.word!r}, got {response.status_code} and {message!r}"
                    )
            elif kind < ERRING + LEAVING:
                await stream(client, body, findings, choice.randint(1, 6))
                findings.counts["leaving"] += 1
            else:
                said = await stream(client, body, findings)
                findings.counts["good"] += 1
                if said[0] != tokens:
                    findings.counts["wrong"] += 1
                    findings.problems.append(f"expected {''.join(tokens)!r}, got {''.join(said[0])!r}")
                elif _distance(weights, said[1]) > 1e-3:
                    findings.problems.append(f"the gate weights of {''.join(tokens)!r} differ")
        except Exception as error:  # whatever it is, it is a finding
            findings.problems.append(f"{type(error).__name__}: {error}")


async def soak(
    url: str, process: psutil.Process, clients: int, seconds: float, requests: int, seed: int
) -> tuple[Findings, dict[str, float]]:
    """All of it: alone first, then together twice, the first time to fill what the server keeps; the metrics."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        alone = Findings()  # what is wrong is kept there, whenever it was
        bodies = good_requests(requests, seed)
        expected = []
        with Progress(transient=True) as progress:
            for body in progress.track(bodies, description="alone"):
                expected.append((body, await stream(client, body, alone)))
            memory = []
            for name, duration_s in (("warming up", seconds / 4), ("together", seconds)):
                task = progress.add_task(name, total=duration_s)
                findings, start = Findings(problems=alone.problems), time.perf_counter()
                together = asyncio.gather(
                    *(
                        one_client(
                            client,
                            expected,
                            random.Random(f"{seed} {name} {i}"),
                            start + duration_s,
                            findings,
                        )
                        for i in range(clients)
                    )
                )
                while not together.done():
                    await asyncio.wait({together}, timeout=0.5)
                    progress.update(task, completed=time.perf_counter() - start)
                    if (await client.get("/health")).status_code != 200:
                        findings.problems.append("/health does not answer")
                await together
                took_s = time.perf_counter() - start
                await _idle(client, findings)
                memory.append(process.memory_info().rss)
        for body, said in expected:
            if await stream(client, body, alone) != said:
                alone.problems.append("afterwards, alone, another response than before")
    before, after = memory
    if seconds >= FILLED_S and after > (1 + LEAK) * before:
        findings.problems.append(f"memory grew from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
    return findings, {
        **{f"requests/{kind}": findings.counts[kind] for kind in ("good", "leaving", "erring", "wrong")},
        **{f"status/{status}": count for status, count in sorted(findings.statuses.items())},
        "problems": len(findings.problems),
        "tokens_per_s": findings.tokens / took_s,
        "first_token_s/median": median(findings.first_token_s) if findings.first_token_s else math.nan,
        "memory_bytes/before": before,
        "memory_bytes/after": after,
    }


def _distance(some: list[list[float]], others: list[list[float]]) -> float:
    pairs = zip(some, others, strict=True)
    return max(abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True))


async def _idle(client: httpx.AsyncClient, findings: Findings) -> None:
    """Wait until the server has nothing to do; those who left must not keep it busy."""
    for _ in range(100):
        text = (await client.get("/metrics")).text
        counts = re.findall(r"^ultrafuser_requests\{.*\} (\S+)$", text, re.MULTILINE)
        if len(counts) == 2 and not any(map(float, counts)):
            return
        await asyncio.sleep(0.1)
    findings.problems.append("ten seconds after the last client, requests are still running")


def main(
    model: Annotated[str, typer.Argument(help="A fused model: a folder that train or demo made.")],
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="How long; a quarter of it comes first, to warm up.")
    ] = 120,
    requests: Annotated[int, typer.Option(min=1, max=30, help="Different good requests.")] = 30,
    seed: Annotated[int, typer.Option(help="Of what clients do.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Let many clients loose on the server."""
    console = Console(width=None if Console().is_terminal else 110)
    with server(model, max_waiting=clients) as (url, process):
        findings, metrics = asyncio.run(soak(url, process, clients, seconds, requests, seed))
    table = Table("", "", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.2f}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    for problem, count in Counter(findings.problems).most_common(20):
        console.print(f"{count}x {problem}", markup=False, highlight=False)
    if json_file is not None:
        write_metrics(
            json_file, metrics, provenance(model=model, clients=clients, seconds=seconds, seed=seed)
        )
    raise typer.Exit(1 if findings.problems else 0)


if __name__ == "__main__":
    typer.run(main)
