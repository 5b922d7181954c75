"""Speculation: what is drafted, how much of it, and that accepting it leaves the distribution as it is."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from conftest import chi_square
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.decoding.speculation import (
    Acceptance,
    DraftLength,
    Lookup,
    SpeculationParams,
    accept,
    accept_greedy,
    expected_tokens,
)
from ultrafuser.errors import UltrafuserError


@pytest.mark.parametrize(
    "settings",
    [
        {"max_draft": 0},
        {"min_match": 0},
        {"min_match": 5},
        {"max_match": 1},
        {"max_match": 0, "min_match": 0},
    ],
)
def test_refuses_settings_that_mean_nothing(settings):
    with pytest.raises(
        UltrafuserError, match=r"max_draft must be at least 1 and min_match within 1 to max_match"
    ):
        SpeculationParams(**settings)


@pytest.mark.parametrize("settings", [{}, {"max_draft": 1}, {"min_match": 1, "max_match": 1}])
def test_accepts_the_ends_of_every_range(settings):
    SpeculationParams(**settings)


# --- acceptance ---------------------------------------------------------------------------------------------------


def sampler(seed: int = 0) -> Sampler:
    return Sampler(SamplingParams(temperature=1.0, seed=seed), [])


def rows(*numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers) / torch.tensor(numbers).sum(dim=-1, keepdim=True)


TARGET = rows((5, 3, 0, 1, 1), (1, 1, 1, 6, 1), (0, 2, 2, 3, 3))
DRAFTS = {
    "close": rows((4, 3, 1, 1, 1), (2, 1, 1, 5, 1)),
    "far": rows((1, 1, 6, 1, 1), (6, 1, 1, 1, 1)),
    "the same": TARGET[:2],
    "impossible": rows((0, 0, 1, 0, 0), (1, 0, 0, 0, 0)),
}


def three_tokens(
    rule, draft: Tensor | None, own: Sampler, drafted: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Three tokens whose distributions are the rows of TARGET: two are drafted; what is missing is drawn plainly."""
    tokens = [own.draw(row) for row in draft] if drafted is None else list(drafted)
    num_accepted, following = rule(tokens, draft, TARGET, own)
    said = [*tokens[:num_accepted], following]
    return tuple(said + [own.draw(row) for row in TARGET[len(said) :]])


EXACT = {
    (a, b, c): float(TARGET[0, a] * TARGET[1, b] * TARGET[2, c])
    for a in range(5)
    for b in range(5)
    for c in range(5)
}


def fits(rule, draft: Tensor | None, drafted: Sequence[int] | None = None, samples: int = 3000) -> bool:
    own = sampler(seed=11)
    counts = Counter(three_tokens(rule, draft, own, drafted) for _ in range(samples))
    assert counts.keys() <= EXACT.keys()
    statistic, bound = chi_square(counts, EXACT)
    return statistic < bound


@pytest.mark.parametrize("draft", DRAFTS.values(), ids=DRAFTS)
def test_accepted_or_not_tokens_have_the_target_distribution(draft):
    assert fits(accept, draft)


@pytest.mark.parametrize("drafted", [(0, 3), (3, 3), (2, 0), (1, 4)], ids=str)
def test_certain_drafts_have_the_target_distribution(drafted):
    assert fits(accept, None, drafted)


def accept_all(drafted, draft, target, own):
    return len(drafted), own.draw(target[len(drafted)])


def reversed_ratio(drafted, draft, target, own):
    for index, token in enumerate(drafted):
        q, r = float(draft[index, token]), float(target[index, token])
        if own.uniform() * r >= q:
            return index, own.draw((target[index] - draft[index]).clamp(min=0))
    return len(drafted), own.draw(target[len(drafted)])


def drawn_from_the_target(drafted, draft, target, own):
    num_accepted, following = accept(drafted, draft, target, own)
    return num_accepted, own.draw(target[num_accepted]) if num_accepted < len(drafted) else following


def drawn_from_the_difference(drafted, draft, target, own):
    num_accepted, following = accept(drafted, draft, target, own)
    if num_accepted < len(drafted):
        following = own.draw((target[num_accepted] - draft[num_accepted]).abs())
    return num_accepted, following


def row_before(drafted, draft, target, own):
    """Verified against the distribution of the token before."""
    return accept(drafted, draft, torch.cat([target[:1], target]), own)


@pytest.mark.parametrize(
    "rule", [accept_all, reversed_ratio, drawn_from_the_target, drawn_from_the_difference, row_before]
)
def test_the_test_tells_wrong_rules(rule):
    assert not fits(rule, DRAFTS["far"])


def test_certain_drafts_that_stay_possible_are_told():
    def not_zeroed(drafted, draft, target, own):
        num_accepted, following = accept(drafted, draft, target, own)
        return num_accepted, own.draw(target[num_accepted]) if num_accepted < len(drafted) else following

    assert not fits(not_zeroed, None, (0, 3))


def test_a_draft_like_the_target_is_always_accepted():
    own = sampler()
    for _ in range(200):
        drafted = [own.draw(row) for row in TARGET[:2]]
        assert accept(drafted, TARGET[:2], TARGET, own)[0] == 2
        assert accept(drafted, TARGET[:2], TARGET[:2], own) == (2, None)


def test_rounding_leaves_a_token(monkeypatch):
    """Two distributions that differ only by rounding may have no positive difference."""
    draft, target = torch.tensor([[0.70000005, 0.3]]), torch.tensor([[0.7, 0.3]])
    points = iter([1 - 2**-53, 0.9])
    monkeypatch.setattr(Sampler, "uniform", lambda self: next(points))
    assert accept([0], draft, target, sampler()) == (0, 1)


@pytest.mark.parametrize(
    ("drafted", "likeliest", "expected"),
    [
        ([], [7], (0, 7)),
        ([7, 8], [7, 8, 9], (2, 9)),
        ([7, 8], [7, 8], (2, None)),
        ([7, 8], [7, 5, 9], (1, 5)),
        ([7, 8], [5, 8, 9], (0, 5)),
        ([7, 8], [7, 5], (1, 5)),
    ],
)
def test_greedy_drafts_stand_as_far_as_they_are_the_likeliest(drafted, likeliest, expected):
    assert accept_greedy(drafted, likeliest) == expected
    one_hot = torch.nn.functional.one_hot(torch.tensor(likeliest), 10).float()
    assert accept(drafted, None, one_hot, sampler()) == expected


# --- look-up ------------------------------------------------------------------------------------------------------


def drafted_by_search(
    context: Sequence[int], num_tokens: int, params: SpeculationParams
) -> tuple[list[int], int]:
    """What a look-up is, without an index."""
    for length in range(params.max_match, params.min_match - 1, -1):
        ending = list(context[-length:])
        for end in range(len(context) - 1, length - 1, -1):
            if length <= len(context) and list(context[end - length : end]) == ending:
                text = list(context)
                while len(text) < end + num_tokens:
                    text.append(text[len(text) - len(context) + end])
                return text[end : end + num_tokens], length
    return [], 0


@pytest.mark.parametrize(
    ("context", "num_tokens", "expected"),
    [
        ([1, 2, 3, 9, 1, 2], 2, ([3, 9], 2)),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, ([4], 2)),  # the last occurrence
        ([8, 1, 2, 3, 9, 1, 2, 4, 8, 1, 2], 2, ([3, 9], 3)),  # of the longest match
        ([1, 2, 1, 2], 7, ([1, 2, 1, 2, 1, 2, 1], 2)),  # a loop goes on beyond the end
        ([5, 5, 5], 3, ([5, 5, 5], 2)),
        ([1, 2, 3, 9, 1, 2], 6, ([3, 9, 1, 2, 3, 9], 2)),
        ([1, 2, 3, 4], 4, ([], 0)),
        ([2, 3, 4, 2], 4, ([], 0)),  # one token is no match
        ([], 4, ([], 0)),
        ([1, 2], 4, ([], 0)),
    ],
    ids=str,
)
def test_lookup_drafts_what_followed(context, num_tokens, expected):
    params = SpeculationParams(max_match=3, min_match=2)
    assert Lookup(context, params).draft(num_tokens) == expected
    assert drafted_by_search(context, num_tokens, params) == expected


def test_lookup_of_no_tokens_is_nothing():
    assert Lookup([1, 2, 1, 2], SpeculationParams()).draft(0)[0] == []


@given(
    context=st.lists(st.integers(0, 2), max_size=30),
    cut=st.integers(0, 30),
    num_tokens=st.integers(1, 8),
    lengths=st.tuples(st.integers(1, 4), st.integers(1, 4)).map(sorted),
)
def test_lookup_is_a_search_however_the_context_grew(context, cut, num_tokens, lengths):
    params = SpeculationParams(min_match=lengths[0], max_match=lengths[1])
    lookup = Lookup(context[:cut], params)
    lookup.draft(num_tokens)  # which leaves nothing behind
    lookup.extend(context[cut:])
    assert lookup.draft(num_tokens) == drafted_by_search(context, num_tokens, params)


# --- how much to draft --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize(("rate", "num_drafted"), [(0.0, 4), (0.5, 1), (0.7, 5), (1.0, 3)])
def test_expected_tokens_are_those_of_a_simulation(rate, num_drafted, bonus):
    choice, counts = random.Random(3), []
    for _ in range(4000):
        accepted = 0
        while accepted < num_drafted and choice.random() < rate:
            accepted += 1
        counts.append(accepted + (bonus or accepted < num_drafted))
    mean = sum(counts) / len(counts)
    assert abs(expected_tokens(rate, num_drafted, bonus) - mean) < 0.1


def draft_length(cost_of_a_token: float = 0.1, bonus: bool = True, max_draft: int = 16) -> DraftLength:
    """Measured: a plain step takes 1 second; each drafted token adds some."""
    chosen = DraftLength(lambda num_drafted: 1 + cost_of_a_token * num_drafted, bonus, max_draft)
    for _ in range(3):
        chosen.observe(1, 0, 1, 1.0)
    return chosen


def drafts_ever_longer(chosen: DraftLength) -> int:
    """The length that is reached when all drafts are accepted and cost nothing."""
    for _ in range(10):
        length = chosen.best(1, [1.0])
        chosen.observe(1, length, length + 1, 1.0)
    return chosen.best(1, [1.0])


def test_nothing_is_drafted_before_a_plain_step():
    chosen = DraftLength(lambda num_drafted: 1.0, True, 16)
    assert chosen.best(1, [1.0]) == 0
    chosen.observe(2, 0, 2, 1.0)
    chosen.observe(1, 4, 5, 0.001)
    assert chosen.best(1, [1.0]) == 0  # of as many conversations
    chosen.observe(1, 0, 1, 1.0)
    assert chosen.best(1, [1.0]) > 0


def test_free_and_certain_tokens_are_drafted_to_the_limit():
    for limit in (1, 5, 16, 100):
        assert drafts_ever_longer(draft_length(0.0, max_draft=limit)) == limit


@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize("rate", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("cost", [0.01, 0.1, 0.3, 1.5])
def test_the_best_length_is_the_fastest(rate, cost, bonus):
    """Against every length at once; nothing where a plain step is as fast."""
    lengths = draft_length(cost, bonus)
    for length in (1, 2, 3, 4, 6, 8, 12, 16):
        lengths.observe(1, length, 50, 1 + cost * length)
    chosen = lengths.best(1, [rate])

    def speed(length: int) -> float:
        return expected_tokens(rate, length, bonus) / (1 + cost * length) if length else 1.0

    fastest = max(map(speed, range(17)))
    assert speed(chosen) > 0.96 * fastest or (chosen == 0 and fastest < 1.1)
    if chosen:
        assert speed(chosen) > 1.0
    if cost == 1.5:
        assert chosen == 0


def test_what_was_measured_counts_more_than_the_guess():
    chosen = draft_length(0.0)
    assert chosen.best(1, [1.0]) > 0
    for length in (1, 2, 3, 4, 6, 8, 12, 16):
        chosen.observe(1, length, 100, 100.0)  # so many tokens that none of it is a loss
    assert chosen.best(1, [1.0]) == 0


def test_one_slow_step_is_not_believed():
    chosen = draft_length(0.0)
    for seconds in (1.0, 50.0, 1.0):
        chosen.observe(1, 16, 50, seconds)
    assert chosen.best(1, [1.0]) == 16


def test_conversations_without_a_draft_bring_one_token_each():
    """They are in the way of the others, whose draft makes the step longer for all."""
    chosen = draft_length(0.2)
    chosen.observe(8, 0, 8, 1.0)
    assert chosen.best(1, [0.8]) > 0
    assert chosen.best(8, [0.8]) == 0
    assert chosen.best(8, [0.8] * 8) > 0


def test_acceptance_learns_the_rate_and_forgets_it():
    acceptance = Acceptance()
    start = acceptance.rate
    assert 0 < start < 1
    for _ in range(50):
        acceptance.observe(8, 0)
    assert acceptance.rate < 0.2
    for _ in range(50):
        acceptance.observe(8, 8)
    assert acceptance.rate > 0.95
    for _ in range(50):
        acceptance.observe(4, 1)
    assert 0.4 < acceptance.rate < 0.6  # one of two judged: those behind the rejected one say nothing
    for _ in range(1000):
        acceptance.fade()
    assert math.isclose(acceptance.rate, start, rel_tol=1e-3)


def test_drafting_is_tried_again_when_experience_has_faded():
    chosen, acceptance, drafts = draft_length(0.3), Acceptance(), []
    for _ in range(300):
        drafts.append(chosen.best(1, [acceptance.rate]))
        if drafts[-1]:
            acceptance.observe(drafts[-1], 0)
        else:
            acceptance.fade()
    tries = [step for step, length in enumerate(drafts) if length]
    assert tries[0] == 0
    assert tries[-1] > 200
    assert len(tries) < 30


def test_plain_steps_are_measured_again_now_and_then():
    """Contexts grow, other programs come and go: what once was a gain may be a loss."""
    chosen, lengths = draft_length(0.0), []
    for _ in range(100):
        lengths.append(chosen.best(1, [1.0]))
        chosen.observe(1, lengths[-1], lengths[-1] + 1, 1.0)
    assert 1 <= lengths[20:].count(0) <= 5


def test_what_one_number_of_conversations_has_shown_is_a_guess_for_another():
    chosen = draft_length(0.05)
    chosen.observe(2, 0, 2, 1.0)
    assert chosen.best(2, [0.8, 0.8]) > 0
    chosen.observe(1, 2, 50, 5.0)
    assert chosen.best(2, [0.8, 0.8]) == 0


def over_plain(
    chosen: DraftLength,
    conversations: int,
    acceptance_rate: float,
    cost: float,
    believed: float,
    steps: int = 150,
    slowed: Callable[[int, int], float] = lambda step, length: 1.0,
) -> float:
    """Time of so many steps over what their tokens would have taken without drafts; what slowed them is left out.

    Args:
        chosen: decides.
        conversations: in every step.
        acceptance_rate: that is true.
        cost: of a drafted token, in plain steps.
        believed: acceptance rate.
        steps: how many.
        slowed: times that a step took longer than it had to, by its number and the tokens drafted.
    """
    choice = random.Random(3)
    seconds = tokens = 0.0
    for step in range(steps):
        length = chosen.best(conversations, [believed] * conversations)
        said = 0
        for _ in range(conversations):
            accepted = 0
            while accepted < length and choice.random() < acceptance_rate:
                accepted += 1
            said += accepted + 1
        took = (1 + cost * length) * choice.uniform(0.9, 1.1)
        chosen.observe(conversations, length, said, took * slowed(step, length))
        seconds, tokens = seconds + took, tokens + said
    return seconds / (tokens / conversations)


def hopeful() -> DraftLength:
    return DraftLength(lambda num_drafted: 1 + 0.01 * num_drafted, True, 16)


@pytest.mark.parametrize("conversations", [1, 3, 8])
@pytest.mark.parametrize("acceptance_rate", [0.0, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("cost", [0.01, 0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("believed", [0.0, 0.8, 1.0])
def test_drafting_loses_at_most_five_percent(conversations, acceptance_rate, cost, believed):
    """However wrong guesses of costs and of acceptance are, and from the first token on."""
    ratio = over_plain(hopeful(), conversations, acceptance_rate, cost, believed)
    assert ratio < 1.05 * 1.02  # and what the timings vary


@pytest.mark.parametrize("conversations", [1, 4])
@pytest.mark.parametrize(("acceptance_rate", "cost"), [(0.0, 0.3), (0.0, 1.0), (0.3, 0.5), (0.3, 1.0)])
@pytest.mark.parametrize("slow", [3.0, 10.0])
def test_one_slow_plain_step_does_not_let_it_lose_more(conversations, acceptance_rate, cost, slow):
    def first(step: int, length: int) -> float:
        return slow if step == 0 else 1.0

    ratio = over_plain(hopeful(), conversations, acceptance_rate, cost, 1.0, slowed=first)
    assert ratio < 1.05 * 1.02


@pytest.mark.parametrize("conversations", [1, 4])
@pytest.mark.parametrize(("acceptance_rate", "cost"), [(0.0, 0.3), (0.0, 1.0), (0.3, 0.5)])
def test_plain_steps_save_nothing_up_for_later_losses(conversations, acceptance_rate, cost):
    chosen = hopeful()
    for _ in range(3000):
        chosen.observe(conversations, 0, conversations, 1.0)
    assert over_plain(chosen, conversations, acceptance_rate, cost, 1.0) < 1.05 * 1.02


@pytest.mark.parametrize("stall", [10.0, 25.0, 100.0])
@pytest.mark.parametrize("at", [6, 40])
def test_a_stall_during_a_draft_is_soon_forgiven(stall, at):
    """A machine that stands still for a second is not drafting's fault, and no reason to go without for a minute."""

    def once(step: int, length: int) -> float:
        return stall if step == at else 1.0

    smooth = over_plain(hopeful(), 1, 0.8, 0.1, 0.8, steps=1500)
    assert over_plain(hopeful(), 1, 0.8, 0.1, 0.8, steps=1500, slowed=once) < 1.15 * smooth


@pytest.mark.parametrize("length", [4, 8, 12, 16])
def test_one_slow_draft_does_not_rule_its_length_out(length):
    seen: list[int] = []

    def first(_: int, drafted: int) -> float:
        seen.append(drafted)
        return 4.0 if drafted == length and seen.count(length) == 1 else 1.0

    smooth = over_plain(hopeful(), 1, 0.97, 0.05, 0.97, steps=1000)
    assert over_plain(hopeful(), 1, 0.97, 0.05, 0.97, steps=1000, slowed=first) < 1.05 * smooth
