"""Exact speculation: cheap drafts of several tokens, verified by the fused model in one pass.

Accepting a drafted token x with probability min(1, r(x) / q(x)), and otherwise drawing from the positive part of
r - q, gives tokens distributed as r whatever q is (Leviathan et al. 2023, arXiv 2211.17192; r is the fused model's
distribution, q the draft's). Greedy decoding is the case of one-hot r. This module knows of drafts, acceptance and
how many tokens to draft; running models is the engine's.
"""

import math
import statistics
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from ultrafuser.decoding.sampling import Sampler
from ultrafuser.errors import UltrafuserError

DrafterKind = Literal["auto", "int8", "specialist", "lookup"]


@dataclass(frozen=True, kw_only=True)
class SpeculationParams:
    """Who drafts tokens, and how far ahead.

    Attributes:
        drafter: "int8": the specialist that the gate favoured last, in a copy with 8-bit weights (x86 CPUs; the copies
            take a byte more for every weight of every specialist, those of the base once for each adapter).
            "specialist": that specialist itself, whose states are then used again (whole specialists). "lookup":
            nobody, drafts are what the context went on with before. "auto": "int8" for float32 weights where it can
            be had, else "specialist" for whole specialists and "lookup" for adapters.
        max_draft: tokens drafted at once, at most.
        max_match: tokens at the end of the context, at most, whose earlier occurrence a look-up follows.
        min_match: tokens of it, at least.

    Raises:
        UltrafuserError: a setting is out of range.
    """

    drafter: DrafterKind = "auto"
    max_draft: int = 16
    max_match: int = 4
    min_match: int = 2

    def __post_init__(self) -> None:
        if self.drafter not in get_args(DrafterKind):
            raise UltrafuserError(
                f"speculation: drafter must be one of {', '.join(get_args(DrafterKind))}, got {self.drafter!r}."
            )
        if self.max_draft < 1 or not 1 <= self.min_match <= self.max_match:
            raise UltrafuserError(
                "speculation: max_draft must be at least 1 and min_match within 1 to max_match, "
                f"got {self.max_draft}, {self.min_match} and {self.max_match}."
            )


def accept(
    drafted: Sequence[int], draft: Tensor | None, target: Tensor, sampler: Sampler
) -> tuple[int, int | None]:
    """Which drafted tokens stand, and what comes instead of the first that does not.

    Args:
        drafted: K tokens, each drawn from its row of `draft`.
        draft: q, float32, (K, V); None for tokens that were certain (q is one-hot).
        target: r, float32, (K, V) or (K + 1, V): with one row more the token after the last drafted one is drawn, too.
        sampler: of the response; its random numbers are used.

    Returns:
        How many tokens are accepted, and the token that follows them: None when all K are and target has no row more.
    """
    for index, token in enumerate(drafted):
        r = target[index]
        q_token = 1.0 if draft is None else float(draft[index, token])
        if sampler.uniform() * q_token < float(r[token]):
            continue
        if draft is None:
            rest = r.clone()
            rest[token] = 0.0
        else:
            rest = (r - draft[index]).clamp_(min=0.0)
        # Nothing is left only where rounding tells equal distributions apart.
        return index, sampler.draw(rest if bool(rest.any()) else r)
    following = sampler.draw(target[len(drafted)]) if len(target) > len(drafted) else None
    return len(drafted), following


def accept_greedy(drafted: Sequence[int], likeliest: Sequence[int]) -> tuple[int, int | None]:
    """`accept` for greedy decoding: drafted tokens stand as long as they are the fused model's likeliest."""
    for index, (token, expected) in enumerate(zip(drafted, likeliest, strict=False)):
        if token != expected:
            return index, expected
    return len(drafted), likeliest[len(drafted)] if len(likeliest) > len(drafted) else None


class Lookup:
    """Drafts from the context: what followed the last occurrence of the tokens that the context now ends with.

    Args:
        context: the tokens so far; it must grow only through `extend`.
        params: lengths of matches and drafts.
    """

    def __init__(self, context: Sequence[int], params: SpeculationParams) -> None:
        self._params = params
        self._context: list[int] = []
        self._after: dict[
            tuple[int, ...], int
        ] = {}  # tokens -> place behind their last but current occurrence
        self.extend(context)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the context."""
        for token in tokens:
            # What the context ends with is noted only when it goes on, or a match would find itself.
            end = len(self._context)
            for length in range(self._params.min_match, self._params.max_match + 1):
                if length <= end:
                    self._after[tuple(self._context[end - length :])] = end
            self._context.append(token)

    def draft(self, num_tokens: int, ahead: Sequence[int] = ()) -> tuple[list[int], int]:
        """Tokens that may follow.

        Args:
            num_tokens: at most.
            ahead: tokens that are supposed to follow the context, and to come before the draft.

        Returns:
            The tokens, and the length of the match that they follow (0, and no tokens, where there is none).
        """
        end = [*self._context[-self._params.max_match :], *ahead]
        length = min(self._params.max_match, len(end))
        place = None
        while place is None and length >= self._params.min_match:
            place = self._after.get(tuple(end[-length:]))
            length -= 1
        if place is None or num_tokens < 1:
            return [], 0
        text = [*self._context[place : place + num_tokens], *ahead]
        while len(text) < num_tokens:  # a loop repeats itself beyond the end of what is there
            text.append(text[len(text) - (len(self._context) + len(ahead) - place)])
        return text[:num_tokens], length + 1


class DraftLength:
    """Chooses how many tokens to draft, from what steps have cost and how often drafts were accepted.

    Drafting pays as long as the tokens that it is expected to bring cost less time than plain steps would take for
    them. Where it does not, nothing is drafted; experience fades meanwhile, so that it is tried again now and then.
    Expectations may be wrong for as long as they like: an account of the time that drafting has lost, against plain
    steps of as many conversations, stops it until plain steps have made up for the loss at 2 % of their time. Machines
    slow down and recover: steps with drafts are settled against what plain ones took before and after them, and a loss
    larger than drafts cause is charged in part only; so a drafted token must cost no more than about two plain steps.
    What a draft model takes to read prompts is not counted.

    Args:
        guess: time of a step that drafts K tokens over a plain one's, until it has been measured.
        bonus: whether the pass that verifies K tokens also gives the one after them.
        max_draft: K at most.
    """

    _LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    _FIRST_ROWS = 4  # of a pass, before more are tried; then twice as many as were, or the next length
    _TRIED_AGAIN_AFTER = 64  # plain steps: what drafting cost is forgotten; any steps: what one draft cost
    _REMEMBERED = 3  # times of each kind of step
    _LOSS = 0.02  # of all time, that drafting may lose
    _MOST_SAVED = 1.0  # plain steps; what drafting has saved beyond cannot be lost again later
    _MOST_LOST = 4.0  # plain steps; what is lost beyond was the machine's fault, and is not made up for
    _MEASURED_AFTER = 24  # steps with drafts: then a plain one is timed; sooner, as long as few were
    _LEAST_GAIN = 1.1  # expected of drafting, since times of steps vary by as much

    def __init__(self, guess: Callable[[int], float], bonus: bool, max_draft: int) -> None:
        self._guess, self._bonus = guess, bonus
        self._lengths = [length for length in self._LENGTHS if length < max_draft] + [max_draft]
        self._seconds: dict[tuple[int, int], deque[float]] = {}
        self._last_seen: dict[tuple[int, int], int] = {}  # in which step
        self._num_steps = self._plain_in_a_row = 0
        self._drafted_in_a_row: Counter[int] = Counter()  # by conversations in them
        self._lost_s = 0.0
        self._unsettled: list[tuple[int, float]] = []  # (tokens, seconds) since the last plain step
        self._unsettled_of = 0  # conversations in each of them

    def observe(self, num_conversations: int, num_drafted: int, num_tokens: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            num_conversations: in it.
            num_drafted: tokens drafted for each conversation; 0: a plain step.
            num_tokens: that it gave, for all conversations together.
            seconds: that it took.
        """
        self._plain_in_a_row = 0 if num_drafted else self._plain_in_a_row + 1
        self._drafted_in_a_row[num_conversations] += 1
        if not num_drafted:
            self._drafted_in_a_row[num_conversations] = 0
        if self._plain_in_a_row > self._TRIED_AGAIN_AFTER:
            self._plain_in_a_row = 0
            self._seconds = {key: seen for key, seen in self._seconds.items() if key[1] == 0}
        if num_conversations != self._unsettled_of:
            self._settle()
            self._unsettled_of = num_conversations
        kind = num_conversations, num_drafted
        self._seconds.setdefault(kind, deque(maxlen=self._REMEMBERED)).append(seconds)
        self._num_steps += 1
        self._last_seen[kind] = self._num_steps
        self._forget()
        self._lost_s -= self._LOSS * seconds
        if (num_conversations, 0) in self._seconds:
            self._lost_s = max(self._lost_s, -self._MOST_SAVED * self._plain_s(num_conversations))
        if num_drafted:
            self._unsettled.append((num_tokens, seconds))
        elif (
            self._plain_in_a_row >= self._REMEMBERED
            or self._account_s() <= self._plain_s(num_conversations) / 2
        ):
            self._settle()

    def _forget(self) -> None:
        """Do not believe for ever in one or two times of a draft, which a hiccup may have made long."""
        before = self._num_steps - self._TRIED_AGAIN_AFTER
        for kind, seen in list(self._seconds.items()):
            if kind[1] and len(seen) < self._REMEMBERED and self._last_seen[kind] < before:
                del self._seconds[kind]

    def _settle(self) -> None:
        """Charge steps with drafts with what they took beyond plain ones for as many tokens."""
        self._lost_s = self._account_s()
        self._unsettled.clear()

    def _account_s(self) -> float:
        """What drafting has lost as far as is known by now; what it has saved, if that is negative."""
        if not self._unsettled or (self._unsettled_of, 0) not in self._seconds:
            return self._lost_s
        plain_s = self._plain_s(self._unsettled_of)
        taken_s = sum(seconds for _, seconds in self._unsettled)
        saved_s = sum(num_tokens for num_tokens, _ in self._unsettled) * plain_s / self._unsettled_of
        lost_s = self._lost_s + taken_s - saved_s
        return min(max(lost_s, -self._MOST_SAVED * plain_s), self._MOST_LOST * plain_s)

    def best(self, num_conversations: int, rates: Sequence[float]) -> int:
        """The number of tokens to draft for each conversation; 0 for none.

        Args:
            num_conversations: in the step.
            rates: of acceptance, for those conversations that have a draft.
        """
        # What others cost is measured against plain steps, the first of all and one now and then.
        num_known = len(self._seconds.get((num_conversations, 0), ()))
        most = self._MEASURED_AFTER if num_known >= self._REMEMBERED else num_known
        if self._drafted_in_a_row[num_conversations] >= most:
            return 0
        plain_s = self._plain_s(num_conversations)
        if self._account_s() > plain_s / 2:
            return 0  # the plain steps that follow tell whether that was drafting's fault
        without = num_conversations - len(rates)

        def tokens_per_s(length: int) -> float:
            expected = without + sum(expected_tokens(rate, length, self._bonus) for rate in rates)
            return expected / self._expected_s(num_conversations, length)

        longest = max(drafted for number, drafted in self._seconds if number == num_conversations)
        most_rows = max(self._FIRST_ROWS, 2 * num_conversations * (longest + 1))
        num_allowed = sum(num_conversations * (length + 1) <= most_rows for length in self._lengths)
        num_tried = sum(length <= longest for length in self._lengths)
        best = max(self._lengths[: max(num_allowed, num_tried + 1)], key=tokens_per_s)
        return best if tokens_per_s(best) > self._LEAST_GAIN * num_conversations / plain_s else 0

    def _plain_s(self, num_conversations: int) -> float:
        """Time of a plain step; of few the shortest, since the first may have been slow for any reason."""
        seen = self._seconds[num_conversations, 0]
        return min(seen) if len(seen) < self._REMEMBERED else statistics.median(seen)

    def _median_s(self, num_conversations: int, num_drafted: int) -> float:
        return statistics.median(self._seconds[num_conversations, num_drafted])

    def _expected_s(self, num_conversations: int, num_drafted: int) -> float:
        """Time of a step: as measured, or by the guess, corrected by how far it was off for the most similar step."""
        if (num_conversations, num_drafted) in self._seconds:
            return self._median_s(num_conversations, num_drafted)
        added = self._guess(num_drafted) - 1
        measured = [key for key in self._seconds if key[1] and (key[0], 0) in self._seconds]
        if measured:
            number, drafted = min(
                measured,
                key=lambda key: (
                    abs(math.log(key[0] / num_conversations)),
                    abs(math.log(key[1] / num_drafted)),
                ),
            )
            ratio = self._median_s(number, drafted) / self._plain_s(number)
            added *= max(ratio - 1, 0.0) / max(self._guess(drafted) - 1, 0.05)
        return self._plain_s(num_conversations) * (1 + added)


class Acceptance:
    """Rate at which one conversation's drafted tokens are accepted; recent ones count most.

    Args:
        prior_rate: expected before there is experience, and when it has faded.
    """

    _PRIOR_WEIGHT, _MEMORY, _FADING = 2.0, 0.9, 0.98

    def __init__(self, prior_rate: float = 0.8) -> None:
        self._prior_rate = prior_rate
        self._accepted = self._judged = 0.0

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """Learn from a draft: tokens behind the first rejected one say nothing."""
        judged = min(num_accepted + 1, num_drafted)
        self._accepted = self._MEMORY * self._accepted + num_accepted
        self._judged = self._MEMORY * self._judged + judged

    def fade(self) -> None:
        """Forget a little, after a step without a draft."""
        self._accepted *= self._FADING
        self._judged *= self._FADING

    @property
    def rate(self) -> float:
        """Expected probability that a drafted token is accepted, given that those before it are."""
        return (self._accepted + self._prior_rate * self._PRIOR_WEIGHT) / (self._judged + self._PRIOR_WEIGHT)


def expected_tokens(rate: float, num_drafted: int, bonus: bool) -> float:
    """Tokens that a draft brings: the accepted ones and, where not all are (or with a bonus), one more.

    Args:
        rate: probability that a drafted token is accepted, given those before it.
        num_drafted: K.
        bonus: whether the pass that verifies K tokens also gives the one after them.
    """
    return sum(rate**index for index in range(num_drafted + bonus))
