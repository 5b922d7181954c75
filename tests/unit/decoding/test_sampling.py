"""Settings of sampling mean what they mean to Hugging Face's `generate`, and draws follow the distribution."""

import math
from collections import Counter

import pytest
import torch
from conftest import tiny_model
from torch import Tensor
from transformers import GenerationConfig

from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.errors import UltrafuserError

NAN = float("nan")
SAID = [7, 3, 3, 11]


def random_logits(rows: int = 1, vocab_size: int = 40, seed: int = 0) -> Tensor:
    return 3 * torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1"),
        ({"temperature": -0.5}, "temperature must be 0, or at least 1e-5 and finite, got -0.5"),
        ({"temperature": 1e-38}, "temperature must be 0, or at least 1e-5 and finite, got 1e-38"),
        ({"temperature": NAN}, "temperature must be .*, got nan"),
        ({"top_p": -0.1}, "top_p must be within 0 to 1, got -0.1"),
        ({"top_p": 1.1}, "top_p must be within 0 to 1, got 1.1"),
        ({"top_p": NAN}, "top_p must be .*, got nan"),
        ({"top_k": -1}, "top_k must be at least 0, got -1"),
        ({"min_p": -0.1}, "min_p must be within 0 to 1, got -0.1"),
        ({"min_p": 1.1}, "min_p must be within 0 to 1, got 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be above 0 and finite, got -1.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty must be .*, got inf"),
        ({"seed": 2**64}, "seed must be within"),
        ({"seed": -(2**63) - 1}, "seed must be within"),
        ({"stop": ("a", "")}, "stop must be texts that are not empty, got"),
        ({"stop": "abc"}, "stop must be texts that are not empty, got 'abc'"),
        ({"logprobs": -1}, "logprobs must be None or at least 0, got -1"),
    ],
)
def test_refuses_settings_that_mean_nothing(settings, message):
    with pytest.raises(UltrafuserError, match=message):
        SamplingParams(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0, "temperature": 0, "top_p": 0, "top_k": 0, "min_p": 0, "logprobs": 0},
        {"top_p": 1, "min_p": 1, "repetition_penalty": 1, "temperature": 100},
        {"seed": 2**64 - 1, "stop": ["a"]},
        {"seed": -(2**63)},
    ],
)
def test_accepts_the_ends_of_every_range(settings):
    sampler = Sampler(SamplingParams(**settings), SAID)
    assert 0 <= sampler.next_token(random_logits()) < 40
    assert 0 <= sampler.uniform() < 1


# --- distributions ------------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 2.5},
    "top-k": {"temperature": 0.8, "top_k": 5},
    "top-p": {"temperature": 1.3, "top_p": 0.8},
    "min-p": {"temperature": 1.5, "min_p": 0.2},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.7},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.6},
    "all": {"temperature": 1.6, "top_k": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4},
    "nothing left but one": {"temperature": 1.0, "top_p": 0.0, "min_p": 1.0, "top_k": 1},
}


@pytest.fixture(scope="module")
def plain_model():
    return tiny_model(vocab_size=40)


def hugging_face_probabilities(model, settings: dict[str, float], said: list[int], logits: Tensor) -> Tensor:
    config = GenerationConfig(do_sample=True, **{"top_k": 0, **settings})
    processors = model._get_logits_processor(config, input_ids_seq_length=len(said))
    return processors(torch.tensor([said]), logits.float()).softmax(dim=-1)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_distribution_is_that_of_generate(plain_model, settings, dtype):
    sampler = Sampler(SamplingParams(**settings), SAID)
    for seed in range(5):
        logits = random_logits(seed=seed).to(dtype)
        expected = hugging_face_probabilities(plain_model, settings, SAID, logits)
        probabilities = sampler.probabilities(logits)
        assert probabilities.dtype == torch.float32
        assert torch.allclose(probabilities, expected, atol=1e-6)
        assert torch.equal(probabilities > 0, expected > 0)


def test_every_setting_changes_the_distribution():
    logits = random_logits()
    rows = [Sampler(SamplingParams(**s), SAID).probabilities(logits) for s in SETTINGS.values()]
    for index, row in enumerate(rows):
        assert all((row - other).abs().max() > 1e-3 for other in rows[:index])


def test_the_penalty_counts_what_was_said_since(plain_model):
    settings = SETTINGS["penalty"]
    sampler, logits = Sampler(SamplingParams(**settings), SAID), random_logits()
    sampler.said([20])
    sampler.said([21, 22])
    expected = hugging_face_probabilities(plain_model, settings, [*SAID, 20, 21, 22], logits)
    assert torch.allclose(sampler.probabilities(logits), expected, atol=1e-6)


def test_the_penalty_without_anything_said_changes_nothing():
    logits = random_logits()
    sampler = Sampler(SamplingParams(temperature=1.0, repetition_penalty=3.0), [])
    assert torch.allclose(sampler.probabilities(logits), logits.softmax(-1))


@pytest.mark.parametrize("settings", [SETTINGS["all"], {"repetition_penalty": 1.5}, {}], ids=str)
def test_rows_behind_drafted_tokens_are_as_if_these_were_said(settings):
    params, logits, drafted = SamplingParams(**settings), random_logits(rows=4), [9, 9, 30]
    together = Sampler(params, SAID)
    rows, tokens = together.probabilities(logits, drafted), together.greedy_tokens(logits, drafted)
    alone = Sampler(params, SAID)
    for index in range(4):
        assert torch.allclose(rows[index], alone.probabilities(logits[[index]])[0])
        assert int(tokens[index]) == int(alone.greedy_tokens(logits[[index]]))
        alone.said(drafted[index : index + 1])
    untouched = Sampler(params, SAID).probabilities(logits[:1])
    assert torch.allclose(together.probabilities(logits[:1]), untouched)  # drafted is not said


def test_greedy_is_the_likeliest_token_after_the_penalty():
    logits = torch.tensor([[1.0, 5.0, 4.0, -2.0]])
    greedy = Sampler(SamplingParams(), [1])
    assert greedy.takes_likeliest
    assert greedy.next_token(logits) == 1
    assert greedy.probabilities(logits).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    penalised = Sampler(SamplingParams(repetition_penalty=2.0), [1])
    assert not penalised.takes_likeliest
    assert penalised.next_token(logits) == 2
    assert penalised.probabilities(logits).tolist() == [[0.0, 0.0, 1.0, 0.0]]
    ignored = Sampler(SamplingParams(top_p=0.1, top_k=1, min_p=0.5), [1])
    assert ignored.next_token(logits) == 1


def test_logits_are_left_alone():
    logits = random_logits(rows=2)
    before = logits.clone()
    sampler = Sampler(SamplingParams(**SETTINGS["all"]), SAID)
    sampler.probabilities(logits, [1])
    sampler.greedy_tokens(logits, [1])
    assert torch.equal(logits, before)


# --- draws --------------------------------------------------------------------------------------------------------


def test_the_same_seed_draws_the_same_tokens():
    def tokens(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), SAID)
        return [sampler.next_token(random_logits(seed=step)) for step in range(20)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)


def test_draws_have_the_frequencies_of_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.15, 0.05, 0.0])
    sampler = Sampler(SamplingParams(temperature=1.0, seed=1), [])
    counts = Counter(sampler.draw(4.0 * probabilities) for _ in range(10_000))  # need not be normalised
    assert set(counts) == {1, 3, 4, 5}
    for token, count in counts.items():
        expected = 10_000 * float(probabilities[token])
        assert abs(count - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("point", "token"),
    [(0.0, 1), (0.24, 1), (0.25, 2), (0.74, 2), (0.75, 4), (1 - 2**-53, 4)],
)
def test_draws_invert_the_distribution_function(monkeypatch, point, token):
    """Ends of the range included: a token without probability is never drawn."""
    sampler = Sampler(SamplingParams(temperature=1.0), [])
    monkeypatch.setattr(Sampler, "uniform", lambda self: point)
    assert sampler.draw(torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0])) == token
