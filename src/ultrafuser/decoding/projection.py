"""Linear layers made ready for decoding: joined, laid out for the processor, with all adapters in two products."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ultrafuser.modeling.lora import FoldedLinear, folded_layer

Product = Callable[[Tensor], Tensor]
"""(..., in) -> (..., out)."""

# For how many rows oneDNN lays weights out: passes of a few rows are what decoding and verifying drafts consist of.
_FLOAT32_ROWS, _BFLOAT16_ROWS = 8, 1
# Float32 weights fewer than this, an adapter's mostly, cost more to hand to oneDNN than to multiply.
_LEAST_PACKED = 2**17
_LARGEST_HALF = torch.finfo(torch.float16).max


class PackedLinear:
    """A frozen linear map, in the layout in which this device multiplies a few rows fastest.

    On a CPU the weights are kept a second time: in oneDNN's own layout, or, where the processor has no arithmetic for
    the 16-bit type they are in, as float16 that FBGEMM multiplies with float32 (`docs/log.md` has what that saves).
    Everything else is multiplied as it lies.

    Args:
        weight: float, (out, in).
        bias: float, (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        if _in_onednn(weight):
            self._product = _onednn_product(weight, bias)
        elif _as_half(weight):
            self._product = _half_product(weight, bias)
        else:
            self._product = lambda x: F.linear(x.to(weight.dtype), weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the `working_dtype` of the weight. Inputs are brought into it."""
        return self._product(x)


class QuantizedLinear:
    """A linear map with 8-bit weights (one scale a row) and, at every call, inputs rounded to 8 bits: fast, not exact.

    Args:
        weight: float, (out, in), on the CPU.
        bias: float, (out,), or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        scales = weight.detach().double().abs().amax(dim=1).clamp(min=1e-8) / 127
        zeros = torch.zeros(len(scales), dtype=torch.int64)
        with (
            warnings.catch_warnings()
        ):  # of the type's removal in some later PyTorch: `can_quantize` will then say no
            warnings.simplefilter("ignore", UserWarning)
            quantized = torch.quantize_per_channel(weight.detach().float(), scales, zeros, 0, torch.qint8)
        self._packed = torch.ops.quantized.linear_prepack(quantized, None if bias is None else bias.float())

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of x."""
        # Inputs get seven of the eight bits: with all of them, older processors overflow.
        return torch.ops.quantized.linear_dynamic(x.float(), self._packed, True).to(x.dtype)


def can_quantize(device: torch.device) -> bool:
    """Whether `QuantizedLinear` works on a device: on x86 CPUs, for which PyTorch brings FBGEMM."""
    engines = torch.backends.quantized.supported_engines
    return device.type == "cpu" and "fbgemm" in engines and hasattr(torch, "quantize_per_channel")


def working_dtype(weight: Tensor) -> torch.dtype:
    """The type in which numbers go from layer to layer: the weights', or float32 where the CPU cannot compute in it."""
    return torch.float32 if not _in_onednn(weight) and _as_half(weight) else weight.dtype


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
            pairs = (
                [_plain(layers)] if _packs(_plain(layers[:1])[0]) else [_plain([layer]) for layer in layers]
            )
            self._base = [PackedLinear(weight, bias) for weight, bias in pairs]
            return
        down, up, self._own = _low_rank(folded)
        self._down = PackedLinear(down)
        self._joined = _packs(folded.weight)
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
        outputs.view(-1, outputs.shape[-1]).addmm_(
            inner.view(-1, inner.shape[-1]).to(outputs.dtype), self._up
        )
        return outputs


def quantized_projection(layers: Sequence[nn.Module], specialist: int) -> QuantizedLinear:
    """One specialist's layers over the same input, as one in 8 bits; its low-rank update is merged in.

    Args:
        layers: as for `Projection`.
        specialist: index among the folded adapters; of no meaning for plain layers.
    """
    folded = folded_layer(layers[0])
    if folded is None:
        return QuantizedLinear(*_plain(layers))
    return QuantizedLinear(torch.cat([weight for _, weight in folded.merged_weight(specialist)]), folded.bias)


def _in_onednn(weight: Tensor) -> bool:
    if not weight.is_cpu or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32 and weight.numel() < _LEAST_PACKED:
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported())


def _as_half(weight: Tensor) -> bool:
    """Whether FBGEMM is at hand for 16-bit weights, which must be within the range of float16."""
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    return narrow and can_quantize(weight.device) and float(weight.detach().abs().max()) <= _LARGEST_HALF


def _packs(weight: Tensor) -> bool:
    return _in_onednn(weight) or _as_half(weight)


def _onednn_product(weight: Tensor, bias: Tensor | None) -> Product:
    rows = _FLOAT32_ROWS if weight.dtype == torch.float32 else _BFLOAT16_ROWS
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), rows)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x.to(weight.dtype), packed, bias, "none", [], "")


def _half_product(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
    multiply = torch.ops.quantized.linear_dynamic_fp16
    return lambda x: multiply(x.float(), packed)


def _plain(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of plain layers, joined."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        weights.append(layer.weight)
        biases.append(layer.bias)
    if len(layers) == 1:
        return weights[0], biases[0]
    has_bias = any(bias is not None for bias in biases)
    filled = [w.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(filled) if has_bias else None


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
