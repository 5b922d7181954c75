"""Whole runs against a server that answers like an OpenAI endpoint, a process of its own that fails on demand."""

import asyncio
import json
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.book import Book, Reply
from ultrafuser.synthesis.budget import Account, BudgetError
from ultrafuser.synthesis.endpoint import Endpoint, EndpointError, UnansweredError
from ultrafuser.synthesis.export import export
from ultrafuser.synthesis.pipeline import STAGES, Pipeline
from ultrafuser.synthesis.recipe import Budget, ModelSettings, read_synthesis_recipe
from ultrafuser.synthesis.stages import Call
from ultrafuser.training.data import read_conversations

SERVER = Path(__file__).resolve().parents[3] / "benchmarks" / "chat_server.py"
RECIPE = {
    "seed": 3,
    "model": {"model": "canned", "max_tokens": 512, "price": {"input": 1.0, "output": 2.0}},
    "filters": {"languages": None},
    "heldout": 0.1,
    "domains": {
        "text": {"meta_topics": 3, "sub_topics": 7, "instructions": 40, "several_turns": 0.3},
        "code": {"meta_topics": ["lists", "files"], "sub_topics": 4, "instructions": 25, "check": "code"},
        "music": {
            "description": "tunes",
            "meta_topics": 2,
            "sub_topics": 3,
            "instructions": 20,
            "complicated": 0.5,
        },
    },
}


@pytest.fixture(scope="module")
def serve():
    processes = []

    def start(faults=0.0, latency_s=0.0, refused=None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(SERVER), str(port), str(faults), str(latency_s)]
        command += [] if refused is None else [refused]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "listening\n"
        url = f"http://127.0.0.1:{port}"
        for _ in range(100):
            try:
                httpx.get(f"{url}/asked")
                return url
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError("the server does not listen")

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def write_recipe(folder, url, **changes):
    endpoint = {"base_url": f"{url}/v1", "api_key_variable": None, "concurrency": 8, "timeout_s": 1}
    endpoint |= changes.pop("endpoint", {})
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "endpoint": endpoint, **changes}, sort_keys=False))
    return path


def run(path, folder):
    pipeline = Pipeline(read_synthesis_recipe(path), folder)
    try:
        pipeline.run()
        export(pipeline.tools, folder, figure=False)
        return pipeline.tools
    finally:
        pipeline.close()


def rows(folder, table, order):
    with sqlite3.connect(folder / "book.sqlite") as connection:
        return list(connection.execute(f"SELECT * FROM {table} ORDER BY {order}"))


def items(folder):
    return rows(folder, "items", "stage, domain, place")


@pytest.fixture(scope="module")
def clean(serve, tmp_path_factory):
    """A run in which nothing failed, its folder, and what was asked."""
    folder = tmp_path_factory.mktemp("clean")
    url = serve()
    run(write_recipe(folder, url), folder / "run")
    return folder / "run", httpx.get(f"{url}/asked").json()


def test_there_is_as_much_as_was_wanted(clean):
    folder, asked = clean
    made = items(folder)
    counts = {(stage, domain): 0 for stage, domain, *_ in made}
    for stage, domain, *_ in made:
        counts[stage, domain] += 1
    for domain, wanted in RECIPE["domains"].items():
        metas = wanted["meta_topics"]
        assert counts["meta_topics", domain] == (len(metas) if isinstance(metas, list) else metas)
        assert counts["sub_topics", domain] == wanted["sub_topics"]
        assert counts["instructions", domain] + counts["related", domain] == wanted["instructions"]
        assert counts["complicated", domain] == counts["responses", domain] == wanted["instructions"]
        rewritten = [
            content for stage, own, _, _, content in made if stage == "complicated" and own == domain
        ]
        share = wanted.get("complicated", 0.3)
        assert sum(json.loads(content)["complicated"] for content in rewritten) == round(
            share * len(rewritten)
        )
    assert len(asked) == len(rows(folder, "calls", "key"))


def test_conversations_are_what_training_reads(clean):
    folder, _ = clean
    seen = set()
    for domain, wanted in RECIPE["domains"].items():
        parts = [folder / "data" / f"{domain}.{split}.jsonl" for split in ("train", "heldout")]
        train, heldout = (len(read_conversations(path)) for path in parts)
        assert (train + heldout, heldout) == (wanted["instructions"], round(0.1 * wanted["instructions"]))
        lines = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
        assert not seen & {line["id"] for line in lines}
        seen |= {line["id"] for line in lines}
        several = sum(len(line["messages"]) > 2 for line in lines)
        assert several == round(wanted.get("several_turns", 0) * len(lines))
        assert all(len(line["messages"]) % 2 == 0 for line in lines)
    assert len(seen) == sum(wanted["instructions"] for wanted in RECIPE["domains"].values())
    texts = [row[4] for row in items(folder) if row[0] == "complicated"]
    instructions = [json.loads(text)["instruction"] for text in texts]
    assert len(set(instructions)) == len(instructions)


def test_faults_change_nothing_but_the_time(clean, serve, tmp_path):
    url = serve(faults=0.2)
    run(write_recipe(tmp_path, url), tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])
    assert rows(tmp_path / "run", "unread", "key")  # there were answers that could not be read
    assert len(httpx.get(f"{url}/asked").json()) > len(clean[1])


def run_and_kill(path, folder, kills, most_answers):
    """Run the command, end it so often by SIGKILL, each time after some more answers, and let it finish.

    Returns the numbers of calls that were in the book after each kill.
    """
    code = "from ultrafuser.cli import main; main()"
    command = [sys.executable, "-c", code, "synth", str(path), "-o", str(folder), "--no-figure"]
    chance, answered = random.Random(4), [0]
    while True:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if len(answered) > kills:
                assert process.wait(1800) == 0
                return answered[1:]
            wanted = answered[-1] + chance.randint(3, most_answers)
            end = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < end and count_calls(folder) < wanted:
                time.sleep(0.005)
            time.sleep(chance.random() * 0.05)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            answered.append(count_calls(folder))


def test_killed_at_any_moment_it_goes_on(clean, serve, tmp_path):
    url = serve(faults=0.1, latency_s=0.02)
    folder = tmp_path / "run"
    answered = run_and_kill(write_recipe(tmp_path, url), folder, kills=5, most_answers=40)
    assert len(set(answered)) > 3  # they came in different places
    assert items(folder) == items(clean[0])
    for name in RECIPE["domains"]:
        file = f"data/{name}.train.jsonl"
        assert (folder / file).read_text() == (clean[0] / file).read_text()
    # What was under way at a kill is asked again, and what failed; nothing else.
    in_book = len(rows(folder, "calls", "key")) + len(rows(folder, "unread", "key"))
    asked = len(httpx.get(f"{url}/asked").json())
    assert asked - in_book < 0.1 * asked + 8 * len(answered) + 30


@pytest.mark.slow
def test_three_thousand_instructions_with_faults_and_kills(serve, tmp_path):
    """At the paper's proportions: 100, 100 and 110 of 310."""
    domains = {
        "text": {"meta_topics": 6, "sub_topics": 33, "instructions": 968, "several_turns": 0.1},
        "code": {"meta_topics": 4, "sub_topics": 12, "instructions": 968},
        "math": {"meta_topics": 4, "sub_topics": 8, "instructions": 1064},
    }
    settings = {"domains": domains, "endpoint": {"concurrency": 32}}
    (tmp_path / "clean").mkdir()
    start = time.monotonic()
    run(write_recipe(tmp_path / "clean", serve(), **settings), tmp_path / "clean" / "run")
    clean_s = time.monotonic() - start
    url = serve(faults=0.2, latency_s=0.02)
    answered = run_and_kill(
        write_recipe(tmp_path, url, **settings), tmp_path / "run", kills=10, most_answers=700
    )
    made = items(tmp_path / "run")
    assert made == items(tmp_path / "clean" / "run")
    calls, unread = (rows(tmp_path / "run", table, "key") for table in ("calls", "unread"))
    assert len({row[0] for row in calls}) == len(calls)
    print(
        f"{len(made)} items, {sum(row[0] == 'responses' for row in made)} conversations, {len(calls)} calls, "
        f"{len(unread)} answers unread, {len(httpx.get(f'{url}/asked').json())} requests, "
        f"kills after {answered} calls, {clean_s:.0f} s without faults, {time.monotonic() - start:.0f} s in all"
    )


def count_calls(folder):
    try:
        with sqlite3.connect(f"file:{folder / 'book.sqlite'}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT COUNT(*) FROM calls").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def test_a_run_that_is_done_asks_nothing(clean, serve, tmp_path):
    url = serve(faults=1.0)
    before = items(clean[0])
    run(write_recipe(tmp_path, url), clean[0])
    assert items(clean[0]) == before
    assert httpx.get(f"{url}/asked").json() == []


def test_another_recipe_is_refused_by_name(clean, tmp_path):
    domains = {**RECIPE["domains"], "text": {**RECIPE["domains"]["text"], "instructions": 41}}
    path = write_recipe(tmp_path, "http://127.0.0.1:9", domains=domains, heldout=0.2)
    with pytest.raises(UltrafuserError, match=r"another recipe: domains\.text, heldout changed"):
        Pipeline(read_synthesis_recipe(path), clean[0])


def test_two_runs_do_not_share_a_folder(tmp_path):
    recipe = read_synthesis_recipe(write_recipe(tmp_path, "http://127.0.0.1:9"))
    first = Pipeline(recipe, tmp_path / "run")
    with pytest.raises(UltrafuserError, match="another run is writing"):
        Pipeline(recipe, tmp_path / "run")
    first.close()
    Pipeline(recipe, tmp_path / "run").close()


@pytest.mark.parametrize(
    ("budget", "message"), [({"tokens": 3000}, r"budget\.tokens"), ({"money": 0.004}, r"budget\.money")]
)
def test_it_stops_within_the_budget_and_goes_on_with_another(clean, serve, tmp_path, budget, message):
    url = serve()
    with pytest.raises(BudgetError, match=message):
        run(write_recipe(tmp_path, url, budget=budget), tmp_path / "run")
    spent = [row[4:6] for row in rows(tmp_path / "run", "spending", "stage")]
    assert 0 < sum(map(sum, spent)) <= budget.get("tokens", 10**9)
    assert sum(read + 2 * written for read, written in spent) / 1e6 <= budget.get("money", 10**9)
    run(write_recipe(tmp_path, url), tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])


ASK = Endpoint.ask


async def refuse(self, question, model):
    raise UnansweredError("no such setting")


def refuse_after(count):
    """An endpoint that answers so many questions, and then nobody any more."""
    answered = 0

    async def ask(self, question, model):
        nonlocal answered
        answered += 1
        return await (refuse if answered > count else ASK)(self, question, model)

    return ask


def test_a_stage_that_was_never_asked_may_have_another_model(clean, serve, tmp_path, monkeypatch):
    path = write_recipe(tmp_path, serve())
    with monkeypatch.context() as patch:
        patch.setattr(STAGES[-1], "plan", lambda *_: (_ for _ in ()).throw(UltrafuserError("enough")))
        with pytest.raises(UltrafuserError, match="enough"):
            run(path, tmp_path / "run")
    path = write_recipe(tmp_path, serve(), stages={"meta_topics": {"max_tokens": 99}})
    with pytest.raises(UltrafuserError, match="another recipe: model of meta_topics changed"):
        Pipeline(read_synthesis_recipe(path), tmp_path / "run")
    path = write_recipe(tmp_path, serve(), stages={"responses": {"max_tokens": 99}})
    run(path, tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])
    with pytest.raises(UltrafuserError, match="another recipe: model of responses changed"):
        Pipeline(read_synthesis_recipe(write_recipe(tmp_path, "http://127.0.0.1:9")), tmp_path / "run")


def test_reasons_are_such_that_a_file_can_hold_them(tmp_path):
    book = Book.open(tmp_path, {})
    book.receive("responses/text/0/0", "responses", "m", Reply("text", "stop", 1, 1, 0.0))
    reply = book.unchecked("responses/text/0/0")
    book.record("responses/text/0/0", "responses", "m", 0, reply, "half a character: \ud83d")
    assert book.problems("responses/text/0/0") == ["half a character: ?"]
    book.give_up("responses/text/0/0", "responses", "m", 1, "\ud83d")
    assert book.reason("responses/text/0/0") == "?"
    book.close()


def test_who_waits_for_room_in_a_budget_may_do_so_in_every_run():
    account = Account(Budget(tokens=30))
    call = Call("responses/text/0/0", [{"role": "user", "content": "hello"}], None)
    model = ModelSettings(model="m", max_tokens=20)

    async def both():
        async def one():
            await account.room(call, model)
            with account.promise(call, model):
                await asyncio.sleep(0.01)

        await asyncio.gather(one(), one(), one())

    for _ in range(2):
        asyncio.run(asyncio.wait_for(both(), 10))


def test_the_same_pipeline_goes_on_as_a_new_one_would(clean, serve, tmp_path, monkeypatch):
    pipeline = Pipeline(read_synthesis_recipe(write_recipe(tmp_path, serve())), tmp_path / "run")
    for count in (10, 20, 30):
        with monkeypatch.context() as patch:
            patch.setattr(Endpoint, "ask", refuse_after(count))
            with pytest.raises(EndpointError):
                pipeline.run()
    pipeline.run()
    pipeline.close()
    assert items(tmp_path / "run") == items(clean[0])


def test_what_lost_attempts_may_have_cost_is_in_the_account(clean, serve, tmp_path, monkeypatch):
    lost = []

    async def losing(self, question, model):
        reply = await ASK(self, question, model)
        if question.schema is None:
            lost.append(2)
            return replace(reply, lost=2)
        return reply

    monkeypatch.setattr(Endpoint, "ask", losing)
    run(write_recipe(tmp_path, serve()), tmp_path / "run")
    written = sum(row[5] for row in rows(tmp_path / "run", "spending", "stage"))
    assert written - sum(row[5] for row in rows(clean[0], "spending", "stage")) == 512 * sum(lost)


def test_as_many_topics_as_are_wanted_take_as_many_rounds_as_they_need(serve, tmp_path):
    wanted = {"meta_topics": 70, "sub_topics": 70, "instructions": 2}
    more = {"description": "more", "meta_topics": ["all"], "sub_topics": 50, "instructions": 1}
    path = write_recipe(tmp_path, serve(), domains={"text": wanted, "more": more}, rounds=1)
    run(path, tmp_path / "run")
    made = [(stage, domain) for stage, domain, *_ in items(tmp_path / "run")]
    assert [made.count((stage, "text")) for stage in ("meta_topics", "sub_topics", "complicated")] == [
        70,
        70,
        2,
    ]
    assert [made.count((stage, "more")) for stage in ("meta_topics", "sub_topics", "complicated")] == [
        1,
        50,
        1,
    ]


def test_how_json_was_asked_for_is_kept_only_where_it_was_found_out(serve, tmp_path):
    def noted(folder):
        names = {name for name, _ in rows(folder, "settings", "name")}
        return any(name.startswith(".structured at") for name in names)

    one = {"domains": {"text": {"meta_topics": 1, "sub_topics": 1, "instructions": 1}}}
    run(write_recipe(tmp_path, serve(), **one, endpoint={"structured": "none"}), tmp_path / "set")
    run(write_recipe(tmp_path, serve(), **one), tmp_path / "found")
    assert (noted(tmp_path / "set"), noted(tmp_path / "found")) == (False, True)


def test_what_is_paid_for_is_kept_before_it_is_looked_at(clean, serve, tmp_path, monkeypatch):
    url = serve()
    path, checked = write_recipe(tmp_path, url), []

    def fail(self, call, text):
        checked.append(call.key)
        if len(checked) == 30:
            raise UltrafuserError("the sandbox broke")

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[-1], "problem", fail)
        with pytest.raises(UltrafuserError, match="the sandbox broke"):
            run(path, tmp_path / "run")
    assert rows(tmp_path / "run", "unchecked", "key")
    run(path, tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])
    assert not rows(tmp_path / "run", "unchecked", "key")
    assert len(httpx.get(f"{url}/asked").json()) == len(rows(tmp_path / "run", "calls", "key"))
    assert rows(tmp_path / "run", "spending", "stage") == rows(clean[0], "spending", "stage")


def test_a_budget_of_little_more_than_one_request_is_used_up(clean, serve, tmp_path):
    needed = sum(row[4] + row[5] for row in rows(clean[0], "spending", "stage"))
    path = write_recipe(tmp_path, serve(latency_s=0.01), budget={"tokens": needed + 1000})  # 8 x 512 at once
    run(path, tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])


def test_a_server_that_is_gone_ends_the_run_in_words(tmp_path):
    path = write_recipe(tmp_path, "http://127.0.0.1:9", endpoint={"attempts": 2})
    with pytest.raises(EndpointError, match=r"http://127.* has failed .*2 times.*nothing is lost"):
        run(path, tmp_path / "run")


def test_an_unfinished_run_is_not_exported(tmp_path):
    pipeline = Pipeline(read_synthesis_recipe(write_recipe(tmp_path, "http://127.0.0.1:9")), tmp_path / "run")
    with pytest.raises(UltrafuserError, match="Finish the run first"):
        export(pipeline.tools, tmp_path / "run")
    pipeline.close()


def test_stages_read_what_those_before_them_make():
    made = set()
    for stage in STAGES:
        assert set(stage.reads) <= made
        made.add(stage.name)
