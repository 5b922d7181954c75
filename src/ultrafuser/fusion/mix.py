"""Fused logits as one linear map: scale the hidden states by the gate, then multiply by the heads once.

Paper, equation 1: fused logits = sum_j w_j o_j with o_j = h_j W_j^T. Because the gate only scales rows,
sum_j w_j (h_j W_j^T) = [w_1 h_1 ... w_N h_N] [W_1 ... W_N]^T, and with one head for all it is (sum_j w_j h_j) W^T: the
head is then paid once however many specialists there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ultrafuser.errors import ShapeError


@dataclass(frozen=True)
class Head:
    """A linear output head: logits = scale * (hidden_states @ weight.T + bias).

    Attributes:
        weight: float, (V, H).
        bias: float, (V,), or None.
        scale: constant factor that some architectures put on their logits (Cohere, Granite); 1.0 elsewhere.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0


def fuse_logits(specialist_logits: Tensor, gate_weights: Tensor) -> Tensor:
    """Weighted sum of specialist logits: the plain formula that everything else is compared with.

    Args:
        specialist_logits: float, (N, ..., V), one shared vocabulary.
        gate_weights: float, (..., N), non-negative, summing to 1 over N.

    Returns:
        fused_logits, (..., V), in the dtype of specialist_logits; the sum is accumulated in float32.

    Raises:
        ShapeError: the leading shapes or N differ.

    Reference: paper, equation 1.
    """
    if (
        specialist_logits.shape[0] != gate_weights.shape[-1]
        or specialist_logits.shape[1:-1] != gate_weights.shape[:-1]
    ):
        raise ShapeError(
            f"specialist_logits {tuple(specialist_logits.shape)} and gate_weights {tuple(gate_weights.shape)} do not "
            "match: expected (N, ..., V) and (..., N)."
        )
    weights = gate_weights.float().movedim(-1, 0).unsqueeze(-1)
    return (specialist_logits.float() * weights).sum(0).to(specialist_logits.dtype)


def scale_hidden_states(
    hidden_states: Sequence[Tensor], gate_weights: Tensor, heads: Sequence[Head]
) -> tuple[list[Tensor], list[Tensor]]:
    """The two factors of the fused head: fused logits = sum over m of inputs[m] @ weights[m].T.

    Args:
        hidden_states: N tensors, float, (..., H_j).
        gate_weights: float32, (..., N).
        heads: N heads, or one head that all specialists share.

    Returns:
        inputs: M tensors, (..., D_m) in the dtype of the heads: the scaled states, one per specialist, or summed
            into one when the head is shared. Biases, where a head has one, are a further factor of N (or 1) columns.
            Scaled in float32, also under autocast.
        weights: M tensors, (V, D_m): the head weights, not copied; then the biases.

    Raises:
        ShapeError: the number of heads is neither 1 nor N.
    """
    num_specialists = len(hidden_states)
    if len(heads) not in (1, num_specialists):
        raise ShapeError(f"heads: expected 1 or {num_specialists} (one per specialist), got {len(heads)}.")
    dtype = heads[0].weight.dtype
    factors = gate_weights.float()
    if len(heads) == 1:
        with torch.autocast(factors.device.type, enabled=False):
            states = torch.stack(list(hidden_states), dim=-1).float()
            mixed = (states @ (factors * heads[0].scale).unsqueeze(-1)).squeeze(-1)
        inputs = [mixed.to(dtype)]
        columns = torch.full_like(factors[..., :1], heads[0].scale)
    else:
        columns = factors * factors.new_tensor([head.scale for head in heads])
        inputs = [
            (state.float() * column.unsqueeze(-1)).to(dtype)
            for state, column in zip(hidden_states, columns.unbind(-1), strict=True)
        ]
    weights = [head.weight for head in heads]
    if any(head.bias is not None for head in heads):
        biases = [
            head.weight.new_zeros(head.weight.shape[0]) if head.bias is None else head.bias for head in heads
        ]
        inputs.append(columns.to(dtype))
        weights.append(torch.stack(biases, dim=-1))
    return inputs, weights


def fused_logits(hidden_states: Sequence[Tensor], gate_weights: Tensor, heads: Sequence[Head]) -> Tensor:
    """Fused logits by one linear map, without the specialists' own logits.

    Args:
        hidden_states: N tensors, float, (..., H_j).
        gate_weights: float32, (..., N).
        heads: N heads, or one head that all specialists share (then the cost is one head's).

    Returns:
        (..., V) in the dtype of the heads, or autocast's.

    Reference: paper, equation 1.
    """
    inputs, weights = scale_hidden_states(hidden_states, gate_weights, heads)
    leading = inputs[0].shape[:-1]
    logits = torch.mm(inputs[0].flatten(0, -2), weights[0].t())
    for state, weight in zip(inputs[1:], weights[1:], strict=True):
        logits = torch.addmm(logits, state.flatten(0, -2), weight.t())
    return logits.view(*leading, logits.shape[-1])
