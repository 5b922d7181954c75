"""Questions that got no answer: is it the question, or does the endpoint answer nobody?

Giving a question up is final, so it has to be sure. One that was not answered is asked again, and between both times
the endpoint must have answered something of the same form, if nothing else a question that nobody could refuse. And
where many questions of a stage are refused, some must have been answered: perhaps the stage's prompts are at fault.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ultrafuser.synthesis.book import Book, Reply
from ultrafuser.synthesis.budget import Account, most_tokens
from ultrafuser.synthesis.endpoint import EndpointError, Question, UnansweredError
from ultrafuser.synthesis.recipe import ModelSettings, StageName
from ultrafuser.synthesis.stages import Call

_SIMPLE = (
    {"role": "user", "content": "Answer with one word, any. If you can answer in JSON only, with any."},
)
_MOST_HELD = 50
"""Questions that may be refused one after the other, while only simple ones are answered."""
_MOST_BEFORE_ANY = 10
"""Questions of a stage that may be refused before any of it has ever been answered."""


class _Held(NamedTuple):
    call: Call
    reason: str
    give_up: Callable[[], None]


class Refusals:
    """What is known of them in one stage, from one start of a run on.

    Args:
        stage: of the calls.
        model: who answers.
        ask: waits for an answer as long as may be.
        book: that holds answers.
        account: that pays.
    """

    def __init__(
        self,
        stage: StageName,
        model: ModelSettings,
        ask: Callable[[Question, ModelSettings], Awaitable[Reply]],
        book: Book,
        account: Account,
    ) -> None:
        self._stage, self._model, self._ask = stage, model, ask
        self._book, self._account = book, account
        self._doubted: set[str] = set()
        self._held: list[_Held] = []
        self._answers_s = {
            True: -math.inf,
            False: -math.inf,
        }  # wants JSON? -> when what was answered was asked
        self._asking = asyncio.Lock()

    def answered(self, wants_json: bool, asked_s: float) -> None:
        """A question of the stage was answered.

        Args:
            wants_json: whether its answer had to be JSON.
            asked_s: when, by the monotonic clock; minus infinity where nobody knows.
        """
        self._answers_s[wants_json] = max(self._answers_s[wants_json], asked_s)
        self._give_up_held()

    async def unanswered(
        self, call: Call, question: Question, error: UnansweredError, give_up: Callable[[], None]
    ) -> bool:
        """A question of the stage was not answered.

        Args:
            call: that asked.
            question: that.
            error: why there is no answer.
            give_up: called when that is final; then the call is over.

        Returns:
            Whether it has to be asked again.

        Raises:
            EndpointError: the endpoint answers nobody, or nothing but simple questions.
            BudgetError: there is no money left to find out.
        """
        if call.key not in self._doubted:
            self._doubted.add(call.key)
            await self._make_sure(call, question, time.monotonic() - error.seconds)
            return True
        self._held.append(_Held(call, str(error), give_up))
        if len(self._held) >= _MOST_HELD:
            raise EndpointError(self._nothing_but_simple())
        return False

    def end_round(self) -> None:
        """Give up what was refused for good.

        Raises:
            EndpointError: many questions of the stage were refused, and none has ever been answered.
        """
        if self._held and not self._book.is_answered(self._stage):
            given_up = sum(count for stage, _, count in self._book.given_up() if stage == self._stage)
            if given_up + len(self._held) >= _MOST_BEFORE_ANY:
                raise EndpointError(self._nothing_but_simple())
        self._give_up_held()

    def _give_up_held(self) -> None:
        while self._held:
            self._held.pop(0).give_up()

    async def _make_sure(self, call: Call, question: Question, since_s: float) -> None:
        """Wait until the endpoint has answered something of this form that was asked since then."""
        wants_json = question.schema is not None
        async with self._asking:  # one is enough for all who wait
            if self._answers_s[wants_json] > since_s:
                return
            simple = Call(call.key, _SIMPLE, call.kind)
            await self._account.room(simple, self._model)
            with self._account.promise(simple, self._model):
                try:
                    reply = await self._ask(Question(_SIMPLE, question.schema, 1), self._model)
                except (UnansweredError, EndpointError) as error:
                    self.spend(simple, 0, 0, error.lost)
                    if isinstance(error, EndpointError):
                        raise
                    raise EndpointError(
                        f"not even the simplest question is answered: {error}. Mend the recipe or the "
                        "server, and run the same command again; nothing is lost."
                    ) from error
            self.spend(simple, reply.input_tokens, reply.output_tokens, reply.lost)
            self._answers_s[wants_json] = max(self._answers_s[wants_json], time.monotonic() - reply.seconds)

    def spend(self, call: Call, input_tokens: int, output_tokens: int, lost: int) -> None:
        """Write down what was paid for other things than answers, and what may have to be paid for lost attempts."""
        most_read, most_written = most_tokens(call, self._model)
        read, written = input_tokens + lost * most_read, output_tokens + lost * most_written
        if read or written:
            self._book.spend(self._stage, self._model.model, read, written)
            self._account.spend(self._model, read, written)

    def _nothing_but_simple(self) -> str:
        return (
            f"the endpoint answers simple questions, but refuses those of the stage {self._stage} one after the other "
            f"({len(self._held)}), at last: {self._held[-1].reason}. Mend the recipe, its prompts or the server, and "
            "run the same command again; nothing is lost."
        )
