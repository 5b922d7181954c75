"""Questions that got no answer: is it the question, or does the endpoint answer nobody?

Giving a question up is final, so it has to be sure. One that was not answered is asked again, and after each time the
endpoint must have answered another one of its stage and domain: where none was since, those that it answered before are
asked once more. As long as it has answered none, a question that nobody could refuse has to do; so where more than a
few are refused, and more than were answered, it is not the questions' fault, and the run ends.
"""

import asyncio
import json
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from ultrafuser.synthesis.book import Book, Reply
from ultrafuser.synthesis.budget import Account, most_tokens
from ultrafuser.synthesis.endpoint import EndpointError, Question, UnansweredError
from ultrafuser.synthesis.recipe import ModelSettings, StageName
from ultrafuser.synthesis.stages import Call

_SIMPLE = [
    {"role": "user", "content": "Answer with one word, any. If you can answer in JSON only, with any."}
]
_MOST_KNOWN = 4
"""Answered questions that are asked again, until one of them is answered: each may be refused by chance."""
_FEW = 10
"""Questions of a stage and domain that end a run when they are refused, if no more were answered."""
_MOST_HELD = 1000
"""Refused questions that wait for answers to others, before the end of a round is not waited for either."""

_Form = tuple[str, bool]
"""Domain, and whether JSON is wanted."""


class Asked(NamedTuple):
    """A call and what it asked, with the seed that was answered: another one's answer may be refused."""

    call: Call
    question: Question


class _Held(NamedTuple):
    """A question that was refused twice."""

    domain: str
    call: Call
    question: Question
    asked_s: float
    reason: str
    give_up: Callable[[], None]


class Refusals:
    """What is known of them in one stage, from one start of a run on.

    Args:
        stage: of the calls.
        rounds_differ: whether its rounds ask for different things, so that answers of one say nothing about another.
        model: who answers.
        ask: waits for an answer as long as may be.
        book: that holds answers.
        account: that pays.
    """

    def __init__(
        self,
        stage: StageName,
        rounds_differ: bool,
        model: ModelSettings,
        ask: Callable[[Question, ModelSettings], Awaitable[Reply]],
        book: Book,
        account: Account,
    ) -> None:
        self._stage, self._rounds_differ, self._model, self._ask = stage, rounds_differ, model, ask
        self._book, self._account = book, account
        self._doubted: set[str] = set()
        self._held: list[_Held] = []
        self._num_held: Counter[str] = Counter()  # by domain
        # By domain and whether JSON is wanted: what was answered, and when what was answered last was asked.
        self._known: defaultdict[_Form, deque[Asked]] = defaultdict(lambda: deque(maxlen=_MOST_KNOWN))
        self._answers_s: defaultdict[_Form, float] = defaultdict(lambda: -math.inf)
        # By domain: calls that were answered, and those that never will be; the latter in this round.
        self._counts: dict[str, list[int]] = {}
        self._given_up: dict[str, int] = {}
        self._number = 0
        self._asking = asyncio.Lock()

    def begin_round(self, number: int) -> None:
        """Count from a round on."""
        self._number = number
        self._given_up.clear()
        if self._rounds_differ:
            self._known.clear()
            self._counts.clear()

    def answered(self, domain: str, asked: Asked, asked_s: float, *, is_first: bool) -> None:
        """A question of the stage was answered.

        Args:
            domain: of it.
            asked: the call and its question.
            asked_s: when, by the monotonic clock; minus infinity where nobody knows.
            is_first: whether it is the first answer to the call.
        """
        self._counts_of(domain)[0] += is_first
        form = _form(domain, asked.question)
        if not self._known[form]:
            question = asked.question
            self._book.note(self._name(form), json.dumps([asked.call.key, question.messages, question.seed]))
            self._answers_s[form] = -math.inf  # of a simple question it says nothing any more
        self._known[form].append(asked)
        self._answers_s[form] = max(self._answers_s[form], asked_s)
        if self._num_held[domain] and self._may_be_the_questions_fault(domain):
            self._give_up(domain)

    async def unanswered(
        self,
        domain: str,
        call: Call,
        question: Question,
        asked_s: float,
        reason: str,
        give_up: Callable[[], None],
    ) -> bool:
        """A question of the stage was not answered.

        Args:
            domain: of it.
            call: that asked.
            question: that.
            asked_s: when, for the last time.
            reason: why there is no answer.
            give_up: called when that is final; then the call is over.

        Returns:
            Whether it has to be asked again.

        Raises:
            EndpointError: the endpoint answers nobody, or nothing but simple questions, or nothing any more.
            BudgetError: there is no money left to find out.
        """
        if call.key not in self._doubted:
            self._doubted.add(call.key)
            await self._make_sure(domain, call, question, asked_s)
            return True
        self._held.append(_Held(domain, call, question, asked_s, reason, give_up))
        self._num_held[domain] += 1
        if self._num_held[domain] >= _MOST_HELD and not self._may_be_the_questions_fault(domain):
            raise EndpointError(self._nothing_but_simple(domain, reason))
        return False

    async def end_round(self) -> None:
        """Give up what was refused for good.

        Raises:
            EndpointError: the endpoint answers nobody, or refuses more of a domain than it has answered.
        """
        for domain in dict.fromkeys(one.domain for one in self._held):
            held = [one for one in self._held if one.domain == domain]
            if not self._may_be_the_questions_fault(domain):
                raise EndpointError(self._nothing_but_simple(domain, held[-1].reason))
            for one in held:
                await self._make_sure(domain, one.call, one.question, one.asked_s)
            self._give_up(domain)

    def _may_be_the_questions_fault(self, domain: str) -> bool:
        """Whether few questions of a domain are refused, or no more than were answered.

        A topic that is refused is asked for in every round, so that refusals of all rounds together say nothing.
        """
        answered, refused = self._counts_of(domain)
        if answered:
            refused = self._given_up[domain]
        return self._num_held[domain] + refused < max(_FEW, answered + 1)

    def _counts_of(self, domain: str) -> list[int]:
        if domain not in self._counts:
            # Where rounds differ, every other one is of the same kind.
            rounds = range(self._number % 2, self._number + 1, 2) if self._rounds_differ else (None,)
            counts = [self._book.num_calls(self._stage, domain, number) for number in rounds]
            self._counts[domain] = [sum(column) for column in zip(*counts, strict=True)]
        if domain not in self._given_up:
            self._given_up[domain] = self._book.num_calls(self._stage, domain, self._number)[1]
        return self._counts[domain]

    def _give_up(self, domain: str) -> None:
        """Give up those of a domain that were refused while others were answered."""
        held, self._held = self._held, []
        for one in held:
            if one.domain == domain and self._answers_s[_form(domain, one.question)] > one.asked_s:
                one.give_up()
                self._num_held[domain] -= 1
                self._counts_of(domain)[1] += 1
                self._given_up[domain] += 1
            else:
                self._held.append(one)

    async def _make_sure(self, domain: str, call: Call, question: Question, since_s: float) -> None:
        """See to it that the endpoint has answered another question of a domain and form that was asked since then."""
        form = _form(domain, question)
        async with self._asking:  # one is enough for all who wait
            known = self._others(form, call, question)
            for asked in known or [
                Asked(Call(call.key, _SIMPLE, call.kind), Question(_SIMPLE, question.schema, 1))
            ]:
                if self._answers_s[form] > since_s:
                    return
                error = await self._ask_again(form, asked)
            if error is None or self._answers_s[form] > since_s:  # others may have been answered meanwhile
                return
            what = "not even the simplest question is answered"
            if known:
                what = "what was answered before is not answered any more"
            raise EndpointError(
                f"{what} (stage {self._stage}, {domain}): {error}. Mend the server, or what the recipe says of it or "
                "of the stage's model, and run the same command again; nothing is lost."
            ) from error

    async def _ask_again(self, form: _Form, asked: Asked) -> UnansweredError | None:
        """Ask what was answered before; the error if it is not answered now."""
        call, question = asked
        await self._account.room(call, self._model)
        with self._account.promise(call, self._model):
            try:
                reply = await self._ask(question, self._model)
            except (UnansweredError, EndpointError) as error:
                self.spend(call, 0, 0, error.lost)
                if isinstance(error, EndpointError):
                    raise
                return error
        self.spend(call, reply.input_tokens, reply.output_tokens, reply.lost)
        self._answers_s[form] = max(self._answers_s[form], time.monotonic() - reply.seconds)
        return None

    def _others(self, form: _Form, call: Call, question: Question) -> list[Asked]:
        """Questions of a form that were answered, the last ones first; one that the book has after a restart."""
        known = [asked for asked in reversed(self._known[form]) if asked.call.key != call.key]
        if known or (noted := self._book.noted(self._name(form))) is None:
            return known
        key, messages, seed = json.loads(noted)
        if key == call.key:
            return []
        return [Asked(Call(key, messages, call.kind), Question(messages, question.schema, seed))]

    def _name(self, form: _Form) -> str:
        """Under which the book has a question that was answered."""
        domain, wants_json = form
        of_round = f"/{self._number}" if self._rounds_differ else ""
        return f"answered {self._stage}/{domain}{of_round}{', JSON' if wants_json else ''}"

    def spend(self, call: Call, input_tokens: int, output_tokens: int, lost: int) -> None:
        """Write down what was paid for other things than answers, and what may have to be paid for lost attempts."""
        most_read, most_written = most_tokens(call, self._model)
        read, written = input_tokens + lost * most_read, output_tokens + lost * most_written
        if read or written:
            self._book.spend(self._stage, self._model.model, read, written)
            self._account.spend(self._model, read, written)

    def _nothing_but_simple(self, domain: str, reason: str) -> str:
        return (
            f"the endpoint answers simple questions, but refuses more of the stage {self._stage} in {domain} than it "
            f"has answered ({self._num_held[domain]} now), at last: {reason}. Mend the server, or what the recipe "
            "says of it or of the stage's model, and run the same command again; nothing is lost."
        )


def _form(domain: str, question: Question) -> _Form:
    return domain, question.schema is not None
