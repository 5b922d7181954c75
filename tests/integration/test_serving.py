"""The native server as its clients see it: a real one on loopback, over a tiny random model."""

import asyncio
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import fused_over, save_model, tiny_model
from pydantic import ValidationError
from typer.testing import CliRunner

from ultrafuser.cli import app
from ultrafuser.cli.serve import _bind, _hosts
from ultrafuser.decoding.engine import FusedDecoder
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.assembly import FusedModel, SpecialistSource, fuse
from ultrafuser.modeling.checkpoint import save_fused
from ultrafuser.modeling.specialists import WholeSpecialists
from ultrafuser.serving.app import ServerSettings, create_app
from ultrafuser.serving.protocol import ChatRequest, CompletionRequest
from ultrafuser.serving.worker import BusyError, DecodingWorker

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def fused(tokenizer):
    names = ("a", "b")
    model = fused_over(WholeSpecialists({name: tiny_model(seed=seed) for seed, name in enumerate(names, 1)}))
    members = [replace(member, template=tokenizer.chat_template) for member in model.config.members]
    model.config.specialists = [vars(member) for member in members]
    return FusedModel(model, tokenizer)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A server on a free port of loopback, in a thread."""

    def __init__(self, fused, max_batch=4, **settings):
        settings = ServerSettings(name="tiny", **settings)
        self.decoder = FusedDecoder(*fused, max_batch=max_batch)
        app = create_app(fused, self.decoder, settings)
        listening = _bind("127.0.0.1", 0, settings.write_timeout_s)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # or megabytes may wait there
        self.port = listening.getsockname()[1]
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=[[listening]], daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        while not self.uvicorn.started:
            time.sleep(0.01)

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def stop(self):
        self.uvicorn.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def server(fused):
    server = Server(fused)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def expected(fused, max_new_tokens, **settings):
    """Tokens and text of the engine itself."""
    prompts = fused.model.conversation_encoder(fused.tokenizer).prompt(QUESTION)
    params = SamplingParams(max_new_tokens=max_new_tokens, **settings)
    steps = list(FusedDecoder(*fused).stream(prompts, params))
    return steps, "".join(step.text for step in steps)


def ask(client, **settings):
    return client.chat.completions.create(model="tiny", messages=QUESTION, **{"temperature": 0, **settings})


def test_the_model_is_listed_with_its_specialists(client):
    (model,) = client.models.list().data
    assert (model.id, model.specialists) == ("tiny", ["a", "b"])


def test_a_conversation_is_answered_as_by_the_engine(client, fused):
    steps, text = expected(fused, 12)
    response = ask(client, max_tokens=12)
    (choice,) = response.choices
    assert choice.message.content == text
    assert choice.finish_reason == {"end": "stop", "length": "length"}[steps[-1].finish]
    prompt = fused.model.conversation_encoder(fused.tokenizer).prompt(QUESTION)[0]
    used = response.usage
    assert (used.prompt_tokens, used.completion_tokens) == (len(prompt), len(steps))
    assert used.total_tokens == len(prompt) + len(steps)
    assert choice.fusion["specialists"] == ["a", "b"]
    for weights, step in zip(choice.fusion["gate_weights"], steps, strict=True):
        assert weights == pytest.approx(step.gate_weights, abs=1e-4)
    assert len(choice.fusion["tokens"]) == len(steps)


def test_a_stream_says_the_same_with_the_weights_of_every_token(client, fused):
    steps, text = expected(fused, 12)
    chunks = list(ask(client, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    *parts, last = chunks
    assert "".join(part.choices[0].delta.content for part in parts) == text
    weights = [row for part in parts for row in part.choices[0].fusion["gate_weights"]]
    for row, step in zip(weights, steps, strict=True):
        assert row == pytest.approx(step.gate_weights, abs=1e-4)
    roles = [part.choices[0].delta.role for part in parts]
    assert roles == ["assistant", *[None] * (len(roles) - 1)]  # clients join what chunks say
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason is not None
    assert (last.choices, last.usage.completion_tokens) == ([], len(steps))


def test_choices_have_seeds_of_their_own_that_repeat(client, fused):
    settings = {"n": 3, "seed": 5, "temperature": 1.5, "max_tokens": 8}
    first, second = (ask(client, **settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts == [expected(fused, 8, temperature=1.5, seed=seed)[1] for seed in (5, 6, 7)]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1


def test_log_probabilities_stop_texts_and_one_specialist(client, fused):
    steps, text = expected(fused, 8, logprobs=2)
    choice = ask(client, max_tokens=8, logprobs=True, top_logprobs=2).choices[0]
    for entry, step in zip(choice.logprobs.content, steps, strict=True):
        assert entry.logprob == pytest.approx(step.logprob, abs=1e-4)
        assert [best.logprob for best in entry.top_logprobs] == pytest.approx(
            [value for _, value in step.alternatives], abs=1e-4
        )
    stop = text[2:4]
    choice = ask(client, max_tokens=8, stop=[stop]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    choice = ask(client, max_tokens=4, extra_body={"specialist": "b"}).choices[0]
    assert all(weights == [0, 1] for weights in choice.fusion["gate_weights"])


@pytest.mark.parametrize("stream", [False, True])
def test_no_tokens_allowed_are_none(client, stream):
    response = ask(client, max_tokens=0, stream=stream)
    (choice,) = next(iter(response)).choices if stream else response.choices
    assert choice.finish_reason == "length"
    assert (choice.delta if stream else choice.message).content == ""


def test_a_text_is_continued(client, fused):
    ids = fused.tokenizer("User: hi")["input_ids"]
    steps = list(FusedDecoder(*fused).stream([ids, ids], SamplingParams(max_new_tokens=6, logprobs=1)))
    text = "".join(step.text for step in steps)
    settings = {"model": "tiny", "max_tokens": 6, "temperature": 0, "logprobs": 1}
    for prompt in ("User: hi", ids):
        response = client.completions.create(prompt=prompt, **settings)
        assert response.choices[0].text == text
        logprobs = response.choices[0].logprobs
        assert logprobs.token_logprobs == pytest.approx([step.logprob for step in steps], abs=1e-4)
        assert logprobs.text_offset[0] == 0
    several = client.completions.create(prompt=["User: hi", "User: ho"], **settings)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.choices[0].text == text
    streamed = client.completions.create(prompt="User: hi", stream=True, **settings)
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "no model 'other'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, 400, "user"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "role"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 100_000}, 400, "reads at most 256 tokens"),
        ({"n": 0}, 400, "n:"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"tools": []}, 400, "tools"),
        ({"specialist": "c"}, 400, "there is no specialist 'c'"),
        ({"stop": [""]}, 400, "stop must be"),
    ],
)  # fmt: skip
def test_bad_requests_are_refused_in_openais_form(server, change, status, words):
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 4, **change}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    codes = {"model": "model_not_found", "max_tokens": "context_length_exceeded"}
    assert error["code"] == codes.get(next(iter(change)))
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("ids", [[], [5, 100_000], [-1]])
def test_ids_that_are_no_prompt_are_refused(server, ids):
    body = {"model": "tiny", "prompt": ids}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_what_is_no_json_or_too_large_or_nowhere_is_refused(server):
    url = f"{server.url}/v1/chat/completions"
    broken = httpx.post(url, content=b'{"model": ', headers={"content-type": "application/json"})
    assert broken.status_code == 400
    assert "not JSON" in broken.json()["error"]["message"]
    assert broken.json()["error"]["param"] is None
    # Without a content type, a page of another origin can send it and is not asked whether it may.
    untyped = httpx.post(url, content=json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 1}))
    assert untyped.status_code == 400
    assert httpx.post(url, content=b" " * (2**20 + 1)).status_code == 413
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["message"] == "Not Found"
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_key_is_asked_for_where_there_is_one(fused):
    server = Server(fused, api_key="secret")
    try:
        for headers in ({"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}, {}):
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert server.client("secret").models.list().data
        assert httpx.get(f"{server.url}/health").status_code == 200
    finally:
        server.stop()


def test_a_client_that_leaves_cancels_and_metrics_say_what_was_done(fused, monkeypatch):
    server = Server(fused)
    try:
        body = {"model": "tiny", "messages": QUESTION, "stream": True, "max_tokens": 150, "logit_bias": {}}
        step = server.decoder.step
        monkeypatch.setattr(
            server.decoder, "step", lambda: (time.sleep(0.05), step())[1]
        )  # 150 take eight seconds
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": False}, timeout=0.05)
        deadline = time.monotonic() + 20
        while server.decoder.num_active + server.decoder.num_waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.decoder.num_active + server.decoder.num_waiting == 0
        assert server.decoder.stats.tokens < 50
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'ultrafuser_requests{state="running"} 0.0' in metrics
        assert 'ultrafuser_requests{state="waiting"} 0.0' in metrics
        assert 'ultrafuser_responses_total{status="200"}' in metrics
        means = [
            float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("ultrafuser_mean_gate")
        ]
        assert sum(means) == pytest.approx(1, abs=1e-4)
    finally:
        server.stop()


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # the older one is uvicorn's
def test_a_client_that_takes_nothing_is_left_and_its_place_is_free(fused, spec_version, monkeypatch):
    decoder = FusedDecoder(*fused, max_batch=1)
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda: (time.sleep(0.02), step())[1])  # ten tokens until it is left
    server = create_app(fused, decoder, ServerSettings(name="tiny", max_waiting=0, write_timeout_s=0.2))
    body = {"model": "tiny", "messages": QUESTION, "stream": True, "max_tokens": 150, "logprobs": True}
    asked = [{"type": "http.request", "body": json.dumps(body).encode()}]
    headers = [(b"host", b"x"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers,
        "asgi": {"version": "3.0", "spec_version": spec_version},
    }  # fmt: skip

    async def receive():
        return asked.pop() if asked else await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # nobody reads

    async def story():
        async with server.router.lifespan_context(server), asyncio.timeout(30):
            await server(scope, receive, send)
            while decoder.num_active:
                await asyncio.sleep(0.01)
            transport = httpx.ASGITransport(server)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                again = await client.post(
                    "/v1/chat/completions", json={**body, "stream": False, "max_tokens": 5}
                )
            return again.status_code

    assert asyncio.run(story()) == 200
    assert decoder.stats.tokens < 100


def test_the_connection_of_a_client_that_takes_nothing_ends_too(fused):
    server = Server(fused, max_batch=2, write_timeout_s=1.0)
    body = {"model": "tiny", "prompt": "a", "n": 16, "stream": True, "max_tokens": 150, "logprobs": 20}
    content = json.dumps(body).encode()
    lines = ["POST /v1/completions HTTP/1.1", "host: x", "content-type: application/json"]
    head = "\r\n".join([*lines, f"content-length: {len(content)}", "", ""])
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", server.port))
        stalled.sendall(head.encode() + content)
        connections = server.uvicorn.server_state.connections
        deadline = time.monotonic() + 30
        while not connections and time.monotonic() < deadline:
            time.sleep(0.01)
        assert connections
        while connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not connections
        start = time.monotonic()
        server.stop()  # waits for nobody
        assert time.monotonic() - start < 5


def test_bytes_of_log_probabilities_are_the_tokens_own(client, fused):
    options = {"max_tokens": 40, "seed": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 3}
    found = client.chat.completions.create(model="tiny", messages=QUESTION, **options).choices[0]
    assert any(
        one.token.startswith("bytes:") for one in found.logprobs.content
    )  # random bytes are no characters
    content = b"".join(bytes(one.bytes) for one in found.logprobs.content)
    for special in fused.tokenizer.all_special_tokens:  # they are no text
        content = content.replace(special.encode(), b"")
    text = content.decode(errors="replace")
    assert text.replace("\ufffd", "") == found.message.content.replace("\ufffd", "")
    for one in found.logprobs.content:
        assert one.token == bytes(one.bytes).decode(errors="ignore") or one.token.startswith("bytes:\\x")


def test_the_mean_gate_weight_is_of_what_the_gate_decided(fused):
    server = Server(fused)
    try:
        ask(server.client(), max_tokens=3, extra_body={"specialist": "b"})
        metrics = httpx.get(f"{server.url}/metrics").text
        assert 'ultrafuser_mean_gate_weight{specialist="b"} 0.0' in metrics
        assert "ultrafuser_tokens_total 3.0" in metrics
    finally:
        server.stop()


def test_metrics_tell_who_is_decoded_from_who_waits(fused, monkeypatch):
    server = Server(fused, max_batch=1)
    step = server.decoder.step
    monkeypatch.setattr(server.decoder, "step", lambda: (time.sleep(0.05), step())[1])
    try:
        first = ask(server.client(), max_tokens=150, stream=True)
        next(iter(first))
        body = {"model": "tiny", "messages": QUESTION, "max_tokens": 1}
        with ThreadPoolExecutor(1) as pool:
            second = pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60)
            deadline, states = time.monotonic() + 5, []
            while states != ["1.0", "1.0"] and time.monotonic() < deadline:
                metrics = httpx.get(f"{server.url}/metrics").text
                states = re.findall(
                    r'^ultrafuser_requests\{state="(?:running|waiting)"\} (\S+)$', metrics, re.MULTILINE
                )
            assert states == ["1.0", "1.0"]
            first.close()
            assert second.result().status_code == 200
    finally:
        server.stop()


def test_what_runs_is_finished_when_the_server_ends(fused):
    server = Server(fused)
    stream = iter(ask(server.client(), max_tokens=100, stream=True))
    parts = [next(stream)]
    server.uvicorn.should_exit = True
    parts += stream
    assert "".join(part.choices[0].delta.content for part in parts) == expected(fused, 100)[1]
    server.stop()


def test_the_command_serves_until_it_is_interrupted(tmp_path, tokenizer):
    folder = save_model(tmp_path / "base", tiny_model(), tokenizer)
    save_fused(fuse({name: SpecialistSource(model=folder) for name in "ab"}, gate_size=8), tmp_path / "fused")
    port = free_port()
    code = "from ultrafuser.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", str(tmp_path / "fused"), "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            assert process.stderr.readline().strip() == f"fused at {url}/v1, a page at {url}/"
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5)
            assert client.models.list().data[0].id == "fused"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) in (0, -signal.SIGINT)
        finally:
            process.kill()


def test_what_runs_has_its_time_to_finish_and_no_more(tmp_path, tokenizer):
    folder = save_model(tmp_path / "base", tiny_model(max_position_embeddings=100_000), tokenizer)
    save_fused(fuse({name: SpecialistSource(model=folder) for name in "ab"}, gate_size=8), tmp_path / "fused")
    port = free_port()
    code = "from ultrafuser.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        "serve",
        str(tmp_path / "fused"),
        "--port",
        str(port),
        "--grace-s",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.stderr.readline()
            body = {
                "model": "fused",
                "messages": QUESTION,
                "stream": True,
                "max_tokens": 90_000,
                "logit_bias": {},
            }
            body["stop"] = ["nothing that it says"]
            with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as response:
                assert response.status_code == 200
                next(response.iter_lines())
                start = time.monotonic()
                process.send_signal(signal.SIGINT)
                process.wait(60)
            assert 0.9 < time.monotonic() - start < 20  # a response of minutes
        finally:
            process.kill()


def test_many_clients_get_what_each_gets_alone(server, fused):
    async def all_at_once():
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=120) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="tiny", messages=QUESTION, temperature=0.9, seed=seed, max_tokens=5 + seed
                    )
                    for seed in range(12)
                )
            )

    for seed, response in enumerate(asyncio.run(all_at_once())):
        steps, text = expected(fused, 5 + seed, temperature=0.9, seed=seed)
        assert response.choices[0].message.content == text
        assert response.usage.completion_tokens == len(steps)


def test_requests_leave_nothing_behind(fused):
    """Whether they were answered, left or refused: objects and tensors are counted, which no allocator blurs."""
    server = Server(fused)
    messages = {"model": "tiny", "messages": QUESTION, "max_tokens": 20}

    def one_round():
        for seed in range(6):
            assert httpx.post(f"{server.url}/v1/chat/completions", json={**messages, "seed": seed}).is_success
            body = {**messages, "stream": True, "seed": seed}
            with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
            refused = httpx.post(f"{server.url}/v1/chat/completions", json={**messages, "temperature": -1})
            assert refused.status_code == 400

    def count():
        while server.decoder.num_active:
            time.sleep(0.01)
        time.sleep(0.2)  # connections end a little later than their responses
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(one), torch.Tensor) for one in objects)

    one_round()
    objects, tensors = count()
    for _ in range(5):
        one_round()
    more_objects, more_tensors = count()
    server.stop()
    assert more_tensors <= tensors
    assert more_objects - objects < 90  # requests were made since


def test_more_requests_than_may_wait_are_told_to_come_again(fused):
    server = Server(fused, max_batch=1, max_waiting=0)
    try:
        stream = ask(server.client(), max_tokens=150, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as caught:
            ask(server.client(), max_tokens=1)
        assert caught.value.response.headers["retry-after"] == "1"
        stream.close()
    finally:
        server.stop()


def test_a_failing_step_is_told_to_those_who_wait_and_to_nobody_else(fused, monkeypatch):
    async def story():
        decoder = FusedDecoder(*fused, max_batch=2)
        worker = DecodingWorker(decoder, 0)
        prompts, params = [[5], [6]], SamplingParams(max_new_tokens=4)
        with monkeypatch.context() as patch:
            patch.setattr(
                decoder._backbones[0], "read", lambda *_: (_ for _ in ()).throw(MemoryError("none"))
            )
            worker.reserve(1)
            (answer,) = await worker.submit([(prompts, params, None)])
            with pytest.raises(MemoryError, match="none"):
                async for _ in answer:
                    pass
            worker.release(1)
        read, fails = decoder._backbones[0].read, [True]
        monkeypatch.setattr(
            decoder._backbones[0],
            "read",
            lambda *args: (
                read(*args) if not fails or not fails.pop() else (_ for _ in ()).throw(MemoryError("once"))
            ),
        )
        worker.reserve(2)
        monkeypatch.setattr(decoder, "max_batch", 1)
        failing, waiting_one = await worker.submit([(prompts, params, None)] * 2)
        with pytest.raises(MemoryError, match="once"):
            async for _ in failing:
                pass
        assert sum([len(steps) async for steps in waiting_one]) == 4  # it had not begun
        monkeypatch.setattr(decoder, "max_batch", 2)
        worker.release(2)
        with pytest.raises(UltrafuserError, match="3 responses"):
            worker.reserve(3)
        worker.reserve(2)
        with pytest.raises(BusyError):
            worker.reserve(1)
        waiting = await worker.submit([(prompts, params, None)] * 2)
        lengths = []
        for answer in waiting:
            lengths.append(sum([len(steps) async for steps in answer]))
        worker.release(2)
        await asyncio.to_thread(worker.close)
        return lengths, worker.num_requests

    assert asyncio.run(story()) == ([4, 4], (0, 0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_knows_whether_anybody_decodes(fused, monkeypatch):
    server = Server(fused)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}

    def end():
        raise SystemExit

    monkeypatch.setattr(server.decoder, "step", end)
    stream = ask(server.client(), max_tokens=5, stream=True)
    with pytest.raises(openai.APIError, match="decoding has stopped"):
        list(stream)
    response = httpx.get(f"{server.url}/health")
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    with pytest.raises(openai.InternalServerError, match="shutting down"):
        ask(server.client(), max_tokens=1)
    server.stop()


def test_openai_s_own_helper_joins_a_stream(client, fused):
    text = expected(fused, 12)[1]
    settings = {"max_tokens": 12, "temperature": 0, "stop": [text[4:6]]}
    with client.chat.completions.stream(model="tiny", messages=QUESTION, **settings) as stream:
        message = stream.get_final_completion().choices[0].message
    assert (message.role, message.content) == ("assistant", text[: text.index(text[4:6])])
    history = [*QUESTION, message.model_dump(), *QUESTION]
    again = client.chat.completions.create(model="tiny", messages=history, max_tokens=2)
    assert again.choices[0].message.role == "assistant"


def test_null_is_what_is_not_set(server):
    names = ("temperature", "top_p", "n", "stream", "logprobs", "stop", "max_tokens", "metadata", "seed")
    body = {"model": "tiny", "messages": QUESTION, **dict.fromkeys(names), "max_completion_tokens": 2}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


MANY_MISTAKES = [
    ("completions", {"prompt": [{}] * 260_000}),
    ("completions", {"prompt": [["a"] * 200_000]}),
    ("completions", {"prompt": "a", "metadata": dict.fromkeys(map(str, range(60_000)), 1), "n": 0}),
    ("completions", {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(60_000)), "b")}),
    ("completions", {"prompt": "a", **dict.fromkeys(map(str, range(60_000)), 1)}),
    ("chat/completions", {"messages": [0] * 300_000}),
    ("chat/completions", {"messages": [{}] * 200_000}),
    ("chat/completions", {"messages": [{"role": "user", "content": [{}] * 200_000}]}),
    ("chat/completions", {"messages": [dict.fromkeys(map(str, range(60_000)), 1)]}),
]


@pytest.mark.parametrize(("path", "body"), MANY_MISTAKES)
def test_a_few_of_many_mistakes_are_enough(path, body):
    """Telling all of them apart takes seconds, in which nobody else is served."""
    kind = ChatRequest if path.startswith("chat") else CompletionRequest
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "tiny", **body})
    assert caught.value.error_count() < 10


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "\ud800"}),
        ("completions", {"prompt": ["a"] * 200}),
        ("completions", {"prompt": ["a"] * 100}),  # more than the server ever takes
        ("completions", {"prompt": "a", "stop": [f"{i}" for i in range(100)]}),
        *MANY_MISTAKES,
        ("chat/completions", {"messages": [{"role": "user", "content": "\udc00"}]}),
        (
            "chat/completions",
            {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")] * 5000},
        ),
    ],
)
def test_what_would_take_too_much_is_refused_at_once(server, path, body):
    start = time.monotonic()
    content = json.dumps({"model": "tiny", **body})
    assert len(content) < 2**20
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/v1/{path}", content=content, headers=headers, timeout=60)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["message"]
    assert time.monotonic() - start < 2


def test_failures_are_counted(fused, monkeypatch):
    server = Server(fused)
    monkeypatch.setattr(server.decoder, "submit", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
        ask(server.client(), max_tokens=1)
    assert 'ultrafuser_responses_total{status="500"} 1.0' in httpx.get(f"{server.url}/metrics").text
    server.stop()


def test_it_answers_under_its_own_names_only(fused):
    """Or a web page whose name is made to lead to 127.0.0.1 could use it."""
    server = Server(fused, hosts=("127.0.0.1", "localhost", "[::1]"))
    for host, status in (
        ("127.0.0.1:8000", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:8000", 200),
        ("evil.example", 403), ("evil.example:8000", 403), ("127.0.0.1.evil.example", 403), ("", 403),
    ):  # fmt: skip
        response = httpx.get(f"{server.url}/v1/models", headers={"host": host})
        assert response.status_code == status, host
        assert status == 200 or "--allowed-host" in response.json()["error"]["message"]
    server.stop()


@pytest.mark.parametrize(
    ("host", "allowed", "hosts"),
    [
        ("127.0.0.1", None, {"127.0.0.1", "localhost", "[::1]"}),
        ("::1", None, {"127.0.0.1", "localhost", "[::1]"}),
        ("0.0.0.0", None, None),
        ("127.0.0.1", ["Chat.Example"], {"127.0.0.1", "chat.example"}),
        ("0.0.0.0", ["chat.example"], {"chat.example"}),
    ],
)
def test_which_names_these_are(host, allowed, hosts):
    found = _hosts(host, allowed)
    assert (found is None) if hosts is None else (hosts <= set(found))
    assert found is None or "evil.example" not in found


@pytest.mark.parametrize("key", ["", "schlüssel"])
def test_a_key_that_protects_nothing_is_refused(key):
    result = CliRunner().invoke(app, ["serve", "nowhere", "--api-key", key])
    assert result.exit_code == 2
    assert "--api-key must be plain ASCII and not empty" in result.stderr


def test_a_port_that_is_taken_is_told_before_the_model_is_opened():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["serve", "nowhere", "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use." in result.stderr
