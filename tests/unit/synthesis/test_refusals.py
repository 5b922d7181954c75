"""Questions that are not answered: a few are given up, more end the run, and then nothing is lost."""

import asyncio
import json
import random
from dataclasses import replace

import pytest
from test_pipeline import ASK, RECIPE, clean, items, refuse_after, rows, run, serve, write_recipe

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.book import Book, Item, Reply
from ultrafuser.synthesis.endpoint import Endpoint, EndpointError, UnansweredError
from ultrafuser.synthesis.pipeline import STAGES, Pipeline
from ultrafuser.synthesis.recipe import read_synthesis_recipe
from ultrafuser.synthesis.refusals import Refusals, Unanswered
from ultrafuser.synthesis.stages import Call

__all__ = ["clean", "serve"]


def refuse_if(condition, reason="not that"):
    """An endpoint that does not answer some questions, but always simple ones."""

    async def ask(self, question, model):
        if not question.messages[0]["content"].startswith("Answer with one word") and condition(question):
            raise UnansweredError(reason)
        return await ASK(self, question, model)

    return ask


def asks_for(what, question):
    """Whether a question asks for a list of something in JSON."""
    return question.schema is not None and what in question.schema["properties"]


def given_up(folder):
    return [row for row in rows(folder, "calls", "key") if row[4] is None]


@pytest.mark.parametrize("concurrency", [3, 64])
def test_a_server_that_refuses_everything_ends_the_run_and_loses_nothing(
    clean, serve, tmp_path, monkeypatch, concurrency
):
    path = write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency})
    for count in (0, 1, 3, 40, 0, 60):  # refused in small rounds and in large ones, at once and after answers
        with monkeypatch.context() as patch:
            patch.setattr(Endpoint, "ask", refuse_after(count))
            with pytest.raises(
                EndpointError, match=r"not even the simplest question .*: no such setting\. Mend"
            ):
                run(path, tmp_path / "run")
        assert not given_up(tmp_path / "run")
    run(path, tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])


@pytest.mark.parametrize("concurrency", [1, 64])
@pytest.mark.parametrize("count", [20, 45])
def test_a_server_that_only_answers_simple_questions_any_more_ends_the_run(
    clean, serve, tmp_path, monkeypatch, concurrency, count
):
    """Half of a round may be answered already."""
    path = write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency})
    for _ in range(2):
        left = [None] * count
        with monkeypatch.context() as patch:
            patch.setattr(
                Endpoint, "ask", refuse_if(lambda q, left=left: q.schema is None and (not left or left.pop()))
            )
            with pytest.raises(EndpointError, match=r"of the stage responses .*not that\)\. That is"):
                run(path, tmp_path / "run")
        assert not given_up(tmp_path / "run")
    run(path, tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])


@pytest.mark.parametrize("several_turns", [0.9, 0.2])
@pytest.mark.parametrize("fails", ["refuse", "cut"])
@pytest.mark.parametrize("kind", ["what a person says next", "responses to it"])
def test_a_server_that_answers_one_kind_of_round_ends_the_run(
    serve, tmp_path, monkeypatch, kind, fails, several_turns
):
    """Answers to first questions, many, say nothing about rounds that ask for something else, or later ones."""

    def is_of_it(question):
        roles = [message["role"] for message in question.messages]
        wanted = roles == ["user"] if kind == "what a person says next" else len(roles) > 2
        return question.schema is None and wanted

    domains = {"text": {**RECIPE["domains"]["text"], "several_turns": several_turns}}
    path = write_recipe(tmp_path, serve(), domains=domains)
    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "ask", {"refuse": refuse_if, "cut": cut_if}[fails](is_of_it))
        with pytest.raises(EndpointError, match=r"of the stage responses .* of text, "):
            run(path, tmp_path / "run")
    assert not given_up(tmp_path / "run")
    for folder in ("run", "clean"):
        run(path, tmp_path / folder)
    made = items(tmp_path / "run")
    if fails == "refuse":  # otherwise seeds are other ones
        assert made == items(tmp_path / "clean")
    several = [row for row in made if row[0] == "responses" and len(json.loads(row[-1])["messages"]) > 2]
    assert len(several) == 40 * several_turns
    assert not given_up(tmp_path / "run")


def test_what_is_refused_by_chance_ends_no_run(serve, tmp_path, monkeypatch):
    chance = random.Random(0)
    monkeypatch.setattr(Endpoint, "ask", refuse_if(lambda _: chance.random() < 0.15))
    run(write_recipe(tmp_path, serve(), endpoint={"concurrency": 1}), tmp_path / "run")
    assert 0 < len(given_up(tmp_path / "run")) < 0.05 * len(rows(tmp_path / "run", "calls", "key"))


@pytest.mark.parametrize("concurrency", [1, 64])
def test_a_server_that_is_unwell_for_a_while_costs_nothing(clean, serve, tmp_path, monkeypatch, concurrency):
    """What it refused then is asked once more when everything else has been."""
    asked = []

    def is_unwell(question):
        asked.append(question)
        return question.schema is None and len([one for one in asked if one.schema is None]) in range(30, 60)

    monkeypatch.setattr(Endpoint, "ask", refuse_if(is_unwell))
    run(write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency}), tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])
    assert len(asked) == len(rows(clean[0], "calls", "key")) + 30


@pytest.mark.parametrize("every", [12, 3])
@pytest.mark.parametrize("concurrency", [1, 64])
def test_a_question_that_alone_is_refused_is_given_up(serve, tmp_path, monkeypatch, concurrency, every):
    refused = []

    def is_refused(question):
        is_it = question.schema is None and question.seed % every == 0
        if is_it:
            refused.append(question)
        return is_it

    monkeypatch.setattr(Endpoint, "ask", refuse_if(is_refused))
    recipe = write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency}, unanswered=0.9)
    run(recipe, tmp_path / "run")
    lost = given_up(tmp_path / "run")
    assert 2 * len(lost) == len(refused) > 6  # each was asked once more
    assert {row[6] for row in lost} == {"not that"}
    assert f"{len(lost)} questions were given up:" in (tmp_path / "run" / "README.md").read_text()
    removed = [json.loads(line) for line in (tmp_path / "run" / "removed.jsonl").read_text().splitlines()]
    assert {row["detail"] for row in removed if row["reason"] == "no response"} == {"not that"}
    refused.clear()
    run(recipe, tmp_path / "run")
    assert not refused


def test_more_may_be_given_up_where_the_recipe_allows_it(serve, tmp_path, monkeypatch):
    """A run that more refusals have ended goes on with a higher share, in the same folder."""
    monkeypatch.setattr(Endpoint, "ask", refuse_if(lambda q: q.schema is None and q.seed % 3 == 0))
    url = serve()
    for unanswered in (0, 0.1):
        with pytest.raises(EndpointError, match=rf"\(unanswered: {unanswered}\)"):
            run(write_recipe(tmp_path, url, unanswered=unanswered), tmp_path / "run")
        assert not given_up(tmp_path / "run")
    run(write_recipe(tmp_path, url, unanswered=0.9), tmp_path / "run")
    assert len(given_up(tmp_path / "run")) > 20


@pytest.mark.parametrize("concurrency", [1, 64])
def test_refusals_may_lie_together(serve, tmp_path, monkeypatch, concurrency):
    """A server that does not want to speak about the first topic: those are given up, all others are there."""
    refused = set()

    def is_refused(question):
        if question.schema is None and (len(refused) < 15 or question.seed in refused):
            refused.add(question.seed)
        return question.seed in refused

    monkeypatch.setattr(Endpoint, "ask", refuse_if(is_refused))
    path = write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency}, unanswered=0.6)
    run(path, tmp_path / "run")
    assert len(given_up(tmp_path / "run")) == 15
    made = [(stage, domain) for stage, domain, *_ in items(tmp_path / "run")]
    assert made.count(("responses", "code")) == 25


@pytest.mark.parametrize("stage", ["meta_topics", "responses"])
def test_a_model_that_answers_nothing_may_be_another_afterwards(serve, tmp_path, monkeypatch, stage):
    """A stage that asks for too much is not the questions' fault, and what the error advises helps."""
    url = serve()

    async def ask(self, question, model):
        if model.max_tokens == 9999:
            raise UnansweredError("max_tokens is too large")
        return await ASK(self, question, model)

    monkeypatch.setattr(Endpoint, "ask", ask)
    with pytest.raises(EndpointError, match=r"not even the simplest .*max_tokens is too large"):
        run(write_recipe(tmp_path, url, stages={stage: {"max_tokens": 9999}}), tmp_path / "run")
    run(write_recipe(tmp_path, url), tmp_path / "run")
    assert not given_up(tmp_path / "run")


def test_a_stage_without_a_readable_answer_ends_the_run_and_is_asked_anew(
    clean, serve, tmp_path, monkeypatch
):
    """Not all of it is paid for six times, and a larger max_tokens helps in the same folder."""
    url, asked = serve(), []

    async def cut(self, question, model):
        reply = await ASK(self, question, model)
        if question.schema is None and model.max_tokens < 600:
            asked.append(question)
            return replace(reply, finish="length")
        return reply

    monkeypatch.setattr(Endpoint, "ask", cut)
    for _ in range(2):
        asked.clear()
        message = r"of the stage responses .*: 30 of text, .*: raise max_tokens"
        with pytest.raises(EndpointError, match=message):
            run(write_recipe(tmp_path, url), tmp_path / "run")
        assert not given_up(tmp_path / "run")
        assert len(asked) < 300
    run(write_recipe(tmp_path, url, stages={"responses": {"max_tokens": 600}}), tmp_path / "run")
    assert items(tmp_path / "run") == items(clean[0])
    with pytest.raises(UltrafuserError, match="another recipe: model of responses changed"):
        Pipeline(read_synthesis_recipe(write_recipe(tmp_path, url)), tmp_path / "run")


def test_where_some_answers_can_be_read_the_others_are_given_up(serve, tmp_path, monkeypatch):
    """As checks of code and of final answers find them, say; however many they are."""

    async def cut(self, question, model):
        reply = await ASK(self, question, model)
        is_cut = question.schema is None and sum(question.messages[-1]["content"].encode()) % 3 == 0
        return replace(reply, finish="length") if is_cut else reply

    monkeypatch.setattr(Endpoint, "ask", cut)
    run(write_recipe(tmp_path, serve()), tmp_path / "run")
    lost = given_up(tmp_path / "run")
    assert len(lost) > 15
    assert {(row[3], row[6]) for row in lost} == {(6, "cut off: raise max_tokens")}


def cut_if(condition):
    """An endpoint some of whose answers cannot be read."""

    async def ask(self, question, model):
        reply = await ASK(self, question, model)
        return replace(reply, text="{", finish="length") if condition(question) else reply

    return ask


def test_a_domain_without_a_readable_answer_is_gone_without_where_the_recipe_says_so(
    serve, tmp_path, monkeypatch
):
    music, paid = [], []  # what the system message says for it is the same as for text, so by what is asked

    def is_cut(question):
        is_it = question.schema is None and question.messages[-1]["content"] in music
        paid.extend([question] * is_it)
        return is_it

    url, domains = serve(), {"text": RECIPE["domains"]["text"], "music": RECIPE["domains"]["music"]}
    run(write_recipe(tmp_path, url, domains=domains), tmp_path / "clean")
    music += [
        json.loads(row[-1])["messages"][0]["content"]
        for row in items(tmp_path / "clean")
        if row[:2] == ("responses", "music")
    ]
    monkeypatch.setattr(Endpoint, "ask", cut_if(is_cut))
    with pytest.raises(EndpointError, match=r"responses .*: 20 of music, and no answer .*set unanswered"):
        run(write_recipe(tmp_path, url, domains=domains), tmp_path / "run")
    assert not given_up(tmp_path / "run")
    assert len(paid) == 6 * 20
    run(write_recipe(tmp_path, url, domains=domains, unanswered=1), tmp_path / "run")
    assert {row[0].split("/")[1] for row in given_up(tmp_path / "run")} == {"music"}
    assert len(given_up(tmp_path / "run")) == 20
    assert len(paid) == 6 * 20  # nothing is asked again for it


def test_all_domains_without_an_answer_are_told_and_asked_again(clean, serve, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "ask", cut_if(lambda q: asks_for("topics", q)))
        with pytest.raises(EndpointError, match=r"meta_topics .*: 1 of text, .*; 1 of music, and no answer"):
            run(write_recipe(tmp_path, serve()), tmp_path / "run")
    run(write_recipe(tmp_path, serve()), tmp_path / "run")
    assert not given_up(tmp_path / "run")


@pytest.mark.parametrize("concurrency", [1, 8])
def test_unreadable_answers_may_come_first(clean, serve, tmp_path, monkeypatch, concurrency):
    first = {
        json.loads(row[-1])["messages"][0]["content"]
        for row in items(clean[0])
        if row[:2] == ("responses", "text") and row[2] < 12
    }
    monkeypatch.setattr(
        Endpoint, "ask", cut_if(lambda q: q.schema is None and q.messages[-1]["content"] in first)
    )
    run(write_recipe(tmp_path, serve(), endpoint={"concurrency": concurrency}), tmp_path / "run")
    assert [row[3] for row in given_up(tmp_path / "run")] == [6] * 12


@pytest.mark.parametrize("stage", ["meta_topics", "instructions"])
def test_a_stage_of_few_questions_without_a_readable_answer_ends_the_run(serve, tmp_path, monkeypatch, stage):
    """And with other seeds the next time, lest it end in the same place with the same answers."""
    seeds = []

    def is_cut(question):
        is_it = asks_for({"meta_topics": "topics"}.get(stage, stage), question)
        seeds.extend([question.seed] * is_it)
        return is_it and len(seeds) < 40

    monkeypatch.setattr(Endpoint, "ask", cut_if(is_cut))
    domains = {"text": {"meta_topics": 2, "sub_topics": 2, "instructions": 9}}
    path = write_recipe(tmp_path, serve(), domains=domains)
    ends = 0
    while seeds == [] or len(seeds) < 40:
        with pytest.raises(
            EndpointError, match=f"of the stage {stage} .* of text, and no answer can be used"
        ):
            run(path, tmp_path / "run")
        ends += 1
        if ends == 3:
            seeds += [-n for n in range(1, 41)]
    run(path, tmp_path / "run")
    assert len(seeds) == len(set(seeds))
    assert not given_up(tmp_path / "run")


def test_a_server_that_turns_to_nonsense_ends_the_run(serve, tmp_path, monkeypatch):
    """Of a round of many questions more than half cannot be read."""
    left, domains = [None] * 10, {"text": RECIPE["domains"]["text"]}
    path = write_recipe(tmp_path, serve(), domains=domains)
    run(path, tmp_path / "clean")
    with monkeypatch.context() as patch:
        patch.setattr(Endpoint, "ask", cut_if(lambda q: q.schema is None and (not left or left.pop())))
        with pytest.raises(EndpointError, match=r"responses .*: 30 of text, of 40 "):
            run(path, tmp_path / "run")
    assert not given_up(tmp_path / "run")
    run(path, tmp_path / "run")
    assert len(items(tmp_path / "run")) == len(items(tmp_path / "clean"))


def test_what_another_model_said_unreadably_does_not_count(tmp_path):
    key = "responses/text/0/0"
    book = Book.open(tmp_path, {"model of responses": "small"})
    book.receive(key, "responses", "small", Reply("text", "length", 1, 1, 0.0))
    book.record(key, "responses", "small", 0, book.unchecked(key), "cut off")
    book.close()
    for model, problems, times in (("small", ["cut off"], 1), ("small", ["cut off"], 2), ("large", [], 1)):
        book = Book.open(tmp_path, {"model of responses": model})
        assert book.problems(key) == problems
        assert book.times_to_read("responses", "text") == times
        book.read_on("responses", "text")
        book.close()


@pytest.mark.parametrize("fails", [refuse_if, cut_if])
def test_a_stage_of_one_question_a_round_without_an_answer_ends_the_run(serve, tmp_path, monkeypatch, fails):
    """One of two questions is no more than one may be, but nothing follows."""
    asked = []

    def is_refused(question):
        is_it = asks_for("topics", question)
        asked.extend([question] * is_it)
        return is_it and len(asked) > 1

    monkeypatch.setattr(Endpoint, "ask", fails(is_refused))
    domains = {"text": {"meta_topics": 90, "sub_topics": 90, "instructions": 9}}
    path = write_recipe(tmp_path, serve(), domains=domains)
    with pytest.raises(EndpointError, match=r": 1 of text, of 1 in round 2, and 60 of 90 are missing"):
        run(path, tmp_path / "run")
    assert not given_up(tmp_path / "run")


@pytest.mark.parametrize("sub_topics", [4, 7, 12])
def test_a_topic_that_is_refused_in_every_round_ends_no_run(serve, tmp_path, monkeypatch, sub_topics):
    domains = {"text": {"meta_topics": ["songs"], "sub_topics": sub_topics, "instructions": 60}}
    url = serve()
    path = write_recipe(tmp_path, url, domains=domains, rounds=4)
    run(path, tmp_path / "clean")
    topics = [json.loads(row[-1])["name"] for row in items(tmp_path / "clean") if row[0] == "sub_topics"]
    topic = next(one for one in topics if sum(one in other for other in topics) == 1)

    def is_refused(question):
        return asks_for("instructions", question) and topic in question.messages[0]["content"]

    monkeypatch.setattr(Endpoint, "ask", refuse_if(is_refused))
    run(path, tmp_path / "run")
    lost = [row[0].split("/")[2] for row in given_up(tmp_path / "run")]
    assert lost[:4] == ["0", "1", "2", "3"]
    assert len([row for row in items(tmp_path / "run") if row[0] == "responses"]) >= 50


def test_all_that_was_paid_is_in_the_book(serve, tmp_path, monkeypatch):
    """Answers, simple questions, and attempts that were lost before refusals."""
    written = [0]

    async def ask(self, question, model):
        is_simple = question.messages[0]["content"].startswith("Answer with one word")
        if question.schema is None and not is_simple and question.seed % 3 == 0:
            written[0] += 2 * model.max_tokens
            raise UnansweredError("no", lost=2)
        reply = await ASK(self, question, model)
        written[0] += reply.output_tokens + is_simple * model.max_tokens
        return replace(reply, lost=int(is_simple))

    monkeypatch.setattr(Endpoint, "ask", ask)
    run(write_recipe(tmp_path, serve(), unanswered=1), tmp_path / "run")
    assert sum(row[5] for row in rows(tmp_path / "run", "spending", "stage")) == written[0]
    assert given_up(tmp_path / "run")


@pytest.mark.parametrize("error", [UnansweredError, EndpointError])
def test_lost_attempts_of_the_simple_question_are_in_the_book(serve, tmp_path, monkeypatch, error):
    lost = [0]

    async def ask(self, question, model):
        lost[0] += 3
        if question.messages[0]["content"].startswith("Answer with one word"):
            raise error("gone", lost=3)
        raise UnansweredError("no", lost=3)

    monkeypatch.setattr(Endpoint, "ask", ask)
    with pytest.raises(EndpointError, match="gone"):
        run(write_recipe(tmp_path, serve()), tmp_path / "run")
    assert sum(row[5] for row in rows(tmp_path / "run", "spending", "stage")) == 512 * lost[0]


def questions(stage, number, count):
    calls = (Call(f"{stage}/text/{number}/{100 + place}", [], None) for place in range(count))
    return [Unanswered("text", call, "no") for call in calls]


@pytest.mark.parametrize(
    ("stage", "number", "answered", "refused", "most", "ends"),
    [
        ("sub_topics", 0, {0: 18}, 2, 0.1, False),
        ("sub_topics", 0, {0: 16}, 3, 0.1, True),
        ("sub_topics", 0, {0: 93}, 7, 0.07, False),
        ("sub_topics", 0, {0: 92}, 8, 0.07, True),  # 0.07 * 100 is more than 7 in floating-point numbers
        ("sub_topics", 0, {0: 50}, 1, 0.0, True),
        ("sub_topics", 0, {0: 50}, 0, 0.0, False),
        ("sub_topics", 0, {}, 1, 0.1, True),
        ("sub_topics", 0, {}, 4, 1.0, False),
        # Later rounds of a stage ask for what is missing, so again for what was refused.
        ("sub_topics", 3, {0: 18}, 2, 0.1, False),
        ("responses", 2, {0: 100, 1: 20, 2: 18}, 2, 0.1, False),
        ("responses", 2, {0: 100, 1: 20, 2: 10}, 3, 0.1, True),
        ("responses", 2, {0: 100, 1: 20}, 1, 0.1, False),  # the last one of its round
        ("responses", 2, {0: 100, 1: 20}, 2, 0.1, True),
        ("responses", 1, {0: 100}, 1, 0.1, True),  # of this kind none was ever answered
    ],
)
def test_how_many_may_stay_unanswered(tmp_path, monkeypatch, stage, number, answered, refused, most, ends):
    async def find_out():
        found.append(1)

    found, book = [], Book.open(tmp_path, {})
    for at, count in answered.items():
        for place in range(count):
            key = f"{stage}/text/{at}/{place}"
            book.receive(key, stage, "m", Reply("text", "stop", 1, 1, 0.0))
            book.record(key, stage, "m", 0, book.unchecked(key), None)
    for place in range(200, 230):
        book.give_up(f"{stage}/text/0/{place}", stage, "m", 0, "no")
    book.finish_round(stage, "text", 0, [Item({})] * 19, [], is_last=False)
    asking = next(one for one in STAGES if one.name == stage)(None)
    monkeypatch.setattr(asking, "wanted", lambda domain: 20)
    refusals = Refusals(asking, number, {"text": 100}, most, book, find_out)

    async def go():
        wanted = questions(stage, number, refused)
        await refusals.refused(wanted)
        assert refusals.once_more() == wanted
        assert await refusals.given_up() == []  # answered at last
        await refusals.refused(wanted)
        return await refusals.given_up() == wanted

    if ends:
        with pytest.raises(EndpointError, match=rf"stage {stage} .*: {refused} of text, .*at last: no"):
            asyncio.run(go())
    else:
        assert asyncio.run(go())
    assert bool(found) == (refused > 0)
    book.close()


@pytest.mark.parametrize(
    ("stage", "number", "answered", "unreadable", "items", "ends"),
    [
        ("sub_topics", 0, {0: 9}, 9, 0, False),
        ("sub_topics", 0, {0: 10}, 10, 0, False),
        ("sub_topics", 0, {0: 9}, 10, 0, True),
        ("sub_topics", 0, {}, 1, 0, True),
        # In later rounds it counts what will be missing of 1000: of 100 questions ten may be without an answer.
        ("sub_topics", 1, {0: 90}, 10, 900, False),
        ("sub_topics", 1, {0: 90}, 11, 890, True),
        ("sub_topics", 1, {0: 90, 1: 5}, 10, 850, False),
        ("sub_topics", 1, {0: 90, 1: 5}, 10, 840, True),
        ("sub_topics", 1, {0: 90, 1: 12}, 11, 10, False),
        ("responses", 2, {0: 100, 1: 8, 2: 0}, 8, 0, True),
        ("responses", 2, {0: 100, 1: 8, 2: 1}, 7, 0, False),
        ("responses", 2, {0: 100, 1: 30, 2: 9}, 10, 0, True),
        ("responses", 2, {0: 100, 1: 1}, 1, 0, False),  # the last one
        ("responses", 1, {0: 100}, 1, 0, True),
    ],
)
def test_how_many_may_be_unreadable(tmp_path, monkeypatch, stage, number, answered, unreadable, items, ends):
    async def find_out():
        raise AssertionError("nothing was refused")

    book = Book.open(tmp_path, {})
    for at, count in answered.items():
        for place in range(count):
            key = f"{stage}/text/{at}/{place}"
            book.receive(key, stage, "m", Reply("text", "stop", 1, 1, 0.0))
            book.record(key, stage, "m", 0, book.unchecked(key), None)
    book.finish_round(stage, "text", 0, [Item({})] * items, [], is_last=False)
    asking = next(one for one in STAGES if one.name == stage)(None)
    monkeypatch.setattr(asking, "wanted", lambda domain: 1000)
    wanted = questions(stage, number, unreadable)
    for most in (0.1, 1):
        refusals = Refusals(asking, number, {"text": 100}, most, book, find_out)
        for one in wanted:
            refusals.unreadable(one)
        if ends and most < 1:
            with pytest.raises(
                EndpointError, match=rf"stage {stage} .*: {unreadable} of text, .*at last: no"
            ):
                asyncio.run(refusals.given_up())
        else:
            assert asyncio.run(refusals.given_up()) == wanted
        assert book.times_to_read(stage, "text") == 1 + ends
    book.close()


def test_a_round_that_cannot_end_well_ends_before_all_is_asked(tmp_path):
    async def find_out():
        found.append(1)

    async def go():
        refusals = Refusals(STAGES[0](None), 0, {"text": 50, "code": 9000}, 0.1, book, find_out)
        for domain, most in (("text", 2 * 5 + 100), ("code", 2 * 900 + 100)):
            for one in questions("meta_topics", 0, most):
                await refusals.refused([one._replace(domain=domain)])
            with pytest.raises(EndpointError, match=f"meta_topics .*: {most + 1} of {domain}, before"):
                await refusals.refused([one._replace(domain=domain)])

    found, book = [], Book.open(tmp_path, {})
    asyncio.run(go())
    assert len(found) == (110 + 1900) // 10
    book.close()


def test_whether_anybody_is_there_is_asked_after_ten_in_a_row(tmp_path):
    async def find_out():
        found.append(1)
        await asyncio.sleep(0.01)

    async def go():
        refusals = Refusals(STAGES[0](None), 0, {"text": 900}, 0.1, book, find_out)
        for one in questions("meta_topics", 0, 60):
            refusals.answered()
            await refusals.refused([one])
        assert not found
        await asyncio.gather(*(refusals.refused([one]) for one in questions("meta_topics", 0, 15)))
        assert len(found) == 1  # for all at once

    found, book = [], Book.open(tmp_path, {})
    asyncio.run(go())
    book.close()
