"""One thread that decodes for everybody: requests come from an event loop, tokens go back to it.

The decoder belongs to the thread. What others want of it is put into an inbox, which is emptied between steps.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future

from ultrafuser.decoding.engine import FusedDecoder, TokenStep
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.errors import UltrafuserError

Wanted = tuple[Sequence[Sequence[int]], SamplingParams, str | None]
"""Prompts, how the response is made, and the specialist that answers alone; see `FusedDecoder.submit`."""

_log = logging.getLogger(__name__)


class BusyError(UltrafuserError):
    """As many requests are running and waiting as the server takes."""


class ClosingError(UltrafuserError):
    """The server is about to end."""


class Answer:
    """The tokens of one request, as they come; iterate over them once, in the event loop that asked.

    Args:
        worker: that decodes it.
        loop: of the caller.
    """

    def __init__(self, worker: "DecodingWorker", loop: asyncio.AbstractEventLoop) -> None:
        self._worker, self._loop = worker, loop
        self._tokens: asyncio.Queue[TokenStep | Exception | None] = asyncio.Queue()
        self.request_id = -1  # until it is accepted
        self.forgotten = False

    def put(self, item: TokenStep | Exception | None) -> None:
        """Hand over a token, an error, or None for the end; from the decoding thread."""
        # A loop that was closed meanwhile has nobody who waits.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._tokens.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[list[TokenStep]]:
        """The tokens that have come since the last look, one or several at a time; leaving early cancels.

        Raises:
            Exception: what decoding failed with.
        """
        over = False
        try:
            while not over:
                items = [await self._tokens.get()]
                while not self._tokens.empty():
                    items.append(self._tokens.get_nowait())
                over = not isinstance(items[-1], TokenStep)
                tokens = [item for item in items if isinstance(item, TokenStep)]
                if tokens:
                    yield tokens
                if isinstance(items[-1], Exception):
                    raise items[-1]
        finally:
            self._worker.forget(self)


class DecodingWorker:
    """Decodes in a thread of its own.

    Args:
        decoder: used by nobody else.
        max_waiting: requests that may wait for a slot.
    """

    def __init__(self, decoder: FusedDecoder, max_waiting: int) -> None:
        self._decoder = decoder
        self._capacity = decoder.max_batch + max_waiting
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._answers: dict[int, Answer] = {}  # of the thread
        self._num_requests = 0  # of the event loop
        self._undecided: set[Future[None]] = (
            set()
        )  # requests that are handed in, and not yet taken or refused
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def num_requests(self) -> tuple[int, int]:
        """How many are decoded, and how many have a place and wait, to be decoded or to be sent."""
        running = min(self._decoder.num_active, self._num_requests)
        return running, self._num_requests - running

    @property
    def is_alive(self) -> bool:
        """Whether there is still somebody who decodes."""
        return self._thread.is_alive()

    def reserve(self, count: int) -> None:
        """Take places for requests, before anything is done for them; in the event loop. `release` gives them back.

        Raises:
            BusyError: too many are running and waiting.
            ClosingError: the worker is closing, or has stopped.
            UltrafuserError: there will never be so many.
        """
        if self._closing or not self.is_alive:
            raise ClosingError("the server is shutting down. Ask again later.")
        if count > self._capacity:
            raise UltrafuserError(
                f"{count} responses (n for every prompt) are more than the {self._capacity} that may run and wait."
            )
        if self._num_requests + count > self._capacity:
            raise BusyError(
                f"{self._num_requests} requests are running and waiting, which is all that the server takes. Ask again."
            )
        self._num_requests += count

    def release(self, count: int) -> None:
        """Give places back; in the event loop."""
        self._num_requests -= count

    async def submit(self, wanted: Sequence[Wanted]) -> list[Answer]:
        """Hand in requests that have their places: all of them, or none.

        Raises:
            ClosingError: decoding has stopped.
            UltrafuserError: the decoder refuses one of them.
        """
        loop = asyncio.get_running_loop()
        answers = [Answer(self, loop) for _ in wanted]
        accepted: Future[None] = Future()
        self._undecided.add(accepted)
        self._inbox.put(lambda: self._accept(answers, accepted, wanted))
        try:
            # If decoding ends from here on, it finds the request among the undecided.
            if self._closing or not self.is_alive:
                raise ClosingError("decoding has stopped. Start the server again.")
            await asyncio.wrap_future(accepted)
        except BaseException:
            for answer in answers:
                self.forget(answer)
            raise
        finally:
            self._undecided.discard(accepted)
        return answers

    def forget(self, answer: Answer) -> None:
        """Let go of an answer that nobody reads any more, and cancel it if it runs; in the event loop."""
        if not answer.forgotten:
            answer.forgotten = True
            self._inbox.put(lambda: self._cancel(answer))

    def close(self) -> None:
        """Finish what runs, take nothing more, and end the thread; it blocks."""
        self._closing = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._decode()
        except BaseException:
            _log.exception("decoding has stopped; the server has to be started again")
        finally:
            self._closing = True
            error = ClosingError("decoding has stopped. Start the server again.")
            for answer in self._answers.values():
                answer.put(error)
            for accepted in list(self._undecided):
                if not accepted.done():
                    accepted.set_exception(error)

    def _decode(self) -> None:
        open_for_more = True
        while open_for_more or self._answers:
            while not self._inbox.empty() or (open_for_more and not self._answers):
                wish = self._inbox.get()
                if wish is None:
                    open_for_more = False
                else:
                    wish()
            if self._answers:
                self._step()

    def _step(self) -> None:
        try:
            found = self._decoder.step()
        except (
            Exception
        ) as error:  # whatever it is, those in the step have to hear of it, and others can be served
            failed = self._answers.keys() - set(self._decoder.waiting_ids)
            _log.exception("a decoding step failed for %d requests", len(failed))
            for request_id in failed:
                self._decoder.cancel(request_id)
                self._answers.pop(request_id).put(error)
            return
        for request_id, token in found:
            answer = self._answers[request_id]
            answer.put(token)
            if token.finish is not None:
                answer.put(None)
                del self._answers[request_id]

    def _accept(self, answers: Sequence[Answer], accepted: "Future[None]", wanted: Sequence[Wanted]) -> None:
        if not accepted.set_running_or_notify_cancel():
            return  # who asked is gone
        try:
            for answer, (prompts, params, only) in zip(answers, wanted, strict=True):
                answer.request_id = self._decoder.submit(prompts, params, only)
                if params.max_new_tokens > 0:
                    self._answers[answer.request_id] = answer
                else:
                    answer.put(None)
        except Exception as error:  # it belongs to who asked, not to this thread
            for answer in answers:
                self._cancel(answer)
            accepted.set_exception(error)
            return
        accepted.set_result(None)

    def _cancel(self, answer: Answer) -> None:
        if self._answers.pop(answer.request_id, None) is not None:
            self._decoder.cancel(answer.request_id)
