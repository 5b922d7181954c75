"""The native server: OpenAI's endpoints over one fused model."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser.decoding.engine import FusedDecoder, TokenStep
from ultrafuser.errors import ConversationTooLongError, UltrafuserError
from ultrafuser.modeling.assembly import FusedModel
from ultrafuser.serving.metrics import ServerMetrics
from ultrafuser.serving.protocol import (
    ChatRequest,
    ChatResponse,
    Choice,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    ModelsResponse,
    error_body,
    usage,
)
from ultrafuser.serving.worker import Answer, BusyError, ClosingError, DecodingWorker, Wanted

_STATUS: dict[type[Exception], int] = {BusyError: 429, ClosingError: 503}
_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, 503: {"model": ErrorResponse}}
_GONE = 499  # nginx's: the client has left; nobody reads it
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """How a server behaves.

    Attributes:
        name: of the model, as clients call it.
        max_waiting: requests that may wait for a slot of the decoder; more are refused with status 429.
        max_new_tokens: tokens of a response at most, whatever a request asks for; None leaves it to the context.
        max_body_bytes: of a request; more is refused with status 413.
        api_key: what clients have to bring as a bearer token; None asks for nothing.
        cors_origins: web pages of other origins that may ask.
        hosts: names under which it may be asked (a page of somebody else's could have its own name lead here); None
            for any.
        colours: of the specialists, in order, for the page at `/`, as `#rrggbb`; None for a server without a page.
        write_timeout_s: a stream ends whose client has taken nothing for so many seconds, once all buffers on the way
            are full. Its connection ends where the listening socket says so, as that of `ultrafuser serve` does.
    """

    name: str
    max_waiting: int = 64
    max_new_tokens: int | None = None
    max_body_bytes: int = 2**20
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] | None = None
    colours: tuple[str, ...] | None = None
    write_timeout_s: float = 60.0


def create_app(fused: FusedModel, decoder: FusedDecoder, settings: ServerSettings) -> FastAPI:
    """The server as an ASGI application, which owns the decoder from now on.

    Args:
        fused: model and tokenizer.
        decoder: over them.
        settings: how it behaves.
    """
    service = _Service(fused, decoder, settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.worker.close)

    # The usual pages of documentation load scripts from elsewhere.
    app = FastAPI(title="UltraFuser", lifespan=lifespan, docs_url=None, redoc_url=None)
    protected = [Depends(service.authorise)]
    if settings.api_key is not None:
        protected.append(Depends(HTTPBearer(auto_error=False)))  # that it is asked for, in the description

    def described(answer: type[BaseModel], kind: str = "application/json") -> dict[str, Any]:
        """What the API's description says of responses: they are made by hand, and not validated."""
        good = {"model": answer, "content": {kind: {}}}
        return {"dependencies": protected, "responses": {200: good, **_ERRORS}}

    app.get("/v1/models", **described(ModelsResponse))(service.models)
    app.post("/v1/chat/completions", **described(ChatResponse, "text/event-stream"))(service.chat)
    app.post("/v1/completions", **described(CompletionResponse, "text/event-stream"))(service.complete)
    if settings.colours is not None:
        app.get("/", include_in_schema=False)(_Page().show)
    app.get("/health", responses={503: {"model": ErrorResponse}})(service.health)
    app.get("/metrics", response_class=PlainTextResponse)(service.show_metrics)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(UltrafuserError, _mistaken)

    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(f"{type(error).__name__}: {error}", "server_error"), 500)

    app.add_exception_handler(Exception, failed)
    app.add_middleware(_Guard, settings=settings, metrics=service.metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


class _NoModelError(HTTPException):
    """Another model is asked for than there is."""


class _Page:
    """The page for people: one static file, in which nothing runs but the script that it comes with."""

    def __init__(self) -> None:
        self._text = (resources.files("ultrafuser.serving") / "page.html").read_text(encoding="utf-8")
        rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'"]
        rules += ["form-action 'none'", "frame-ancestors 'none'"]
        for kind in ("style", "script"):
            (block,) = re.findall(f"<{kind}>(.*?)</{kind}>", self._text, re.DOTALL)
            digest = base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()
            rules.append(f"{kind}-src 'sha256-{digest}'")
        self._headers = {
            "content-security-policy": "; ".join(rules),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
            "cache-control": "no-cache",
        }

    async def show(self) -> Response:
        """Give the page; it asks for the API key itself, where there is one."""
        return HTMLResponse(self._text, headers=self._headers)


@dataclass
class _Job:
    """A request that is being answered: its choices, and where their tokens come from."""

    head: dict[str, Any]
    choices: list[Choice]
    answers: list[Answer]
    prompt_tokens: int
    arrived_s: float
    places: int
    is_gated: bool
    has_begun: bool = False


class _Service:
    """The endpoints, and what they share."""

    def __init__(self, fused: FusedModel, decoder: FusedDecoder, settings: ServerSettings) -> None:
        self._fused, self._settings = fused, settings
        self._encoder = fused.model.conversation_encoder(fused.tokenizer)
        self._encoding = asyncio.Lock()
        self._started = int(time.time())
        self.worker = DecodingWorker(decoder, settings.max_waiting)
        self.metrics = ServerMetrics(fused.model.specialist_names, lambda: self.worker.num_requests)

    async def authorise(self, request: Request) -> None:
        """Let in who brings the key, if there is one."""
        key = self._settings.api_key
        if key is None:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), key.encode()):
            raise HTTPException(
                401,
                "The API key is missing or wrong. Send it as: Authorization: Bearer KEY",
                {"www-authenticate": "Bearer"},
            )

    async def health(self) -> dict[str, str]:
        """Say that the server is there, and decodes."""
        if not self.worker.is_alive:
            raise HTTPException(503, "Decoding has stopped. Start the server again.")
        return {"status": "ok"}

    async def show_metrics(self) -> Response:
        """Say what was counted."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self) -> dict[str, Any]:
        """The one model, and its specialists."""
        model = {
            "id": self._settings.name,
            "object": "model",
            "created": self._started,
            "owned_by": "ultrafuser",
            "specialists": list(self._fused.model.specialist_names),
        }
        if self._settings.colours is not None:
            model["colours"] = list(self._settings.colours)
        return {"object": "list", "data": [model]}

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        messages = [message.plain() for message in body.messages]
        limits = [limit for limit in self._fused.model.bank.context_lengths if limit is not None]
        if len(messages) > min(limits, default=len(messages)):  # before all of it is written out
            raise ConversationTooLongError(
                f"{len(messages)} messages are more than the {min(limits)} tokens that a specialist reads. Shorten it."
            )
        encode = [lambda: self._encoder.prompt(messages, max_new_tokens=0)]
        return await self._answer(body, encode, request, "chat.completion")

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Go on with a text."""
        num = self._fused.model.num_specialists
        encode = [
            partial(lambda prompt: [self._token_ids(prompt)] * num, prompt) for prompt in body.prompts()
        ]
        return await self._answer(body, encode, request, "text_completion")

    def _token_ids(self, prompt: str | list[int]) -> list[int]:
        return self._fused.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt

    async def _answer(
        self,
        body: ChatRequest | CompletionRequest,
        encode: Sequence[Callable[[], Sequence[Sequence[int]]]],
        request: Request,
        kind: str,
    ) -> Response:
        """Respond to prompts, each of which is encoded once there is room for its responses."""
        arrived_s = time.perf_counter()
        if body.model != self._settings.name:
            raise _NoModelError(404, f"There is no model {body.model!r} here, but {self._settings.name!r}.")
        places = body.n * len(encode)
        self.worker.reserve(places)
        try:
            async with self._encoding:  # one at a time, and not in the way of those who stream
                prompts = [await asyncio.to_thread(one) for one in encode]
            job = await self._submit(body, prompts, kind, arrived_s)
        except BaseException:
            self.worker.release(places)
            raise
        if body.stream:
            options = body.stream_options
            content = self._stream(job, options is not None and options.include_usage)
            return _Stream(content, lambda: self._end(job), self._settings.write_timeout_s)
        collecting = asyncio.ensure_future(self._collected(job))
        leaving = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                return Response(status_code=_GONE)
            return Response(collecting.result(), media_type="application/json")
        finally:
            collecting.cancel()
            leaving.cancel()
            self._end(job)

    def _end(self, job: _Job) -> None:
        """Let go of a request, however it ended."""
        for answer in job.answers:
            self.worker.forget(answer)
        self.worker.release(job.places)

    async def _submit(
        self,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[Sequence[int]]],
        kind: str,
        arrived_s: float,
    ) -> _Job:
        """Hand in every choice of every prompt, or none."""
        chat, names = isinstance(body, ChatRequest), self._fused.model.specialist_names
        seed = secrets.randbits(32)
        wanted: list[Wanted] = []
        for prompt in prompts:
            limit = self._limit(body.limit, body.default_limit, prompt)
            for number in range(body.n):
                wanted.append((prompt, body.params(limit, seed, number, body.num_logprobs), body.specialist))
        answers = await self.worker.submit(wanted)
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": kind,
            "created": int(time.time()),
            "model": self._settings.name,
        }
        choices = [Choice(index, chat, names, self._fused.tokenizer) for index in range(len(answers))]
        num_read = sum(len(prompt[0]) for prompt in prompts)
        self.metrics.read(num_read)
        return _Job(
            head, choices, answers, num_read, arrived_s, places=len(answers), is_gated=body.specialist is None
        )

    def _limit(self, asked: int | None, default: int | None, prompts: Sequence[Sequence[int]]) -> int:
        """Tokens at most: what is asked for, or the default as far as contexts and server leave room for it."""
        most = self._settings.max_new_tokens
        if asked is not None:
            if most is not None and asked > most:
                raise UltrafuserError(f"max_tokens must be at most {most} on this server, got {asked}.")
            return asked
        limits = self._fused.model.bank.context_lengths
        room = [limit - len(ids) for limit, ids in zip(limits, prompts, strict=True) if limit is not None]
        room += [limit for limit in (most, default) if limit is not None]
        return max(min(room, default=512), 1)

    async def _parts(self, job: _Job) -> AsyncGenerator[tuple[Choice, list[TokenStep]]]:
        """Tokens of all choices as they come."""
        parts: asyncio.Queue[tuple[Choice, list[TokenStep]] | Exception | None] = asyncio.Queue()

        async def pump(choice: Choice, answer: Answer) -> None:
            try:
                async for steps in answer:
                    parts.put_nowait((choice, steps))
            except Exception as error:
                parts.put_nowait(error)
            parts.put_nowait(None)

        pumps = [asyncio.ensure_future(pump(*pair)) for pair in zip(job.choices, job.answers, strict=True)]
        try:
            left = len(pumps)
            while left:
                part = await parts.get()
                if isinstance(part, Exception):
                    raise part
                if part is None:
                    left -= 1
                    continue
                if not job.has_begun:
                    job.has_begun = True
                    self.metrics.began(time.perf_counter() - job.arrived_s)
                self.metrics.said(part[1], gated=job.is_gated)
                yield part
        finally:
            for task in pumps:
                task.cancel()

    async def _collected(self, job: _Job) -> bytes:
        """The whole response."""
        steps: dict[int, list[TokenStep]] = {index: [] for index in range(len(job.choices))}
        async with contextlib.aclosing(self._parts(job)) as parts:
            async for choice, some in parts:
                steps[job.choices.index(choice)] += some

        def write() -> bytes:
            choices = [choice.part(steps[index], is_delta=False) for index, choice in enumerate(job.choices)]
            return _json({**job.head, "choices": choices, "usage": usage(job.prompt_tokens, job.choices)})

        return await asyncio.to_thread(write)  # log-probabilities of many choices are a lot of text

    async def _stream(self, job: _Job, include_usage: bool) -> AsyncGenerator[bytes]:
        """The response in pieces, as server-sent events."""
        suffix = ".chunk" if job.head["object"] == "chat.completion" else ""
        head = {**job.head, "object": job.head["object"] + suffix}
        rest = {"usage": None} if include_usage else {}
        try:
            async with contextlib.aclosing(self._parts(job)) as parts:
                async for choice, steps in parts:
                    yield _event({**head, "choices": [choice.part(steps, is_delta=True)], **rest})
            for choice in job.choices:
                if not choice.steps:  # no token was allowed
                    yield _event({**head, "choices": [choice.part([], is_delta=True)], **rest})
            if include_usage:
                yield _event({**head, "choices": [], "usage": usage(job.prompt_tokens, job.choices)})
        except Exception as error:  # the status is long sent: this is the only place left to say it
            yield _event(error_body(f"{type(error).__name__}: {error}", "server_error"))
        yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """A streaming response that ends its request however it ends itself, even before it has begun.

    Args:
        content: of the response.
        end: ends the request.
        write_timeout_s: for the client to take what is sent.
    """

    def __init__(
        self, content: AsyncGenerator[bytes], end: Callable[[], None], write_timeout_s: float
    ) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._content = content
        self._end, self._write_timeout_s = end, write_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._write_timeout_s):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            _log.warning("a client has taken nothing for %g s: its stream is ended", self._write_timeout_s)
        except ClientDisconnect:
            pass
        finally:
            self._end()
            await self._content.aclose()  # left to the garbage collector, its tasks would outlive it


class _Guard:
    """Refuses foreign hosts and large bodies, and counts responses."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics) -> None:
        self._app, self._max, self._metrics = app, settings.max_body_bytes, metrics
        self._hosts = settings.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        name = re.sub(r":\d+$", "", host).lower()
        if self._hosts is not None and name not in self._hosts:
            message = (
                f"This server does not answer as {name!r}, but as {', '.join(self._hosts)} (--allowed-host)."
            )
            self._metrics.responded(403)
            await JSONResponse(error_body(message, "invalid_request_error"), 403)(scope, receive, send)
            return
        num_bytes = 0

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max:
                raise HTTPException(413, f"A request may have at most {self._max:,} bytes.")
            return message

        has_begun = False

        async def counted_send(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._metrics.responded(message["status"])
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        except Exception:
            if not has_begun:  # what is said then comes from beyond all middleware
                self._metrics.responded(500)
            raise


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + _json(content) + b"\n\n"


async def _malformed(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        message = f"not JSON: {first['ctx']['error']} (character {first['loc'][-1]})"
        return JSONResponse(error_body(message, "invalid_request_error"), 400)
    # Where several types are allowed, the path names the one that complains.
    place = ".".join(str(part) for part in first["loc"] if part != "body" and "[" not in str(part))
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return JSONResponse(error_body(message, "invalid_request_error", place if place else None), 400)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = {401: "authentication_error", 503: "server_error"}.get(error.status_code, "invalid_request_error")
    code = "model_not_found" if isinstance(error, _NoModelError) else None
    code = "invalid_api_key" if error.status_code == 401 else code
    return JSONResponse(error_body(error.detail, kind, code=code), error.status_code, headers=error.headers)


async def _mistaken(_: Request, error: Exception) -> Response:
    status = _STATUS.get(type(error), 400)
    kind = {400: "invalid_request_error", 429: "rate_limit_error"}.get(status, "server_error")
    headers = {"retry-after": "1"} if status != 400 else None
    code = "context_length_exceeded" if isinstance(error, ConversationTooLongError) else None
    return JSONResponse(error_body(str(error), kind, code=code), status, headers=headers)
