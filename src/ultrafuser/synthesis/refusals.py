"""Questions that get no answer: is it the question, or is it the endpoint?

From here that cannot be told, so the recipe says how many questions may stay unanswered. What was refused, or failed as
often as it may, is asked once more at the end of its round. What is not answered then either is given up if that is no
more than the recipe allows; otherwise the run ends and none of it is given up, so that the next run asks it again.

Answers that cannot be read are another thing: checks are there to find some. They end a run only where a stage has
nothing else, or mostly.
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
"""Unanswered questions beyond twice those allowed, after which the rest of a round need not be waited for."""
_UNREADABLE = 30
"""Questions without a readable answer that say something about the others of a round."""


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
        expected: domain -> questions of the stage, about.
        most: share of questions that may stay unanswered, 0 to 1; with 1 nothing but silence ends a run.
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
            enough = 2 * self._allowed(self._expected[one.domain]) + _MOST_BEYOND
            if self._most < 1 and self._num_refused[one.domain] > enough:
                raise self._too_many(one.domain, "before the round was over")
        async with self._finding_out:  # once is enough for all who wait
            if self._in_a_row >= _IN_A_ROW:
                await self._find_out()
                self._in_a_row = 0

    def unreadable(self, question: Unanswered) -> None:
        """A question was answered as often as it may be, and no answer could be read.

        Raises:
            EndpointError: that is so of many, and of all that the stage has asked in its domain.
        """
        self._unreadable.append(question)
        domain = question.domain
        self._num_unreadable[domain] += 1
        if self._num_unreadable[domain] == _UNREADABLE and not self._num_answered(domain):
            self._end_if_unreadable(domain)

    def once_more(self) -> list[Unanswered]:
        """What was refused, and has to be asked again; it is refused no longer."""
        again, self._refused = self._refused, []
        self._num_refused.clear()
        return again

    async def given_up(self) -> list[Unanswered]:
        """What stays without an answer, at the end of the round.

        Raises:
            EndpointError: more than may be was refused, or can be read by nobody, or the endpoint answers nobody.
            BudgetError: there is nothing left to find that out with.
        """
        if self._refused:
            await self._find_out()
        if self._most < 1:
            for domain in self._num_refused:
                self._end_if_refused(domain)
            for domain in self._num_unreadable:
                self._end_if_unreadable(domain)
        return [*self._refused, *self._unreadable]

    def _end_if_refused(self, domain: str) -> None:
        stage, number, num_refused = self._stage, self._number, self._num_refused[domain]
        # Rounds of the same kind: responses and what a person says next take turns.
        kind: Iterable[int | None] = range(number % 2, number + 1, 2) if stage.rounds_differ else (None,)
        answered = [self._num_answered(domain, one) for one in kind]
        if not any(answered):
            raise self._too_many(domain, "and none was answered")
        total = answered[-1] + num_refused + self._num_unreadable[domain]
        if num_refused > self._allowed(total):
            raise self._too_many(domain, f"of {total}")
        if not stage.rounds_differ and not self._num_answered(domain, number):
            # It would be as in this round in all that follow, which ask for what is missing.
            wanted = stage.wanted(domain)
            missing = wanted - self._book.count(stage.name, domain)
            if missing > self._allowed(wanted):
                raise self._too_many(
                    domain, f"all of round {number + 1}, and {missing} of {wanted} are missing"
                )

    def _end_if_unreadable(self, domain: str) -> None:
        num_unreadable, answered = self._num_unreadable[domain], self._num_answered(domain)
        total = num_unreadable + self._num_answered(domain, self._number)
        is_most = num_unreadable >= _UNREADABLE and 2 * num_unreadable > total
        if self._most == 1 or (answered and not is_most):
            return
        self._book.read_on(self._stage.name, domain)
        reason = next(one.reason for one in reversed(self._unreadable) if one.domain == domain)
        raise EndpointError(
            f"{num_unreadable} questions of the stage {self._stage.name} in {domain}, of {total}, got no answer that "
            f"can be read, though asked as often as readings allows, at last: {reason}. {self._advice} Set unanswered "
            "to 1 to go on without them."
        )

    def _num_answered(self, domain: str, number: int | None = None) -> int:
        return self._book.num_answered(self._stage.name, domain, number)

    def _allowed(self, total: float) -> int:
        return math.ceil(round(self._most * total, 6))

    def _too_many(self, domain: str, how: str) -> EndpointError:
        reason = next(one.reason for one in reversed(self._refused) if one.domain == domain)
        return EndpointError(
            f"refused or failed: {self._num_refused[domain]} questions of the stage {self._stage.name} in {domain}, "
            f"{how}, at last: {reason}. The recipe allows fewer (unanswered: {self._most:g}). {self._advice} Where "
            "they are refused for what they say, set unanswered higher; with 1 all may be."
        )

    @property
    def _advice(self) -> str:
        return (
            f"Mend the server, or what the recipe says of it (or of the model of {self._stage.name}, as long as "
            "nothing of that stage is answered), and run the same command again: they are asked again, nothing is lost."
        )
