"""Questions that get no answer: is it the question, or is it the endpoint?

From here that cannot be told, so the recipe says how many questions may stay unanswered. What was refused, or failed as
often as it may, is asked once more at the end of its round. What is not answered then either is given up if that is no
more than the recipe allows; otherwise the run ends and none of it is given up, so that the next run asks it again.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import NamedTuple

from ultrafuser.synthesis.book import Book
from ultrafuser.synthesis.endpoint import EndpointError
from ultrafuser.synthesis.stages import Call, Stage

_IN_A_ROW = 10
"""Unanswered questions with no answer between them, after which it is time to ask whether anybody is there."""
_MOST_BEYOND = 100
"""Unanswered questions beyond those allowed, after which the rest of a round need not be waited for."""
_UNREADABLE = 10
"""Questions without a readable answer that end a run, if no answer of their stage and domain was ever readable."""


class Unanswered(NamedTuple):
    """A question without an answer, or without one that can be read."""

    domain: str
    call: Call
    reason: str


class Refusals:
    """Those of one round of a stage.

    Args:
        stage: that asks.
        number: of the round.
        expected: domain -> questions of a round, at most.
        most: share of questions that may stay unanswered, 0 to 1.
        book: that holds answers.
        find_out: asks what nobody could refuse, and raises an error if that is not answered.
    """

    def __init__(
        self,
        stage: Stage,
        number: int,
        expected: Mapping[str, float],
        most: float,
        book: Book,
        find_out: Callable[[], Awaitable[None]],
    ) -> None:
        self._stage, self._number, self._expected, self._most = stage, number, expected, most
        self._book, self._find_out = book, find_out
        self._refused: list[Unanswered] = []
        self._unreadable: list[Unanswered] = []
        self._num_refused: Counter[str] = Counter()  # by domain
        self._num_unreadable: Counter[str] = Counter()
        self._in_a_row = 0
        self._finding_out = asyncio.Lock()

    def answered(self) -> None:
        """A question was answered."""
        self._in_a_row = 0

    async def refused(self, questions: Iterable[Unanswered]) -> None:
        """Questions were not answered.

        Raises:
            EndpointError: so many are not that the round cannot end well, or the endpoint answers nobody.
            BudgetError: there is nothing left to find that out with.
        """
        for one in questions:
            self._refused.append(one)
            self._num_refused[one.domain] += 1
            self._in_a_row += 1
            if self._num_refused[one.domain] > self._allowed(self._expected[one.domain]) + _MOST_BEYOND:
                raise self._too_many(one.domain, "before its round was over")
        async with self._finding_out:  # once is enough for all who wait
            if self._in_a_row >= _IN_A_ROW:
                await self._find_out()
                self._in_a_row = 0

    def unreadable(self, question: Unanswered) -> None:
        """A question was answered as often as it may be, and no answer could be read.

        Raises:
            EndpointError: it is the tenth, and none of the stage in its domain was ever readable.
        """
        self._unreadable.append(question)
        domain = question.domain
        self._num_unreadable[domain] += 1
        if self._num_unreadable[domain] == _UNREADABLE and not self._book.num_answered(
            self._stage.name, domain
        ):
            self._book.forget_unread(self._stage.name, domain)
            raise EndpointError(
                f"no answer of the stage {self._stage.name} in {domain} can be read ({_UNREADABLE} questions, each "
                f"asked as often as readings allows), at last: {question.reason}. Mend the server, or what the "
                "recipe says of the stage's model, and run the same command again: they are asked anew."
            )

    def once_more(self) -> list[Unanswered]:
        """What was refused, and has to be asked again; it is refused no longer."""
        again, self._refused = self._refused, []
        self._num_refused.clear()
        return again

    async def given_up(self) -> list[Unanswered]:
        """What stays without an answer, at the end of the round.

        Raises:
            EndpointError: more than may be was refused, or the endpoint answers nobody any more.
            BudgetError: there is nothing left to find that out with.
        """
        if self._refused:
            await self._find_out()
        for domain, num_refused in self._num_refused.items():
            if self._most == 1:
                continue
            alike: Iterable[int | None] = (None,)  # rounds of such questions
            if self._stage.rounds_differ:
                alike = range(self._number % 2, self._number + 1, 2)
            answered = [self._book.num_answered(self._stage.name, domain, number) for number in alike]
            if not any(answered):
                raise self._too_many(domain, "and none was answered")
            total = answered[-1] + num_refused
            if num_refused > self._allowed(total):
                raise self._too_many(domain, f"of {total}")
        return [*self._refused, *self._unreadable]

    def _allowed(self, total: float) -> int:
        return math.ceil(round(self._most * total, 6))

    def _too_many(self, domain: str, how: str) -> EndpointError:
        reason = next(one.reason for one in reversed(self._refused) if one.domain == domain)
        return EndpointError(
            f"{self._num_refused[domain]} questions of the stage {self._stage.name} in {domain} were refused or "
            f"failed, {how}, at last: {reason}. The recipe allows fewer (unanswered: {self._most:g}). Mend the server, "
            "or what the recipe says of it or of the stage's model, and run the same command again: they are asked "
            "again, nothing is lost. Where they are refused for what they say, set unanswered higher, up to 1."
        )
