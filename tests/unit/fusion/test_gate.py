"""The gate: three forms against their formulas, the uniform start, precision, refusals."""

import pytest
import torch
from conftest import randomise_gate

from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion import GATE_FORMS, Gate


def states_of(*sizes: int, shape: tuple[int, ...] = (2, 5), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, size, generator=generator) for size in sizes]


def network(layers: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    hidden = (x @ layers[0].weight.T + layers[0].bias).clamp(min=0)
    return hidden @ layers[2].weight.T + layers[2].bias


@pytest.mark.parametrize("form", GATE_FORMS)
@pytest.mark.parametrize("num_specialists", [1, 2, 5])
def test_untrained_gate_is_the_uniform_average(form, num_specialists):
    weights = Gate([8] * num_specialists, 16, form)(states_of(*[8] * num_specialists))
    assert weights.shape == (2, 5, num_specialists)
    assert torch.allclose(weights, torch.full_like(weights, 1 / num_specialists), atol=1e-7)


def test_shared_form_scores_every_specialist_with_one_network():
    gate = randomise_gate(Gate([8, 8, 8], 16))
    states = states_of(8, 8, 8)
    scores = torch.cat([network(gate.networks[0], state) for state in states], dim=-1)
    weights = gate(states)
    assert torch.allclose(weights, scores.softmax(-1), atol=1e-6)
    assert torch.allclose(gate(states[::-1]), weights.flip(-1), atol=1e-6)
    assert sum(p.numel() for p in gate.parameters()) == 8 * 16 + 16 + 16 + 1
    assert weights.std() > 0.05  # the comparison says something


def test_per_specialist_form_has_a_network_for_every_width():
    gate, states = randomise_gate(Gate([8, 6], 16, "per_specialist")), states_of(8, 6)
    scores = torch.cat(
        [network(net, state) for net, state in zip(gate.networks, states, strict=True)], dim=-1
    )
    assert torch.allclose(gate(states), scores.softmax(-1), atol=1e-6)


def test_joint_form_reads_all_hidden_states_side_by_side():
    gate, states = randomise_gate(Gate([8, 6], 16, "joint")), states_of(8, 6)
    scores = network(gate.networks[0], torch.cat(states, dim=-1))
    assert torch.allclose(gate(states), scores.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("form", GATE_FORMS)
def test_weights_are_float32_even_from_bfloat16_states_under_autocast(form):
    gate, states = randomise_gate(Gate([8, 8], 16, form)), [s.bfloat16() for s in states_of(8, 8)]
    expected = gate([state.float() for state in states])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = gate(states)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("form", GATE_FORMS)
def test_gradients_reach_every_parameter(form):
    gate, states = randomise_gate(Gate([8, 8], 16, form)), states_of(8, 8)
    gate(states)[..., 0].sum().backward()
    last_bias = gate.networks[0][2].bias
    for parameter in gate.parameters():
        if form == "shared" and parameter is last_bias:  # the same for all specialists, so it has no say
            assert parameter.grad.abs().max() < 1e-6
        else:
            assert parameter.grad.abs().max() > 0


def test_dropout_hides_inputs_in_training_only():
    gate, states = randomise_gate(Gate([8, 8], 16, dropout=0.5)), states_of(8, 8)
    expected = randomise_gate(Gate([8, 8], 16)).eval()(states)
    assert torch.equal(gate.eval()(states), expected)
    torch.manual_seed(0)
    seen = torch.stack([gate.train()(states) for _ in range(2)])
    assert not torch.allclose(seen[0], seen[1])
    with pytest.raises(UltrafuserError, match=r"gate.dropout must be at least 0 and below 1, got 1.0"):
        Gate([8], dropout=1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([8], 16, "best"), "gate.form must be one of shared, per_specialist, joint, got 'best'"),
        (([], 16, "shared"), "at least one specialist"),
        (([8], 0, "shared"), "gate.size must be at least 1, got 0"),
        (([8, 6], 16, "shared"), r"equal hidden sizes, got \[8, 6\].*per_specialist or joint"),
    ],
)
def test_refusals_say_what_and_why(arguments, message):
    with pytest.raises(UltrafuserError, match=message):
        Gate(*arguments)


@pytest.mark.parametrize("form", GATE_FORMS)
def test_another_number_of_specialists_is_refused(form):
    with pytest.raises(UltrafuserError, match="expected hidden states of 2 specialists, got 3"):
        Gate([8, 8], 16, form)(states_of(8, 8, 8))
