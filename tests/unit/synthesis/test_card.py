"""What the card says of a run, where whole runs are too small to show it."""

import itertools
import random
from collections import Counter

import pytest

from ultrafuser.synthesis.export import PairCount


def texts(count):
    """Of words as often as in a language: the tenth a tenth as often as the first."""
    choice, words = random.Random(3), [f"word{index}" for index in range(5000)]
    weights = list(itertools.accumulate(1 / (rank + 1) for rank in range(len(words))))
    return [choice.choices(words, cum_weights=weights, k=30) for _ in range(count)]


def counted(most):
    pairs = PairCount(most)
    for words in texts(4000):
        pairs.add(words)
        assert len(pairs._counts) <= most
    return pairs


def test_pairs_that_come_once_are_exact_while_few_and_near_beyond():
    every = Counter(pair for words in texts(4000) for pair in itertools.pairwise(words))
    once = sum(count == 1 for count in every.values()) / every.total()
    exact, about = counted(len(every)), counted(10_000)
    assert (exact.once, exact.is_sampled) == (once, False)
    assert about.is_sampled
    assert about.once == pytest.approx(once, abs=0.02)


def test_no_pairs():
    pairs = PairCount()
    pairs.add(["alone"])
    assert (pairs.once, pairs.is_sampled) == (0, False)
