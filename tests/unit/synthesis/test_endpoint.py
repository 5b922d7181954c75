"""Asking an endpoint: how many at once, and what becomes of refusals."""

import asyncio
import json
import math
import time

import httpx2
import pytest
from test_pipeline import serve  # noqa: F401 (a fixture)

from ultrafuser.errors import RecipeError
from ultrafuser.synthesis.endpoint import Endpoint, EndpointError, Limiter, Question, UnansweredError
from ultrafuser.synthesis.recipe import EndpointSettings, ModelSettings

MODEL = ModelSettings(model="m", max_tokens=10)
TEXT = Question([{"role": "user", "content": "hello"}], None, 5)
JSON = Question([{"role": "user", "content": "hello"}], {"type": "object"}, 5)
GOOD = {"choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "yes"}}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}  # fmt: skip


def ask(answers, question=TEXT, *, times=1, **settings):
    """Ask an endpoint that gives these (status, JSON or bytes, headers) in turn; the last reply, and what was sent."""
    sent = []

    def respond(request):
        sent.append(json.loads(request.content))
        status, content, *headers = answers[min(len(sent) - 1, len(answers) - 1)]
        if isinstance(content, Exception):
            raise content
        more = headers[0] if headers else {}
        if isinstance(content, bytes):
            return httpx2.Response(
                status, content=content, headers={"content-type": "application/json", **more}
            )
        return httpx2.Response(status, json=content, headers=more)

    async def go():
        defaults = {"base_url": "http://x/v1", "api_key_variable": None, "attempts": 4}
        endpoint = Endpoint(EndpointSettings(**{**defaults, **settings}))
        transport = httpx2.MockTransport(respond)
        endpoint._client._client._transport = transport
        endpoint._client._client._mounts = {}
        async with endpoint:
            for _ in range(times - 1):
                await endpoint.ask(question, MODEL)
            return await endpoint.ask(question, MODEL), endpoint

    reply, endpoint = asyncio.run(go())
    return reply, sent, endpoint


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("ultrafuser.synthesis.endpoint._FIRST_PAUSE_S", 0.001)


def test_a_reply_and_what_is_asked():
    reply, sent, _ = ask([(200, GOOD)])
    assert (reply.text, reply.finish, reply.input_tokens, reply.output_tokens) == ("yes", "stop", 3, 2)
    assert sent[0]["seed"] == 5
    assert sent[0]["max_tokens"] == 10
    assert "response_format" not in sent[0]
    assert "seed" not in ask([(200, GOOD)], seeds=False)[1][0]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"error": {"message": "slow"}}, {"retry-after": "0.01"}),
        (500, {"error": {"message": "oh"}}),
        (503, b"<html>"),
        (200, b'{"id": '),
        (200, {"choices": []}),
        (200, b"x" * (2**24 + 1)),
        (200, httpx2.ConnectError("refused")),
        (200, httpx2.ReadTimeout("slow")),
    ],
)
def test_what_fails_is_asked_again(failure):
    reply, sent, _ = ask([failure, failure, (200, GOOD)])
    assert reply.text == "yes"
    assert len(sent) == 3
    assert sent[0] == sent[2]


def test_it_gives_up_in_words():
    with pytest.raises(UnansweredError, match="failed at it 4 times, at last with InternalServerError"):
        ask([(500, {"error": {"message": "oh"}})])


@pytest.mark.parametrize(
    "failure", [(429, {"error": {"message": "slow"}}), (200, httpx2.ConnectError("nobody there"))]
)
def test_what_is_not_about_one_request_ends_the_run(failure):
    with pytest.raises(EndpointError, match="has failed 4 times"):
        ask([failure])


@pytest.mark.parametrize(
    ("status", "about"), [(401, "key"), (402, "money"), (404, "model or address"), (405, "address")]
)
def test_a_wrong_key_or_model_ends_the_run_at_once(status, about):
    with pytest.raises(EndpointError, match=rf"refuses everything \({status}, {about}\): .*no such thing"):
        ask([(status, {"error": {"message": "no such thing"}}), (200, GOOD)])


@pytest.mark.parametrize("status", [403, 413, 451])
def test_one_request_may_be_refused_at_once_for_what_is_in_it(status):
    with pytest.raises(UnansweredError, match=r"refuses it: .*not that"):
        ask([(status, {"error": {"message": "not that"}}), (200, GOOD)])


def test_one_bad_request_does_not():
    refused = (400, {"error": {"message": "content"}})
    with pytest.raises(UnansweredError, match="refuses it"):
        ask([refused])
    reply, sent, _ = ask([refused, refused, (200, GOOD)])  # a server that was being started
    assert (reply.text, len(sent)) == ("yes", 3)


def test_attempts_that_may_have_to_be_paid_are_counted():
    lost = [(200, httpx2.ReadTimeout("slow")), (200, b'{"id": '), (200, httpx2.ReadError("cut"))]
    free = [(500, {}), (429, {}), (200, httpx2.ConnectError("refused")), (400, {})]
    assert ask([*lost, *free, (200, GOOD)], attempts=9)[0].lost == 3
    with pytest.raises(UnansweredError) as error:
        ask([(200, b"{")])
    assert error.value.lost == 4


def test_texts_are_such_that_files_can_hold_them():
    def said(content, **usage):
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
        return json.dumps({"choices": [choice], **usage}).encode()

    assert ask([(200, said("cut \ud83d"))])[0].text == "cut \ufffd"
    assert ask([(200, said("whole \ud83d\ude00"))])[0].text == "whole 😀"
    assert ask([(200, said([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))])[0].text == "ab"
    assert ask([(200, said(None))])[0].text == ""
    with pytest.raises(UnansweredError, match="another form"):
        ask([(200, said(5))])
    reply = ask([(200, said("x" * 41))])[0]  # nobody has counted
    assert (reply.input_tokens, reply.output_tokens) == (2, 11)
    reply = ask([(200, said("x", usage={"prompt_tokens": 10**30, "completion_tokens": -4}))])[0]
    assert (reply.input_tokens, reply.output_tokens) == (2**40, 0)
    usage = {"prompt_tokens": math.inf, "completion_tokens": "many"}
    reply = ask([(200, said("x" * 9, usage=usage))])[0]  # nonsense: as if nobody had counted
    assert (reply.input_tokens, reply.output_tokens) == (2, 3)
    assert ask([(200, said("\u6771\u4eac" * 10))])[0].output_tokens == 15  # signs of three bytes


def test_json_is_asked_for_as_far_as_the_server_knows_it():
    refused = (400, {"error": {"message": "response_format is not supported"}})
    assert ask([(200, GOOD)], JSON)[1][0]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    good = (200, GOOD)
    _, sent, endpoint = ask([refused, good] * 3 + [good], JSON, times=4)
    assert [body["response_format"]["type"] for body in sent[:2]] == ["json_schema", "json_object"]
    assert [body["response_format"]["type"] for body in sent[6:]] == ["json_object"]
    assert endpoint.structured == "json_object"
    _, sent, endpoint = ask([refused, refused, good] * 3 + [good], JSON, times=4)
    assert "response_format" not in sent[2]
    assert "response_format" not in sent[9]
    assert endpoint.structured == "none"
    # Here and there one that was refused for something else.
    _, sent, endpoint = ask([refused, good, refused, good, good] * 3, JSON, times=9)
    assert endpoint.structured == "json_schema"
    with pytest.raises(UnansweredError):
        ask([refused], JSON, structured="json_schema")
    # Falling back is no attempt, and a question that is refused in every form says nothing about forms.
    assert ask([refused, refused, (200, GOOD)], JSON, attempts=1)[0].text == "yes"
    _, sent, endpoint = ask([*[refused] * 3, (200, GOOD)], JSON)
    assert sent[3]["response_format"]["type"] == "json_schema"
    assert endpoint.structured == "json_schema"


def test_what_was_noted_is_where_it_begins_and_what_is_set_wins():
    def structured(noted, **settings):
        return Endpoint(EndpointSettings(api_key_variable=None, **settings), noted).structured

    assert structured(None) == "json_schema"
    assert structured("json_object") == "json_object"
    assert structured("json_schema", structured="none") == "none"


def test_nothing_new_is_asked_once_it_is_stopped():
    async def story():
        limiter = Limiter(1)
        async with limiter.slot():
            waiting = asyncio.ensure_future(limiter.slot(2).__aenter__())
            await asyncio.sleep(0)
            limiter.stop("enough")
            with pytest.raises(EndpointError, match="enough") as stopped:
                await waiting
            assert stopped.value.lost == 2  # attempts before, which may have to be paid
        with pytest.raises(EndpointError, match="enough") as refused:
            async with limiter.slot(3):
                pass
        assert refused.value.lost == 3

    asyncio.run(story())


def test_a_key_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RecipeError, match="MY_KEY"):
        Endpoint(EndpointSettings(api_key_variable="MY_KEY"))


def test_the_limiter_halves_and_grows_again():
    limiter = Limiter(16)
    assert limiter.limit == 16
    start = time.monotonic()
    limiter.refused(0, start)
    assert limiter.limit == 8
    limiter.refused(0, start - 1)  # sent before that: the server has not seen the change
    assert limiter.limit == 8
    limiter.refused(0, time.monotonic())
    assert limiter.limit == 4
    for _ in range(200):
        limiter.succeeded()
    assert limiter.limit == 16


def test_no_more_run_than_may_and_all_get_their_turn():
    async def go():
        limiter, running, most, done = Limiter(5), 0, 0, 0

        async def one(number):
            nonlocal running, most, done
            async with limiter.slot():
                running += 1
                most = max(most, running)
                await asyncio.sleep(0.001)
                running -= 1
                done += 1
                if number == 10:
                    limiter.refused(0, time.monotonic())

        tasks = [asyncio.create_task(one(number)) for number in range(100)]
        await asyncio.sleep(0.002)
        for task in tasks[40:45]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return most, done

    assert asyncio.run(go()) == (5, 95)


def test_a_refusal_makes_everybody_wait():
    async def go():
        limiter = Limiter(4)
        limiter.refused(0.2, time.monotonic())
        start = time.monotonic()
        async with limiter.slot():
            return time.monotonic() - start

    assert asyncio.run(go()) > 0.15


def test_requests_run_side_by_side(serve):  # noqa: F811
    url = serve(latency_s=0.2)

    async def go():
        settings = EndpointSettings(base_url=f"{url}/v1", api_key_variable=None, concurrency=20)
        async with Endpoint(settings) as endpoint:
            start = time.monotonic()
            await asyncio.gather(*(endpoint.ask(TEXT, MODEL) for _ in range(40)))
            return time.monotonic() - start

    assert asyncio.run(go()) < 4  # one after the other takes eight seconds
