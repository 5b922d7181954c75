"""Linear layers made ready for decoding: joined, packed for the processor, with all adapters in two products."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrafuser.modeling.lora import FoldedLinear, folded_layer


class PackedLinear:
    """A frozen linear map, in the layout in which this device multiplies a few rows fastest.

    A CPU multiplies bfloat16 from oneDNN's own layout, in which the weights are kept a second time; everything else
    is multiplied as it lies.

    Args:
        weight: float, (out, in).
        bias: float, (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._packed = packs(weight)
        if self._packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight.contiguous(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN's layout is at hand and faster than the plain one: for bfloat16 on a CPU (`docs/log.md`)."""
    return weight.is_cpu and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()


class Projection:
    """One or several linear layers over the same input, as one; with N low-rank updates if they are folded.

    The updates of all specialists are one product with all A, after which each row keeps only what is its own
    specialist's, and one with all B. Where weights are packed anyway, W and all B stand side by side and the second
    product is part of the base's.

    Args:
        layers: plain linear layers, or what stands for them in a base with folded adapters.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        folded = folded_layer(layers[0])
        self._down: PackedLinear | None = None
        if folded is None:
            self._base = [PackedLinear(weight, bias) for weight, bias in _plain(layers)]
            return
        down, up, self._own = _low_rank(folded)
        self._down = PackedLinear(down)
        self._joined = packs(folded.weight)
        weight = torch.cat((folded.weight, up), dim=1) if self._joined else folded.weight
        self._base = [PackedLinear(weight, folded.bias)]
        self._up = up.t()

    def __call__(self, x: Tensor) -> Tensor:
        """(A, N, T, in) -> (A, N, T, out): the layers' outputs side by side."""
        if self._down is None:
            parts = [layer(x) for layer in self._base]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        inner = self._down(x)
        if self._own is not None:
            inner = inner * self._own
        if self._joined:
            return self._base[0](torch.cat((x, inner), dim=-1))
        outputs = self._base[0](x)
        outputs.view(-1, outputs.shape[-1]).addmm_(inner.view(-1, inner.shape[-1]), self._up)
        return outputs


def _plain(layers: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor | None]]:
    """Weights and biases, joined if they are to be packed: packing copies them anyway."""
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        pairs.append((layer.weight, layer.bias))
    if len(pairs) == 1 or not packs(pairs[0][0]):
        return pairs
    zeros = [weight.new_zeros(weight.shape[0]) if bias is None else bias for weight, bias in pairs]
    has_bias = any(bias is not None for _, bias in pairs)
    return [(torch.cat([weight for weight, _ in pairs]), torch.cat(zeros) if has_bias else None)]


def _low_rank(layer: FoldedLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """All A one below the other, all scaled B side by side, and which of the columns between are whose.

    Returns:
        down (D, in) and up (out, D), D the sum of all ranks; own (N, 1, D) of ones and zeros, None for N = 1.
    """
    down, up = layer.low_rank(layer.weight.dtype)
    num_specialists, _, rank = down.shape
    own = torch.eye(num_specialists, dtype=up.dtype, device=up.device).repeat_interleave(rank, dim=1)
    return (
        down.transpose(1, 2).flatten(0, 1).contiguous(),
        up.flatten(0, 1).t().contiguous(),
        own.unsqueeze(1) if num_specialists > 1 else None,
    )
