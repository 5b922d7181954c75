"""Layers made ready for decoding give what the layers themselves give."""

import copy

import pytest
import torch
from conftest import random_adapter, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from ultrafuser.decoding import projection
from ultrafuser.decoding.projection import (
    PackedLinear,
    Projection,
    QuantizedLinear,
    can_quantize,
    quantized_projection,
    working_dtype,
)
from ultrafuser.modeling.lora import Adapter, fold_adapters

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of one bfloat16 result and of what it is summed from, for numbers of size 1 to 4.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 0.04},
    torch.float16: {"rtol": 2**-9, "atol": 0.01},
}
ON_CPU = torch.device("cpu")
needs_quantization = pytest.mark.skipif(not can_quantize(ON_CPU), reason="FBGEMM is for x86 processors")


@pytest.fixture(autouse=True)
def small_weights_are_packed_too(monkeypatch):
    monkeypatch.setattr(projection, "_LEAST_PACKED", 0)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(in_size: int, out_size: int, bias: bool, seed: int, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(in_size, out_size, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(noise(out_size, in_size, seed=seed) / in_size**0.5)
        if bias:
            layer.bias.copy_(noise(out_size, seed=seed + 1))
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 3, 1), (2, 1, 40)])
@torch.inference_mode()
def test_a_packed_layer_is_the_layer(dtype, bias, rows):
    layer = linear(33, 70, bias, seed=1, dtype=dtype)
    x = noise(*rows, 33, dtype=dtype)
    output = PackedLinear(layer.weight, layer.bias)(x)
    assert output.dtype == working_dtype(layer.weight)
    assert output.shape == (*rows, 70)
    assert torch.allclose(output.to(dtype), layer(x), **TOLERANCE[dtype])
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    assert torch.allclose(output.double(), exact, **TOLERANCE[dtype])


@torch.inference_mode()
def test_small_weights_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(projection, "_LEAST_PACKED", 64)
    x = noise(3, 8)
    for size, packed in ((7, False), (8, True)):
        weight = noise(size, 8, seed=1)
        assert projection._packs(weight) == (packed and torch.backends.mkldnn.is_available())
        assert torch.allclose(PackedLinear(weight)(x), F.linear(x, weight), **TOLERANCE[torch.float32])


@torch.inference_mode()
def test_a_packed_layer_reads_weights_that_lie_apart():
    weight = noise(64, 200, dtype=torch.bfloat16)[:, 20:52]
    x = noise(5, 32, seed=3, dtype=torch.bfloat16)
    assert torch.allclose(
        PackedLinear(weight)(x).bfloat16(), F.linear(x, weight), **TOLERANCE[torch.bfloat16]
    )


@torch.inference_mode()
def test_weights_beyond_the_range_of_float16_stay_as_they_are():
    weight = noise(8, 4, dtype=torch.bfloat16)
    weight[3, 1] = 1e6
    x = noise(2, 4, seed=1, dtype=torch.bfloat16)
    assert torch.allclose(
        PackedLinear(weight)(x).bfloat16(), F.linear(x, weight), **TOLERANCE[torch.bfloat16]
    )


@needs_quantization
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_a_quantized_layer_is_nearly_the_layer(dtype, bias):
    layer = linear(96, 70, bias, seed=1, dtype=dtype)
    layer.weight[5] = 0  # a row whose scale would be 0
    x = noise(2, 3, 96, dtype=dtype)
    output = QuantizedLinear(layer.weight, layer.bias)(x)
    assert output.dtype == dtype
    assert output.shape == (2, 3, 70)
    difference = (output.float() - layer(x).float()).abs().max()
    assert 0 < difference < 0.1


@needs_quantization
@torch.no_grad()
def test_a_quantized_projection_has_one_specialist_s_update():
    base = tiny_model("qwen2", seed=1)
    plain = copy.deepcopy(base)
    adapters = [random_adapter(base, seed=seed, r=4, lora_alpha=64) for seed in range(2)]
    fold_adapters(base, adapters)
    names = ["q_proj", "k_proj", "v_proj"]
    path = "model.layers.1.self_attn"
    x = noise(3, plain.get_submodule(f"{path}.q_proj").in_features, seed=5)
    expected = [
        torch.cat(
            [updated(plain.get_submodule(f"{path}.{n}"), adapter, f"{path}.{n}", x) for n in names], dim=-1
        )
        for adapter in adapters
    ]
    for specialist, wanted in enumerate(expected):
        output = quantized_projection([base.get_submodule(f"{path}.{n}") for n in names], specialist)(x)
        errors = [float((output - other).abs().mean()) for other in expected]
        assert errors[specialist] < 0.05 * wanted.abs().mean()
        assert errors[1 - specialist] > 5 * errors[specialist]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)], ids=str)
@torch.inference_mode()
def test_plain_layers_stand_side_by_side(dtype, biases):
    layers = [linear(24, 8 * (i + 1), bias, seed=i, dtype=dtype) for i, bias in enumerate(biases)]
    x = noise(2, 1, 3, 24, seed=7, dtype=dtype)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    assert torch.allclose(Projection(layers)(x).to(dtype), expected, **TOLERANCE[dtype])
    assert torch.allclose(Projection(layers[:1])(x).to(dtype), layers[0](x), **TOLERANCE[dtype])


ADAPTERS = [
    {"r": 4, "lora_alpha": 8},
    {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "o_proj", "up_proj"]},
    None,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_specialists", [1, 3])
@torch.no_grad()
def test_folded_layers_give_every_specialist_its_own_update(dtype, num_specialists):
    base = tiny_model("qwen2", seed=1).to(dtype)  # biases on q, k and v
    plain = copy.deepcopy(base)
    adapters = [
        Adapter.bare() if lora is None else random_adapter(base, seed=seed, **lora)
        for seed, lora in enumerate(ADAPTERS[:num_specialists])
    ]
    fold_adapters(base, adapters)
    groups = {
        "self_attn": [["q_proj", "k_proj", "v_proj"], ["o_proj"]],
        "mlp": [["gate_proj", "up_proj"], ["down_proj"]],
    }
    for parent, sibling_groups in groups.items():
        for names in sibling_groups:
            path = f"model.layers.1.{parent}"
            folded = Projection([base.get_submodule(f"{path}.{name}") for name in names])
            originals = {name: plain.get_submodule(f"{path}.{name}") for name in names}
            size = originals[names[0]].in_features
            x = noise(2, num_specialists, 3, size, seed=5, dtype=dtype)
            output = folded(x)
            for index, adapter in enumerate(adapters):
                parts = [
                    updated(layer, adapter, f"{path}.{name}", x[:, index])
                    for name, layer in originals.items()
                ]
                expected = torch.cat(parts, dim=-1)
                difference = (output[:, index].float() - expected).abs().max() / expected.abs().max()
                assert difference < (1e-6 if dtype == torch.float32 else 2**-7), (names, index)


def updated(layer: nn.Linear, adapter: Adapter, path: str, x: Tensor) -> Tensor:
    """The layer's output with one adapter, in float32."""
    weight, bias = layer.weight.float(), None if layer.bias is None else layer.bias.float()
    down = adapter.weights.get(f"{path}.lora_A.weight")
    if down is not None:
        weight = weight + adapter.scaling() * adapter.weights[f"{path}.lora_B.weight"] @ down
    return F.linear(x.float(), weight, bias)
