"""Folded adapters: joined layers, both ways of computing, refusals. Equality with PEFT is in tests/parity."""

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import save_adapter, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.modeling.lora import Adapter, FoldedLinear, fold_adapters, unfold
from ultrafuser.modeling.specialists import AdapterSpecialists

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q", "v"]}
N, B, T = 3, 2, 4


class Block(nn.Module):
    """Sibling layers, one with a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(6, 6), nn.Linear(6, 4, bias=False), nn.Linear(6, 4)
        self.o_proj = nn.Linear(6, 6, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(generator=generator)


def random_adapter(model: nn.Module, seed: int, **settings) -> Adapter:
    """An adapter whose B is not zero."""
    adapter = Adapter.initial(model, {**CONFIG, **settings}, seed)
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        adapter.config,
        {key: 0.3 * torch.randn(t.shape, generator=generator) for key, t in adapter.weights.items()},
    )


def adapters_of(model: nn.Module) -> list[Adapter]:
    """Different ranks, layers and scalings; the last changes nothing."""
    return [
        random_adapter(model, 1, target_modules=["q_proj", "v_proj"]),
        random_adapter(model, 2, target_modules="all-linear", r=5, use_rslora=True),
        Adapter.bare(),
    ]


def by_hand(linear: nn.Linear, path: str, adapter: Adapter, x: Tensor) -> Tensor:
    if f"{path}.lora_A.weight" not in adapter.weights:
        return linear(x)
    down, up = adapter.weights[f"{path}.lora_A.weight"], adapter.weights[f"{path}.lora_B.weight"]
    scaling = adapter.config["lora_alpha"] / adapter.config["r"] ** (
        0.5 if adapter.config.get("use_rslora") else 1
    )
    return linear(x) + scaling * (x @ down.T @ up.T)


@pytest.fixture
def folded():
    """The block before and after folding, and its adapters."""
    plain, block = Block(), Block()
    adapters = adapters_of(block)
    layers = fold_adapters(block, adapters)
    assert [layer.paths for layer in layers] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    return plain, block, adapters, layers


def x_of(seed: int = 0, *shape: int) -> Tensor:
    return torch.randn(*(shape or (N * B, T, 6)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("same", [True, False], ids=["one input", "inputs of their own"])
@pytest.mark.parametrize("order", [["q_proj", "k_proj", "v_proj"], ["v_proj", "q_proj", "k_proj", "o_proj"]])
def test_joined_layers_give_what_each_gave_alone(folded, grad, same, order):
    plain, block, adapters, _ = folded
    for repeat in range(2):  # a second pass must not see what the first left behind
        shared = x_of(repeat)
        for position, name in enumerate(order):
            x = shared if same else x_of(10 * repeat + position)
            with torch.set_grad_enabled(grad):
                output = getattr(block, name)(x)
            for index, (rows, out) in enumerate(zip(x.split(B), output.split(B), strict=True)):
                expected = by_hand(getattr(plain, name), name, adapters[index], rows)
                assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5), (name, index)


def test_the_joined_product_is_computed_once(folded, monkeypatch):
    _, block, _, (joined, _) = folded
    calls = []
    original = FoldedLinear.forward
    monkeypatch.setattr(FoldedLinear, "forward", lambda self, x: calls.append(1) or original(self, x))
    x = x_of()
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(block, name)(x)
    assert len(calls) == 1
    assert joined._waiting.input is None  # nothing is kept alive
    block.q_proj(x)
    block.q_proj(x)  # asked again for the same: not handed out twice, since it may have been changed in place
    assert len(calls) == 3


def test_rows_may_come_flattened(folded):
    """Some architectures hand their layers (tokens, H)."""
    _, block, _, _ = folded
    x = x_of()
    with torch.no_grad():
        assert torch.equal(block.o_proj(x.flatten(0, 1)), block.o_proj(x).flatten(0, 1))


@pytest.mark.parametrize(
    "change",
    ["in place", "optimiser", "fused optimiser", "load_state_dict", "another tensor", "dtype and back"],
)
def test_assembled_parts_follow_every_change(folded, change):
    _, _, _, (_, layer) = folded
    x = x_of()
    with torch.no_grad():
        before = layer(x)
        assert layer._assembled is not None
    (up,) = layer.lora_B
    if "optimiser" in change:
        layer.requires_grad_(True)
        (layer(x) ** 2).sum().backward()
        torch.optim.AdamW(layer.parameters(), lr=0.1, fused=change.startswith("fused") or None).step()
    elif change == "in place":
        with torch.no_grad():
            up.mul_(2)
    elif change == "load_state_dict":
        layer.load_state_dict({key: tensor * 2 for key, tensor in layer.state_dict().items()})
    elif change == "another tensor":
        up.data = up.data * 2
    else:
        layer.to(torch.float64).to(torch.float32)
    with torch.no_grad():
        after = layer(x)
    expected = layer(x).detach()  # grad mode assembles nothing
    assert torch.allclose(after, expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(after, before) == (change == "dtype and back")


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_bfloat16_base_and_autocast_stay_near_float32(folded, grad):
    _, _, _, (_, layer) = folded
    x = x_of()
    with torch.set_grad_enabled(grad):
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = layer(x)
        layer.weight.data = layer.weight.data.bfloat16()  # adapters stay in their own dtype
        half = layer(x.bfloat16())
    for rough in (cast, half):
        assert rough.dtype == torch.bfloat16
        assert (rough.float() - expected).norm() / expected.norm() < 0.02


def test_padded_ranks_and_untouched_layers_stay_zero_under_training():
    model = tiny_model()
    adapters = {
        "small": random_adapter(model, 1, r=2, target_modules=["q_proj"]),
        "large": random_adapter(model, 2, r=4, target_modules=["q_proj", "v_proj"]),
        "bare": Adapter.bare(),
    }
    bank = AdapterSpecialists(model, adapters)
    before = {name: bank.adapter_tensors(name) for name in adapters}
    assert [len(tensors) for tensors in before.values()] == [4, 8, 0]
    for parameter in bank.lora_parameters():
        parameter.requires_grad_(True)
    optimiser = torch.optim.AdamW(bank.lora_parameters(), lr=0.05, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        sum(state.square().sum() for state in bank(torch.randint(0, 300, (2, 3, 4)))).backward()
        optimiser.step()
    for layer in bank.folded_layers:
        for path, down, up in layer.lora_tensors():
            q, v = path.endswith("q_proj"), path.endswith("v_proj")
            for index, rank in enumerate((2 * q, 4 * (q or v), 0)):
                assert not down[index, rank:].any()
                assert not up[index, :, rank:].any()
                assert rank == 0 or up[index, :, :rank].any()


def test_state_is_views_and_survives_a_round_trip():
    def build(seed: int) -> AdapterSpecialists:
        model = tiny_model("qwen2", tied=True, seed=seed)
        lora = random_adapter(model, seed, target_modules=["k_proj", "up_proj"])
        return AdapterSpecialists(model, {"a": lora, "b": Adapter.bare()})

    bank, other = build(1), build(2)
    tensors = {key: tensor.clone() for key, tensor in bank.state_tensors().items()}
    assert {key.split(".")[0] for key in tensors} == {"base", "specialists"}
    assert {key.removeprefix("base.") for key in tensors if key.startswith("base.")} == {
        key for key in tiny_model("qwen2", tied=True).state_dict() if key != "lm_head.weight"
    }
    ids = torch.arange(12).view(1, 2, 6)
    with torch.no_grad():
        expected = bank(ids)
        assert not torch.allclose(other(ids)[0], expected[0])
        other.load_tensors(tensors)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(other(ids), expected, strict=True))
        merged = other.merged_tensors("a")
    plain = tiny_model("qwen2", tied=True)
    plain.load_state_dict(merged, strict=False)
    with torch.no_grad():
        assert torch.allclose(plain.model(ids[:, 0]).last_hidden_state, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_adapter_in_few_bits_does_not_round_the_others(order):
    model = tiny_model("qwen2")
    fine, coarse = (random_adapter(model, seed, target_modules=["q_proj"]) for seed in (1, 2))
    coarse = Adapter(coarse.config, {name: tensor.bfloat16() for name, tensor in coarse.weights.items()})
    adapters = [(fine, coarse)[index] for index in order]
    layer, *_ = fold_adapters(model, adapters)
    path, down, _ = next(layer.lora_tensors())
    assert torch.equal(down[order.index(0)], fine.weights[f"{path}.lora_A.weight"])


def test_unfold_leaves_plain_layers_with_the_adapter_merged():
    model = tiny_model("qwen2").double()  # W x + B A x against (W + B A) x: float32 would round them apart
    adapter = random_adapter(model, 1, target_modules="all-linear")
    names = {name: type(module) for name, module in model.named_modules()}
    ids = torch.arange(6).unsqueeze(0)
    layers = fold_adapters(model, [adapter])
    with torch.no_grad():
        expected = model(ids).logits
        unfold(model, layers)
        assert torch.allclose(model(ids).logits, expected, rtol=1e-6, atol=1e-6)  # norms stay in float32
    assert {name: type(module) for name, module in model.named_modules()} == names


def test_a_fresh_adapter_changes_nothing_and_follows_its_seed():
    model, ids = tiny_model(), torch.arange(6).unsqueeze(0)
    settings = {**CONFIG, "target_modules": "all-linear"}
    first, again, other = (Adapter.initial(model, settings, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.weights[key], again.weights[key]) for key in first.weights)
    key = "model.layers.0.mlp.up_proj.lora_A.weight"
    assert not torch.equal(first.weights[key], other.weights[key])
    assert first.weights[key].abs().max() <= 32**-0.5
    assert not any("lm_head" in key for key in first.weights)
    with torch.no_grad():
        expected = model(ids).logits
        fold_adapters(model, [first])
        assert torch.allclose(model(ids).logits, expected, atol=1e-6)
    with pytest.raises(UltrafuserError, match=r"name no linear layer of the base. Linear layers: .*q_proj"):
        Adapter.initial(tiny_model(), {**CONFIG, "target_modules": ["attn"]})


def test_layers_to_transform_are_written_as_paths():
    model = tiny_model()
    adapter = Adapter.initial(model, {**CONFIG, "target_modules": ["q_proj"]})
    first = {key: tensor for key, tensor in adapter.weights.items() if "layers.0" in key}
    assert adapter.explicit_config(model)["target_modules"] == ["q_proj"]
    partial = Adapter(adapter.config, first).explicit_config(model)
    assert partial["target_modules"] == ["model.layers.0.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported.*merge_and_unload"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern="),
        ({"alpha_pattern": {"v_proj": 2}}, "alpha_pattern="),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens="),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication="),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* fits no linear layer .*not of embeddings, heads"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.* fits no linear layer"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # PEFT says itself that some of these are unusual
def test_adapters_that_are_more_than_low_rank_updates_are_refused(tmp_path, lora, message):
    """Made by PEFT itself."""
    folder = Path(save_adapter(tmp_path, tiny_model(), **lora))
    with pytest.raises(CheckpointError, match=message):
        fold_adapters(tiny_model(), [Adapter.from_folder(folder)])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"target_parameters": ["experts.down"]}, "target_parameters="),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
        ({"lora_alpha": None}, "lora_alpha is missing"),
        ({"r": 8}, r"lora_A.weight has shape \(4, 32\), expected \(8, 32\) for the base's layer and rank 8"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, edit, message):
    folder = Path(save_adapter(tmp_path, tiny_model()))
    settings = json.loads((folder / "adapter_config.json").read_text()) | edit
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        fold_adapters(tiny_model(), [Adapter.from_folder(folder)])


def test_an_adapter_of_another_base_or_half_of_one_is_refused(tmp_path):
    folder = Path(save_adapter(tmp_path, tiny_model()))
    adapter = Adapter.from_folder(folder)
    with pytest.raises(CheckpointError, match=r"shape \(4, 32\), expected \(4, 40\).*Use the base model"):
        fold_adapters(tiny_model(hidden_size=40), [adapter])
    with pytest.raises(CheckpointError, match="fits no linear layer of the base"):
        fold_adapters(tiny_model("gpt_neox"), [adapter])
    with pytest.raises(CheckpointError, match="fits no linear layer of the base"):
        fold_adapters(tiny_model("gpt2"), [adapter])
    weights = load_file(folder / "adapter_model.safetensors")
    del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"only one of lora_A and lora_B for model.layers.0.self_attn.q_proj"
    ):
        fold_adapters(tiny_model(), [Adapter.from_folder(folder)])


def test_layers_of_routed_experts_are_refused():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(4, 4)])

    routed = nn.Sequential()
    routed.add_module("mlp", Routed())
    weights = {
        "mlp.experts.0.lora_A.weight": torch.zeros(3, 4),
        "mlp.experts.0.lora_B.weight": torch.zeros(4, 3),
    }
    with pytest.raises(CheckpointError, match="not of embeddings, heads or routed experts"):
        fold_adapters(routed, [Adapter(CONFIG, weights)])


def test_models_can_be_copied_and_moved_after_folding():
    """deepcopy and dtype changes must keep joined siblings together."""
    model = tiny_model()
    bank = AdapterSpecialists(model, {"a": random_adapter(model, 1, target_modules=["q_proj", "v_proj"])})
    twin, ids = copy.deepcopy(bank), torch.arange(6).view(1, 1, 6)
    with torch.no_grad():
        expected = bank(ids)[0]
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(bank(ids)[0], expected)
        assert not torch.allclose(twin(ids)[0], expected)
        assert torch.allclose(bank.double()(ids)[0].float(), expected, atol=1e-5)
