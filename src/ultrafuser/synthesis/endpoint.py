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
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx2
import openai

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.book import Reply
from ultrafuser.synthesis.recipe import EndpointSettings, ModelSettings

MAX_BODY_BYTES = 2**24
"""Of a response; a longer one is cut off, and counts as failed."""
CHARACTERS_PER_TOKEN = 4.0
"""Where a server does not count tokens."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 60.0
_REFUSALS = 3
"""Times that a request has to be refused: a server that is being started may refuse what it will answer later."""
STRUCTURED = ("json_schema", "json_object", "none")
"""Ways of asking for JSON, the strictest first."""


class EndpointError(UltrafuserError):
    """The endpoint cannot be used, or has stopped answering; what was answered is in the book."""


class RefusedError(UltrafuserError):
    """The endpoint will never answer this one request."""


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
    async def slot(self) -> AsyncIterator[None]:
        """Wait until one more may run, and count it as long as the block lasts.

        Raises:
            EndpointError: nothing is to be asked any more.
        """
        if self._reason is not None:
            raise EndpointError(self._reason)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._wake()
        try:
            await turn
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
        structured: how JSON is asked for; a weaker way once that was accepted where a stricter one was refused.
    """

    def __init__(self, settings: EndpointSettings, structured: str | None = None) -> None:
        self._settings = settings
        self.limiter = Limiter(settings.concurrency)
        self._may_fall_back = settings.structured == "auto"
        first = STRUCTURED[0] if structured is None else structured
        self.structured = first if self._may_fall_back else settings.structured
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
        """Get an answer, whatever it takes.

        Args:
            question: that.
            model: who answers.

        Raises:
            EndpointError: the endpoint does not know the model or the key, or has failed too often.
            RefusedError: it refuses this request for good.
        """
        pause_s, structured = _FIRST_PAUSE_S, self.structured
        attempts = refusals = 0
        while True:
            async with self.limiter.slot():
                started_s = time.monotonic()
                try:
                    reply = await asyncio.wait_for(
                        self._request(question, model, structured), self._settings.timeout_s
                    )
                    self.limiter.succeeded()
                    if STRUCTURED.index(structured) > STRUCTURED.index(self.structured):
                        self.structured = structured
                    return reply
                except (
                    openai.AuthenticationError,
                    openai.PermissionDeniedError,
                    openai.NotFoundError,
                ) as error:
                    raise EndpointError(f"{self._settings.base_url} refuses: {_said(error)}") from error
                except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                    if question.schema is not None and self._may_fall_back and structured != STRUCTURED[-1]:
                        structured = STRUCTURED[STRUCTURED.index(structured) + 1]
                        continue
                    failure: Exception = error
                    structured = self.structured  # it was not that
                    refusals += 1
                    if refusals >= _REFUSALS or attempts + 1 >= self._settings.attempts:
                        raise RefusedError(f"the endpoint refuses the request: {_said(error)}") from error
                except openai.RateLimitError as error:
                    failure = error
                    self.limiter.refused(_asked_pause_s(error), started_s)
                except (openai.APIError, httpx2.HTTPError, TimeoutError, ValueError) as error:
                    failure = error
            attempts += 1
            if attempts >= self._settings.attempts:
                raise EndpointError(
                    f"{self._settings.base_url} has failed {attempts} times at one request, at last with "
                    f"{type(failure).__name__} ({_said(failure)}). Run the same command again when it is well; "
                    "nothing is lost."
                )
            await asyncio.sleep(pause_s * self._chance.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

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
            read = sum(len(message["content"]) for message in question.messages)
            counts = {} if usage is None else usage
            return Reply(
                text,
                str(choice.get("finish_reason")),
                _count(counts.get("prompt_tokens"), read),
                _count(counts.get("completion_tokens"), len(text)),
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


def _count(counted: Any, characters: int) -> int:
    """Tokens, as the server counts them, or about as many as there are where it does not."""
    return (
        math.ceil(characters / CHARACTERS_PER_TOKEN) if counted is None else min(max(int(counted), 0), 2**40)
    )


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


def _asked_pause_s(error: openai.RateLimitError) -> float:
    """How long the server wants to be left alone."""
    try:
        return min(max(float(error.response.headers.get("retry-after", "0")), 0.0), _LONGEST_PAUSE_S)
    except ValueError:  # a date
        return 1.0


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
