"""Fused logits as one linear map equal the weighted sum of every specialist's logits."""

import pytest
import torch
from torch import Tensor

from ultrafuser.errors import ShapeError
from ultrafuser.fusion import Head, fuse_logits, fused_logits, scale_hidden_states

V = 11


def case(kind: str, sizes: tuple[int, ...] = (6, 4, 8), shape: tuple[int, ...] = (2, 3), seed: int = 0):
    """Hidden states, gate weights and heads: `shared` or `separate`, plain or with biases and scales."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    shared = kind.startswith("shared")
    sizes = (sizes[0],) * len(sizes) if shared else sizes
    states = [randn(*shape, size) for size in sizes]
    weights = randn(*shape, len(sizes)).softmax(-1)
    full = kind.endswith("full")
    heads = [
        # one head without a bias among heads with one
        Head(
            randn(V, size),
            randn(V) if full and (shared or index != 1) else None,
            0.5 + index if full else 1.0,
        )
        for index, size in enumerate(sizes[:1] if shared else sizes)
    ]
    return states, weights, heads


def plain_logits(states: list[Tensor], heads: list[Head]) -> Tensor:
    """(N, ..., V) one specialist after the other."""
    heads = heads * len(states) if len(heads) == 1 else heads
    return torch.stack([
        head.scale * (state @ head.weight.T + (0 if head.bias is None else head.bias))
        for state, head in zip(states, heads, strict=True)
    ])  # fmt: skip


KINDS = ["shared", "shared-full", "separate", "separate-full"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_one_linear_map_equals_the_weighted_sum(kind, shape):
    states, weights, heads = case(kind, shape=shape)
    expected = torch.einsum("n...v,...n->...v", plain_logits(states, heads), weights)
    assert torch.allclose(fused_logits(states, weights, heads), expected, atol=1e-5)
    assert torch.allclose(fuse_logits(plain_logits(states, heads), weights), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_weights_give_that_specialist(kind):
    states, _, heads = case(kind)
    logits = plain_logits(states, heads)
    for index in range(3):
        weights = torch.nn.functional.one_hot(torch.full((2, 3), index), 3).float()
        assert torch.allclose(fused_logits(states, weights, heads), logits[index], atol=1e-6)
        assert torch.equal(fuse_logits(logits, weights), logits[index])


def test_a_shared_head_is_paid_once_and_no_head_is_copied():
    states, weights, heads = case("shared")
    inputs, factors = scale_hidden_states(states, weights, heads)
    assert [x.shape for x in inputs] == [(2, 3, 6)]
    assert factors[0] is heads[0].weight
    states, weights, heads = case("separate")
    _, factors = scale_hidden_states(states, weights, heads)
    assert all(factor is head.weight for factor, head in zip(factors, heads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_follow_the_heads_dtype(kind):
    states, weights, heads = case(kind)
    half = [Head(h.weight.bfloat16(), None if h.bias is None else h.bias.bfloat16(), h.scale) for h in heads]
    fused = fused_logits(states, weights, half)
    assert fused.dtype == torch.bfloat16
    expected = fused_logits(states, weights, heads)
    assert torch.allclose(fused.float(), expected, atol=0.02 * float(expected.abs().max()))
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast touches the product only, not the scaling
        inputs, _ = scale_hidden_states(states, weights, heads)
        assert fused_logits(states, weights, heads).dtype == torch.bfloat16
    exact, _ = scale_hidden_states(states, weights, heads)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(inputs, exact, strict=True))


def test_shapes_that_do_not_fit_are_refused():
    states, weights, heads = case("separate")
    with pytest.raises(ShapeError, match=r"expected 1 or 3 .*got 2"):
        fused_logits(states, weights, heads[:2])
    with pytest.raises(ShapeError, match=r"expected \(N, \.\.\., V\)"):
        fuse_logits(plain_logits(states, heads), weights[..., :2])
    with pytest.raises(ShapeError, match=r"expected \(N, \.\.\., V\)"):
        fuse_logits(plain_logits(states, heads), weights[:1])
