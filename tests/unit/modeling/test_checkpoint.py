"""Fused checkpoints: written, opened and exported without a difference, and refused with a reason."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import fused_over, randomise_gate, save_adapter, save_model, tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ultrafuser import FusedModel, SpecialistSource, UltraFuserForCausalLM, fuse, open_fused, save_fused
from ultrafuser.errors import CheckpointError, TemplateError, UltrafuserError
from ultrafuser.fusion import fused_logits
from ultrafuser.modeling import checkpoint
from ultrafuser.modeling.configuration import without_sources
from ultrafuser.modeling.export import export_adapter, export_specialist
from ultrafuser.modeling.specialists import WholeSpecialists

IDS = torch.tensor([[5, 9, 200, 31, 77, 4], [8, 8, 120, 6, 250, 11]])

KINDS = {
    "whole tied": ["llama-tied", "phi-tied"],
    "whole untied": ["llama", "gpt_neox"],
    "whole with a merged adapter": ["llama", ("llama", {"r": 3})],
    "adapters tied": [("llama-tied", {"r": 3}), ("llama-tied", {"r": 5, "target_modules": "all-linear"})],
    "adapters untied with bare base": ["qwen2", ("qwen2", {"use_rslora": True})],
}


@pytest.fixture(scope="module")
def build(tmp_path_factory, tokenizer):
    """Sources of a kind of fused model, each model and adapter a folder of its own."""
    root = tmp_path_factory.mktemp("specialists")
    made: dict[str, object] = {}

    def sources(kind: str) -> dict[str, SpecialistSource]:
        named = {}
        for index, part in enumerate(KINDS[kind]):
            name, lora = part if isinstance(part, tuple) else (part, None)
            folder = root / name
            if name not in made:
                made[name] = tiny_model(name.removesuffix("-tied"), tied=name.endswith("-tied"), seed=index)
                save_model(folder, made[name], tokenizer)
            adapter = None
            if lora is not None:
                adapter = save_adapter(root / f"{kind}{index}", made[name], seed=index, **lora)
            named[f"s{index}-{name[:3]}"] = SpecialistSource(model=str(folder), adapter=adapter)
        return named

    return sources


@pytest.fixture(scope="module", params=KINDS)
def fused(request, build) -> FusedModel:
    bank = "whole" if request.param.startswith("whole") else "auto"
    fused = fuse(build(request.param), bank=bank, gate_form="per_specialist", gate_size=16)
    assert fused.model.config.bank == request.param.split()[0]
    randomise_gate(fused.model.gate)
    return fused


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


def one_hot(fused: FusedModel, name: str) -> torch.Tensor:
    """One specialist's logits out of the fused model, by its bank alone."""
    bank = fused.model.bank
    index = bank.names.index(name)
    with torch.no_grad():
        states = fused.model.hidden_states(IDS.unsqueeze(1).expand(-1, len(bank.names), -1))[index]
    heads = bank.heads()
    return fused_logits([states], torch.ones(*IDS.shape, 1), [heads[index % len(heads)]]).detach()


# --- written and opened -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_only", [False, True], ids=["self-contained", "gate-only"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_saved_and_opened_is_the_same(fused, tmp_path, gate_only, max_shard_size):
    fused.model.save_pretrained(tmp_path, gate_only=gate_only, max_shard_size=max_shard_size)
    weights = list(tmp_path.glob("*.safetensors"))
    assert (len(weights) > 1) == (max_shard_size == "20KB" and not gate_only)
    assert gate_only == (sum(path.stat().st_size for path in weights) < 30_000)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]
    expected = logits(fused.model)
    for opener in (UltraFuserForCausalLM, AutoModelForCausalLM):
        model = opener.from_pretrained(tmp_path)
        assert type(model) is UltraFuserForCausalLM
        assert not model.training
        assert torch.equal(logits(model), expected)
        assert model.specialist_names == fused.model.specialist_names
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(IDS, **settings), fused.model.generate(IDS, **settings))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "ultrafuser"
    assert config.gate_only == gate_only
    assert config.vocab_size == model.bank.vocab_size


def test_a_gate_only_checkpoint_becomes_self_contained_and_back(fused, tmp_path):
    expected, vocabulary = logits(fused.model), fused.tokenizer.get_vocab()
    for index, gate_only in enumerate((True, False, True)):
        folder = tmp_path / str(index)
        save_fused(fused, folder, gate_only=gate_only)
        fused = open_fused(folder)
        assert fused.tokenizer.get_vocab() == vocabulary
        assert torch.equal(logits(fused.model), expected)


def test_trained_specialists_are_saved_as_they_are(fused, tmp_path):
    model = copy.deepcopy(fused.model)
    trained = list(model.bank.lora_parameters()) or list(model.bank.parameters())
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(0.9)
    assert not torch.allclose(logits(model), logits(fused.model), atol=1e-3)
    model.config = without_sources(model.config)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path)), logits(model))
    with pytest.raises(UltrafuserError, match="no source that a gate could name"):
        model.save_pretrained(tmp_path / "gate", gate_only=True)


def test_specialists_from_memory_can_be_saved(tmp_path):
    model = fused_over(
        WholeSpecialists({"a": tiny_model("llama", tied=True), "b": tiny_model("qwen2", seed=1)})
    )
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("gate_only", [False, True], ids=["self-contained", "gate-only"])
def test_dtype_of_specialists_but_never_of_the_gate(fused, tmp_path, gate_only):
    fused.model.save_pretrained(tmp_path, gate_only=gate_only)
    for dtype, expected in (
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.float32),
    ):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert {head.weight.dtype for head in model.bank.heads()} == {expected}
        assert {parameter.dtype for parameter in model.gate.parameters()} == {torch.float32}
    model = UltraFuserForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = (logits(model) - logits(fused.model)).norm() / logits(fused.model).norm()
    assert 0 < error < 0.1
    model.save_pretrained(tmp_path / "half")
    again = UltraFuserForCausalLM.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(UltrafuserError, match=r"dtype must be a torch dtype.*got 'flaot16'"):
        UltraFuserForCausalLM.from_pretrained(tmp_path, dtype="flaot16")


def test_generation_settings_and_attention_are_kept(fused, tmp_path):
    model = copy.deepcopy(fused.model)
    model.generation_config.update(temperature=0.3, do_sample=True, max_new_tokens=3)
    model.save_pretrained(tmp_path)
    again = UltraFuserForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", device_map="cpu")
    assert again.generation_config.temperature == 0.3
    assert again.generation_config.eos_token_id == 3
    assert again.generate(IDS).shape[1] <= IDS.shape[1] + 3
    assert {config._attn_implementation for config in again.bank.architectures()} == {"eager"}
    assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize("gate_only", [False, True], ids=["self-contained", "gate-only"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_specialist_gets_the_attention_that_is_asked_for(fused, tmp_path, gate_only, implementation):
    fused.model.save_pretrained(tmp_path, gate_only=gate_only)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert {config._attn_implementation for config in model.bank.architectures()} == {implementation}
    assert torch.allclose(logits(model), logits(fused.model), atol=1e-5)
    with pytest.raises(ValueError, match="fastest"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fastest")


@pytest.mark.parametrize(
    "device_map", ["meta", {"": "meta"}, {"bank": "meta", "gate": "meta"}, torch.device("meta")], ids=str
)
def test_the_whole_model_goes_to_one_device(saved, device_map):
    model = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    present = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    assert AutoModelForCausalLM.from_pretrained(saved, device_map="auto").device.type == present.type


@pytest.mark.parametrize("first", [{"max_shard_size": "20KB"}, {}, {"gate_only": True}], ids=str)
@pytest.mark.parametrize("then", [{"max_shard_size": "20KB"}, {}, {"gate_only": True}], ids=str)
def test_a_newer_checkpoint_replaces_an_older_one(build, tmp_path, first, then):
    old = fuse(build("whole tied"), gate_size=16).model
    new = fuse(build("adapters tied"), gate_size=8).model
    randomise_gate(new.gate)
    old.save_pretrained(tmp_path, **first)
    new.save_pretrained(tmp_path, **then)
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path)), logits(new))


def test_a_write_that_stops_halfway_is_no_checkpoint(fused, tmp_path, monkeypatch):
    fused.model.save_pretrained(tmp_path, max_shard_size="20KB")
    moved = []

    def replace(source, target):
        if moved:
            raise OSError("disk full")
        moved.append(shutil.move(source, target))

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        fused.model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        UltraFuserForCausalLM.from_pretrained(tmp_path)


def test_whoever_may_read_the_configuration_may_read_the_weights(fused, tmp_path):
    fused.model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_weights_are_written_from_where_they_are(build, tmp_path, monkeypatch, max_shard_size):
    """Joined layers are saved as views; only low-rank parts cut out of a padded stack are copied first."""
    model = fuse(build("adapters tied"), gate_size=16).model
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    copied, base = [], sum(tensor.nbytes for tensor in model.bank.base_tensors().values())

    def save(tensors, path, metadata):
        copied.append(sum(t.nbytes for t in tensors.values() if t.untyped_storage().data_ptr() not in held))
        save_file(tensors, path, metadata)
        sizes.append(path.stat().st_size)

    sizes: list[int] = []
    monkeypatch.setattr(checkpoint, "save_file", save)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert sum(copied) < base / 10
    assert max(sizes) < 60_000 or max_shard_size == "5GB"
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (len(sizes) > 1) == (max_shard_size == "40KB")
    if index.is_file():
        listed = json.loads(index.read_text())
        found = {key: path.name for path in tmp_path.glob("*.safetensors") for key in load_file(path)}
        assert listed["weight_map"] == found
        assert listed["metadata"]["total_size"] == sum(
            t.nbytes for path in tmp_path.glob("*.safetensors") for t in load_file(path).values()
        )


def test_other_processes_write_nothing(fused, tmp_path):
    fused.model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


# --- exports ----------------------------------------------------------------------------------------------------


def test_an_exported_specialist_is_a_plain_model(fused, tmp_path):
    for name in fused.model.specialist_names:
        export_specialist(fused.model, name, tmp_path / name)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(plain).__module__.startswith("transformers.")
        assert torch.allclose(logits(plain), one_hot(fused, name), rtol=1e-5, atol=1e-5)
    with pytest.raises(UltrafuserError, match="no specialist 'law'; there are s0-"):
        export_specialist(fused.model, "law", tmp_path / "law")


def test_an_exported_adapter_opens_with_peft(fused, tmp_path):
    for member in fused.model.config.members:
        if member.adapter_config is None:
            with pytest.raises(
                UltrafuserError, match=r"has no adapter of its own. Export it as a whole model"
            ):
                export_adapter(fused.model, member.name, tmp_path / member.name)
            continue
        export_adapter(fused.model, member.name, tmp_path / member.name)
        base = AutoModelForCausalLM.from_pretrained(member.model)
        plain = PeftModel.from_pretrained(base, tmp_path / member.name).eval()
        assert torch.allclose(logits(plain), one_hot(fused, member.name), rtol=1e-5, atol=1e-5)
        own = load_file(Path(member.adapter) / "adapter_model.safetensors")
        written = load_file(tmp_path / member.name / "adapter_model.safetensors")
        assert own.keys() == written.keys()
        assert all(torch.equal(own[key], written[key]) for key in own)


# --- refusals: checkpoints --------------------------------------------------------------------------------------


@pytest.fixture
def saved(build, tmp_path) -> Path:
    """A self-contained checkpoint with its tokenizer, to be damaged."""
    save_fused(fuse(build("whole tied"), gate_size=16), tmp_path / "saved")
    return tmp_path / "saved"


def edit_tensors(folder: Path, edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, edit) -> None:
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


def drop(prefix: str):
    def edit(tensors) -> None:
        for key in [key for key in tensors if key.startswith(prefix)]:
            del tensors[key]

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("specialists.s1-phi."), r"lacks \d+ tensors of specialists.s1-phi \(first: specialists.s1-phi."),
        (drop("specialists.s0-lla.model.layers.1.mlp.up_proj"), r"lacks 1 tensors of specialists.s0-lla"),
        (drop("gate.networks.0.2"), r"gate.networks.0.2.weight: missing"),
        (lambda t: t.update({"specialists.s7.x": torch.zeros(1)}), r"holds 1 tensors .*first: specialists.s7.x"),
        (lambda t: t.update({"gate.networks.1.0.bias": torch.zeros(16)}), "gate .* does not fit"),
        (lambda t: t.update({"gate.networks.0.0.bias": torch.zeros(3)}), r"gate.networks.0.0.bias: \(3,\)"),
        (lambda t: t.update({"specialists.s1-phi.lm_head.bias": torch.ones(3)}), r"shape \(3,\), expected \(320,\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_the_configuration_are_refused(saved, edit, message):
    edit_tensors(saved, edit)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_damaged_or_unfinished_folder_is_refused(saved, build, tmp_path):
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        UltraFuserForCausalLM.from_pretrained(saved)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        UltraFuserForCausalLM.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        UltraFuserForCausalLM.from_pretrained(tmp_path)
    plain = build("whole tied")["s0-lla"].model
    with pytest.raises(CheckpointError, match="no fused checkpoint"):
        UltraFuserForCausalLM.from_pretrained(plain)


def test_pickles_are_never_opened(saved):
    tensors = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").unlink()
    torch.save(tensors, saved / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickles \(pytorch_model.bin\), which are never loaded"):
        UltraFuserForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_remote_code": True, "load_in_8bit": True}, r"unknown options \['load_in_8bit'\]"),
        ({"dytpe": torch.float16}, r"unknown options \['dytpe'\]"),
        ({"device_map": {"a": "cpu", "b": "meta"}}, "device_map must name one device"),
        ({"device_map": "balanced"}, "device_map must be a device, .* got 'balanced'"),
    ],
)
def test_unknown_options_are_refused(saved, settings, message):
    with pytest.raises(UltrafuserError, match=message):
        UltraFuserForCausalLM.from_pretrained(saved, **settings)
    with pytest.raises(UltrafuserError, match="unknown options"):
        UltraFuserForCausalLM.from_pretrained(saved, "surplus")


@pytest.mark.parametrize("option", ["push_to_hub", "variant", "max_shard"])
def test_unknown_options_of_saving_are_refused(fused, tmp_path, option):
    with pytest.raises(UltrafuserError, match=rf"save_pretrained: \['{option}'\] is not supported"):
        fused.model.save_pretrained(tmp_path, **{option: "x"})
    with pytest.raises(UltrafuserError, match="safe_serialization=False"):
        fused.model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.iterdir())


UNALIGNED = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"


def test_a_template_that_cannot_be_aligned_is_refused_on_opening(saved):
    edit_json(saved / "config.json", lambda c: c["specialists"][1].update(template=UNALIGNED))
    for opener in (UltraFuserForCausalLM.from_pretrained, open_fused):
        with pytest.raises(TemplateError, match="'s1-phi' cannot be aligned"):
            opener(saved)


def test_remote_code_in_a_checkpoint_is_never_run(saved):
    edit_json(saved / "config.json", lambda c: c["specialists"][0]["model_config"].update(model_type="mine"))
    with pytest.raises(UltrafuserError, match="specialist s0-lla: architecture 'mine' is not one"):
        UltraFuserForCausalLM.from_pretrained(saved)


def test_a_checkpoint_without_tokenizer_opens_only_without_it(fused, tmp_path):
    fused.model.save_pretrained(tmp_path)
    UltraFuserForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_fused(tmp_path)
