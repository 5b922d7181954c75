"""Questions that get no answer: is it the question, or is it the endpoint?

From here that cannot be told, so the recipe says how many questions may stay unanswered. What was refused, or failed as
often as it may, is asked once more at the end of its round. What is not answered then either is given up if that is no
more than the recipe allows; otherwise the run ends and none of it is given up, so that the next run asks it again.

Answers that cannot be read are another thing: checks are there to find some. They end a run where nothing of their kind
can be read, or less than half of a round, or where later rounds bring nothing else and much is missing.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ultrafuser.synthesis.book import Book
from ultrafuser.synthesis.endpoint import EndpointError
from ultrafuser.synthesis.stages import Call, Stage

_IN_A_ROW = 10
"""Unanswered questions with no answer between them, after which it is time to ask whether anybody is there."""
_MOST_BEYOND = 100
"""Unanswered questions beyond twice those allowed, after which the rest of a round need not be waited for."""
_UNREADABLE_ALONE = 30
"""Questions without a readable answer, and none with one, after which the rest of a round need not be waited for."""
_UNREADABLE_MOSTLY = 10
"""Questions without a readable answer that are too many where fewer have one: in a first round, or one of responses."""


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
        self._in_a_row, self._is_over = 0, False
        self._finding_out = asyncio.Lock()

    def answered(self) -> None:
        """A question was answered."""
        self._in_a_row = 0

    async def refused(self, questions: Iterable[Unanswered]) -> None:
        """Questions were not answered.

        Raises:
            EndpointError: so many are not that the rest need not be asked, or the endpoint answers nobody.
            BudgetError: there is nothing left to find that out with.
        """
        for one in questions:
            self._refused.append(one)
            self._num_refused[one.domain] += 1
            self._in_a_row += 1
            enough = 2 * self._allowed(self._expected[one.domain]) + _MOST_BEYOND
            if self._most < 1 and self._num_refused[one.domain] > enough:
                raise self._end([(one.domain, "before the round was over")])
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
        if (
            self._most < 1
            and self._num_unreadable[domain] == _UNREADABLE_ALONE
            and not self._num_answered(domain)
        ):
            raise self._end([(domain, "before the round was over")])

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
            domains = {**self._num_refused, **self._num_unreadable}
            problems = [(domain, how) for domain in domains if (how := self._problem(domain)) is not None]
            if problems:
                raise self._end(problems)
        return [*self._refused, *self._unreadable]

    def _problem(self, domain: str) -> str | None:
        """Why a domain's questions without an answer are too many to be given up."""
        stage, number = self._stage, self._number
        refused, unreadable = self._num_refused[domain], self._num_unreadable[domain]
        # Rounds of the same kind: responses and what a person says next take turns.
        kind: Iterable[int | None] = range(number % 2, number + 1, 2) if stage.rounds_differ else (None,)
        answered = [self._num_answered(domain, one) for one in kind]
        if not any(answered):
            return "and no answer can be used"
        if refused > self._allowed(answered[-1] + refused + unreadable):
            return f"of {answered[-1] + refused + unreadable}"
        lost, in_round = refused + unreadable, self._num_answered(domain, number)
        if stage.rounds_differ and not in_round and unreadable > self._allowed(lost):
            return f"of {lost}"
        if (
            (stage.rounds_differ or not number)
            and unreadable >= _UNREADABLE_MOSTLY
            and unreadable > refused + in_round
        ):
            return f"of {lost + in_round}"
        if number and not stage.rounds_differ and lost > in_round:
            # Rounds ask for what is missing, so again for what is lost: what will be missing has to be little.
            wanted, expected = stage.wanted(domain), max(self._expected[domain], 1)
            each = math.ceil(wanted / expected)
            missing = wanted - self._book.count(stage.name, domain) - in_round * each
            if missing > max(self._allowed(expected), 1) * each:
                return f"of {lost + in_round} in round {number + 1}, and {missing} of {wanted} are missing"
        return None

    def _end(self, problems: Sequence[tuple[str, str]]) -> EndpointError:
        """The error that ends a run; what could not be read may be read as often again by the next one."""
        if not self._is_over:
            for domain in self._num_unreadable:
                self._book.read_on(self._stage.name, domain)
        self._is_over, told = True, []
        for domain, how in problems:
            refused, unreadable = (
                [one for one in some if one.domain == domain] for some in (self._refused, self._unreadable)
            )
            reason = max(refused, unreadable, key=len)[-1].reason
            told.append(f"{len(refused) + len(unreadable)} of {domain}, {how} (at last: {reason})")
        stage = self._stage.name
        return EndpointError(
            f"questions of the stage {stage} were refused, have failed, or got no answer that can be used: "
            f"{'; '.join(told)}. That is too many (unanswered: {self._most:g}). Mend the server, or what the recipe "
            f"says of it (or of the model of {stage}, as long as nothing of that stage is answered), and run the same "
            "command again: they are asked again, nothing is lost. If it is the questions' own fault, set unanswered "
            "higher where they are refused; with 1 all may be without an answer that can be used."
        )

    def _num_answered(self, domain: str, number: int | None = None) -> int:
        return self._book.num_answered(self._stage.name, domain, number)

    def _allowed(self, total: float) -> int:
        return math.ceil(round(self._most * total, 6))
