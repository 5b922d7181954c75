"""Asking a chat endpoint, politely and persistently.

Requests go through the official client, whose own retries are off: how many may run at once follows what the server
bears, a refusal for the moment slows everybody down, and what fails is asked again after a while, longer each time.
"""

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

import httpx2
import openai

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.book import Reply
from ultrafuser.synthesis.recipe import EndpointSettings, ModelSettings

MAX_BODY_BYTES = 2**24
"""Of a response; a longer one is cut off, and counts as failed."""
BYTES_PER_TOKEN = 4.0
"""Of UTF-8, about, where a server does not count tokens: four English letters, one or two signs of other writings."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 60.0
_REFUSALS = 3
"""Times that a request has to be refused: a server that is being started may refuse what it will answer later."""
_WEAKER = 3
"""Requests that a weaker way of asking for JSON has to help, one after the other, before it is the way."""
_EVERYBODY = {401: "key", 402: "money", 404: "model or address", 405: "address"}
"""Statuses that every request would get, and what they are about."""
_PERHAPS = (400, 422)
"""Statuses of a request that is wrong, or whose form the server does not know."""
_ITS_OWN = (403, 413, 414, 451)
"""Statuses that one request may have deserved alone, by what is in it or by its length."""
STRUCTURED = ("json_schema", "json_object", "none")
"""Ways of asking for JSON, the strictest first."""


class _AskingError(UltrafuserError):
    """There is no answer.

    Attributes:
        lost: attempts that ended without one, but may have to be paid.
    """

    def __init__(self, message: str, *, lost: int = 0) -> None:
        super().__init__(message)
        self.lost = lost


class EndpointError(_AskingError):
    """The endpoint cannot be used, or has stopped answering; what was answered is in the book."""


class UnansweredError(_AskingError):
    """A request was refused, or has failed too often; others may well be answered."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        messages: the conversation.
        schema: JSON schema of the answer; None for text.
        seed: of the answer.
    """

    messages: Sequence[dict[str, str]]
    schema: dict[str, Any] | None
    seed: int


class Limiter:
    """How many requests may run at once: as many as allowed, halved where the server refuses, and slowly more again.

    Args:
        most: at once.
    """

    def __init__(self, most: int) -> None:
        self._most, self._limit = most, float(most)
        self._running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._not_before_s = 0.0
        self._halved_s = 0.0
        self._reason: str | None = None

    @property
    def limit(self) -> int:
        """At the moment."""
        return max(int(self._limit), 1)

    @asynccontextmanager
    async def slot(self, lost: int = 0) -> AsyncIterator[None]:
        """Wait until one more may run, and count it as long as the block lasts.

        Args:
            lost: attempts at the same request before, which have to be told of with an error.

        Raises:
            EndpointError: nothing is to be asked any more.
        """
        if self._reason is not None:
            raise EndpointError(self._reason, lost=lost)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
        except EndpointError as error:
            raise EndpointError(str(error), lost=lost) from None
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._running -= 1
                self._wake()
            raise
        try:
            while (pause_s := self._not_before_s - time.monotonic()) > 0:
                await asyncio.sleep(pause_s * random.uniform(1.0, 1.2))  # not all in the same instant
            yield
        finally:
            self._running -= 1
            self._wake()

    def stop(self, reason: str) -> None:
        """Let nothing more be asked; what runs ends as it does."""
        self._reason = reason
        for turn in self._waiting:
            if not turn.done():
                turn.set_exception(EndpointError(reason))
        self._waiting.clear()

    def succeeded(self) -> None:
        """One more may run for every round of answers."""
        self._limit = min(self._limit + 1 / self._limit, self._most)
        self._wake()

    def refused(self, pause_s: float, started_s: float) -> None:
        """The server wants less.

        Args:
            pause_s: nothing is sent for so long.
            started_s: when the request was sent: those sent before the limit was halved do not halve it again.
        """
        now = time.monotonic()
        self._not_before_s = max(self._not_before_s, now + pause_s)
        if started_s > self._halved_s:
            self._halved_s = now
            self._limit = max(self._limit / 2, 1.0)

    def _wake(self) -> None:
        """Give free slots to those who have waited longest."""
        while self._waiting and self._running < self.limit:
            turn = self._waiting.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)


class Endpoint:
    """A chat endpoint; use it as an async context manager.

    Args:
        settings: where it is, and how hard to try.
        structured: how to ask for JSON first, where the settings leave it open; one of `STRUCTURED`.

    Attributes:
        limiter: of requests at once.
        structured: how JSON is asked for; a weaker way once that helped a few requests, and the stricter one none.
    """

    def __init__(self, settings: EndpointSettings, structured: str | None = None) -> None:
        self._settings = settings
        self.limiter = Limiter(settings.concurrency)
        self._may_fall_back = settings.structured == "auto"
        first = STRUCTURED[0] if structured is None else structured
        self.structured = first if self._may_fall_back else settings.structured
        self._weaker: list[str] = []  # ways that helped, since the one above was accepted
        self._chance = random.Random()  # of pauses, which no result depends on
        limits = httpx2.Limits(
            max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency
        )
        http = openai.DefaultAioHttpClient(limits=limits, event_hooks={"response": [_cut]})
        self._client = openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=settings.api_key(),
            default_headers={
                "accept-encoding": "identity"
            },  # so that bytes that come are bytes that are kept
            max_retries=0,
            timeout=settings.timeout_s,
            http_client=http,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, question: Question, model: ModelSettings) -> Reply:
        """Get an answer.

        Args:
            question: that.
            model: who answers.

        Raises:
            EndpointError: the endpoint is not there, knows no such model or key, or never lets the request in.
            UnansweredError: it refuses this request, or has failed at it too often.
        """
        pause_s, structured = _FIRST_PAUSE_S, self.structured
        attempts = refusals = lost = 0
        while True:
            async with self.limiter.slot(lost):
                started_s = time.monotonic()
                try:
                    async with asyncio.timeout(self._settings.timeout_s):
                        reply = await self._request(question, model, structured)
                    self.limiter.succeeded()
                    if question.schema is not None:
                        self._accepted(structured)
                    return replace(reply, lost=lost)
                except openai.APIStatusError as error:
                    failure: Exception = error
                    status = error.status_code
                    if status in _EVERYBODY:
                        raise EndpointError(
                            f"{self._settings.base_url} refuses everything ({status}, {_EVERYBODY[status]}): "
                            f"{_said(error)}. Mend that, and run the same command again; nothing is lost.",
                            lost=lost,
                        ) from error
                    if status in _PERHAPS:
                        if (
                            question.schema is not None
                            and self._may_fall_back
                            and structured != STRUCTURED[-1]
                        ):
                            structured = STRUCTURED[STRUCTURED.index(structured) + 1]
                            continue
                        structured = self.structured  # it was not that
                        refusals += 1
                    if status in _ITS_OWN or refusals >= _REFUSALS:
                        raise UnansweredError(
                            f"{self._settings.base_url} refuses it: {_said(error)}", lost=lost
                        ) from error
                    if status == 429:
                        self.limiter.refused(_asked_pause_s(error), started_s)
                except (openai.APIError, httpx2.HTTPError, TimeoutError, ValueError) as error:
                    failure = error
                    lost += not _is_nobody_there(error)
            attempts += 1
            if attempts >= self._settings.attempts:
                said = f"{attempts} times, at last with {type(failure).__name__} ({_said(failure)})"
                if isinstance(failure, openai.RateLimitError) or _is_nobody_there(failure):
                    raise EndpointError(
                        f"{self._settings.base_url} has failed {said}. Run the same command again when it is well; "
                        "nothing is lost.",
                        lost=lost,
                    ) from failure
                raise UnansweredError(
                    f"{self._settings.base_url} has failed at it {said}", lost=lost
                ) from failure
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _accepted(self, structured: str) -> None:
        """Learn from a way of asking for JSON that was accepted; a stricter one may have been refused by chance."""
        if STRUCTURED.index(structured) <= STRUCTURED.index(self.structured):
            self._weaker.clear()
            return
        self._weaker.append(structured)
        if len(self._weaker) >= _WEAKER:
            self.structured = min(self._weaker, key=STRUCTURED.index)
            self._weaker.clear()

    async def _request(self, question: Question, model: ModelSettings, structured: str) -> Reply:
        more: dict[str, Any] = {"seed": question.seed} if self._settings.seeds else {}
        if question.schema is not None and structured == "json_schema":
            described = {"name": "answer", "schema": question.schema, "strict": True}
            more["response_format"] = {"type": "json_schema", "json_schema": described}
        elif question.schema is not None and structured == "json_object":
            more["response_format"] = {"type": "json_object"}
        started_s = time.monotonic()
        # The client's own `create` takes as long to check its arguments as the rest of a request takes.
        found: Any = await self._client.post(
            "/chat/completions",
            cast_to=object,
            body={
                "model": model.model,
                "messages": list(question.messages),
                "temperature": model.temperature,
                "top_p": model.top_p,
                "max_tokens": model.max_tokens,
                **more,
            },
        )
        try:
            choice, usage = found["choices"][0], found.get("usage")
            text = _text(choice["message"]["content"])
            counts = {} if usage is None else usage
            return Reply(
                text,
                str(choice.get("finish_reason")),
                _count(counts.get("prompt_tokens"), *(message["content"] for message in question.messages)),
                _count(counts.get("completion_tokens"), text),
                time.monotonic() - started_s,
            )
        except (TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"an answer of another form than a chat completion's: {error!r}") from error


def _text(content: Any) -> str:
    """Of a message: a text, or parts of one; halves of characters, which no file can hold, are replaced."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if part["type"] == "text")
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is a {type(content).__name__}")
    return "" if content is None else content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(counted: Any, *texts: str) -> int:
    """Tokens, as the server counts them, or about as many as there are where it does not."""
    if isinstance(counted, (int, float)) and math.isfinite(counted):
        return min(max(int(counted), 0), 2**40)
    return math.ceil(sum(len(text.encode(errors="replace")) for text in texts) / BYTES_PER_TOKEN)


async def _cut(response: httpx2.Response) -> None:
    """End a response that is longer than any answer could be, before it fills the memory."""
    stream = response.stream
    assert isinstance(stream, httpx2.AsyncByteStream)
    response.stream = _Cut(stream)


class _Cut(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for part in self._stream:
            num_bytes += len(part)
            if num_bytes > MAX_BODY_BYTES:
                raise httpx2.ReadError(f"the response has more than {MAX_BODY_BYTES:,} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


def _is_nobody_there(error: Exception) -> bool:
    """Whether no connection could be made: nothing was asked then."""
    return isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout))


def _asked_pause_s(error: openai.APIStatusError) -> float:
    """How long the server wants to be left alone."""
    try:
        return min(max(float(error.response.headers.get("retry-after", "0")), 0.0), _LONGEST_PAUSE_S)
    except ValueError:  # a date
        return 1.0


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
