"""What is measured equals the plain formulas, however the conversations are batched."""

import numpy as np
import pytest
import torch
from conftest import fused_over, tiny_model
from torch.nn import functional as F

from ultrafuser.analysis import measure as measure_module
from ultrafuser.analysis.measure import measure
from ultrafuser.analysis.traces import Measurement
from ultrafuser.errors import ConversationTooLongError, UltrafuserError
from ultrafuser.fusion import fuse_logits
from ultrafuser.modeling.specialists import WholeSpecialists
from ultrafuser.modeling.templates import BUILTIN_TEMPLATES, ConversationEncoder


def ask(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = {
    "text": [
        ask("Hello?", "Hi."),
        ask("Name a colour, please.", "Blue 🫐 is one of them."),
        ask("And?", "No"),
    ],
    "code": [
        ask("Write a loop.", "for x in y:\n    pass") + ask("Shorter!", "[...]"),
        ask("Sum?", "def f(a, b):\n    return a + b"),
    ],
}


@pytest.fixture(scope="module")
def model():
    return fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model("qwen2", seed=2)}))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    templates = {"a": BUILTIN_TEMPLATES["alpaca"], "b": BUILTIN_TEMPLATES["ultralm"]}
    return ConversationEncoder(tokenizer, templates, end_token_id=3, max_length=256)


@torch.no_grad()
def plain_losses(model, encoder, messages):
    """Loss of every label under every row, and the gate weights, by the formulas of the paper."""
    encoded = encoder.encode(messages)
    logits, states = [], []
    for one, ids, positions in zip(
        model.bank.models, encoded.input_ids, encoded.response_positions, strict=True
    ):
        output = one(input_ids=torch.tensor([ids]), output_hidden_states=True)
        logits.append(output.logits[0, positions])
        states.append(output.hidden_states[-1][0, positions])
    weights = model.gate(states)
    stacked = torch.stack(logits)
    rows = {
        "a": logits[0],
        "b": logits[1],
        "uniform": stacked.mean(0),
        "fused": fuse_logits(stacked, weights),
    }
    labels = torch.tensor(encoded.labels)
    losses = {row: F.cross_entropy(values, labels, reduction="none").numpy() for row, values in rows.items()}
    return weights.numpy(), losses


def test_equals_the_plain_formulas(model, encoder):
    measured = measure(model, encoder, CONVERSATIONS)
    assert measured.domains == ("text", "code")
    traces = iter(measured.traces)
    for domain, rows in CONVERSATIONS.items():
        expected = [plain_losses(model, encoder, messages) for messages in rows]
        for weights, losses in expected:
            trace = next(traces)
            np.testing.assert_allclose(trace.gate_weights, weights, atol=1e-5)
            for row, values in losses.items():
                np.testing.assert_allclose(trace.losses[row], values, atol=1e-4)
        for row in ("a", "b", "uniform", "fused"):
            mean = np.concatenate([losses[row] for _, losses in expected]).mean()
            assert measured.losses[row][domain] == pytest.approx(mean, abs=1e-5)
        mean_weights = np.concatenate([weights for weights, _ in expected]).mean(axis=0)
        assert list(measured.weights[domain].values()) == pytest.approx(mean_weights.tolist(), abs=1e-6)
        per_sample = [weights.mean(axis=0) for weights, _ in expected]
        np.testing.assert_allclose(measured.sample_weights[domain], per_sample, atol=1e-6)
        assert measured.num_tokens[domain] == sum(len(weights) for weights, _ in expected)


def test_sums_are_those_of_the_traces(model, encoder):
    measured = measure(model, encoder, CONVERSATIONS)
    again = Measurement.from_traces(measured.specialists, measured.traces)
    assert again.metrics() == pytest.approx(measured.metrics(), abs=1e-6)
    assert again.num_tokens == measured.num_tokens


def test_traces_read_as_they_were_written(model, encoder):
    traces = measure(model, encoder, CONVERSATIONS).traces
    assert [trace.domain for trace in traces] == ["text"] * 3 + ["code"] * 2
    assert [trace.prompt for trace in traces][2:4] == ["And?", "Write a loop.\n\nShorter!"]
    assert "".join(traces[1].tokens) == "Blue 🫐 is one of them.<|im_end|>"
    assert "".join(traces[3].tokens) == "for x in y:\n    pass<|im_end|>[...]<|im_end|>"


@pytest.mark.parametrize("batch_tokens", [1, 150, 100_000])
def test_batches_change_nothing(model, encoder, batch_tokens):
    expected = measure(model, encoder, CONVERSATIONS).metrics()
    measured = measure(model, encoder, CONVERSATIONS, batch_tokens=batch_tokens)
    assert measured.metrics() == pytest.approx(expected, abs=1e-5)


def test_batches_hold_no_more_tokens_than_allowed(model, encoder, monkeypatch):
    sizes = []
    original = model.hidden_states

    def spy(specialist_input_ids, **rest):
        sizes.append(specialist_input_ids.numel())
        return original(specialist_input_ids, **rest)

    monkeypatch.setattr(model, "hidden_states", spy)
    measure(model, encoder, CONVERSATIONS, batch_tokens=300)
    assert len(sizes) > 1
    assert max(sizes) <= 300
    assert sizes[0] >= sizes[-1]  # the longest first


def test_keeps_no_more_than_is_asked_for(model, encoder, monkeypatch):
    monkeypatch.setattr(measure_module, "MAX_SAMPLES", 2)
    everything = measure(model, encoder, CONVERSATIONS)
    one = measure(model, encoder, CONVERSATIONS, keep_traces=1)
    assert [trace.prompt for trace in one.traces] == ["Hello?", "Write a loop.\n\nShorter!"]
    assert measure(model, encoder, CONVERSATIONS, keep_traces=0).traces == ()
    assert {domain: len(rows) for domain, rows in everything.sample_weights.items()} == {"text": 2, "code": 2}
    assert one.metrics() == everything.metrics()


def test_reports_progress_up_to_all_tokens(model, encoder):
    calls = []
    measured = measure(
        model,
        encoder,
        CONVERSATIONS,
        batch_tokens=1,
        progress=lambda done, total: calls.append((done, total)),
    )
    total = sum(measured.num_tokens.values())
    assert len(calls) == 5
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_and_the_gradients_alone(model, encoder, training):
    model.train(training)
    measure(model, encoder, CONVERSATIONS)
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()


def test_cuts_long_conversations_only_when_asked(model, tokenizer):
    templates = {"a": BUILTIN_TEMPLATES["ultralm"], "b": BUILTIN_TEMPLATES["ultralm"]}
    short = ConversationEncoder(tokenizer, templates, end_token_id=3, max_length=40)
    data = {"text": [ask("Hello?", "Hi. " * 30)]}
    with pytest.raises(ConversationTooLongError):
        measure(model, short, data)
    assert 0 < measure(model, short, data, too_long="truncate").num_tokens["text"] < 40


def test_refusals_name_what_is_wrong(model, encoder, tokenizer):
    with pytest.raises(UltrafuserError, match="at least 1 domain"):
        measure(model, encoder, {})
    with pytest.raises(UltrafuserError, match=r"data\.code must hold at least 1"):
        measure(model, encoder, {**CONVERSATIONS, "code": []})
    swapped = {"b": BUILTIN_TEMPLATES["alpaca"], "a": BUILTIN_TEMPLATES["alpaca"]}
    other = ConversationEncoder(tokenizer, swapped, end_token_id=3, max_length=256)
    with pytest.raises(UltrafuserError, match="encoder is for the specialists b, a"):
        measure(model, other, CONVERSATIONS)


def test_refuses_losses_that_are_not_finite(encoder):
    broken = fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model(seed=2)}))
    with torch.no_grad():
        broken.bank.models[1].lm_head.weight.fill_(float("nan"))
    with pytest.raises(UltrafuserError, match="losses of b are not finite"):
        measure(broken, encoder, CONVERSATIONS)
