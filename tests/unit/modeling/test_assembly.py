"""Specialists put together: what fits is fused and found again, the rest is refused with its reason."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import save_adapter, save_model, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ultrafuser import FusedModel, SpecialistSource, UltraFuserForCausalLM, fuse, save_fused
from ultrafuser.errors import CheckpointError, TemplateError, UltrafuserError

IDS = torch.tensor([[5, 9, 200, 31, 77, 4], [8, 8, 120, 6, 250, 11]])
UNALIGNED = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"


@torch.no_grad()
def logits(model, ids=IDS) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


@pytest.fixture
def folder(tmp_path, tokenizer):
    """Write one more model folder: architecture, settings, tokenizer."""

    def write(architecture: str = "llama", tokenizer=tokenizer, **settings) -> str:
        number = len(list(tmp_path.glob("model*")))
        return save_model(tmp_path / f"model{number}", tiny_model(architecture, **settings), tokenizer)

    return write


def fuse_models(*models: str, **settings) -> FusedModel:
    sources = {f"s{index}": SpecialistSource(model=model) for index, model in enumerate(models)}
    return fuse(sources, gate_size=8, **settings)


def test_vocabularies_that_differ_are_refused_with_their_tokens(folder, tmp_path):
    other = tiny_tokenizer()
    other.add_tokens(["<tool>"])
    with pytest.raises(CheckpointError, match=r"s0 and s1 have different vocabularies: 1 token .*'<tool>'"):
        fuse_models(folder(), folder(tokenizer=other))
    fused = fuse_models(
        folder(), folder(seed=1)
    )  # the same, found out only when a gate-only checkpoint is opened
    fused.model.save_pretrained(tmp_path / "gate", gate_only=True)
    other.save_pretrained(fused.model.config.members[1].model)
    with pytest.raises(CheckpointError, match=r"s0 and s1 have different vocabularies: .*'<tool>'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "gate")


def test_a_padded_vocabulary_is_cut_to_the_smallest(folder, tokenizer):
    fused = fuse_models(folder(vocab_size=320), folder(vocab_size=336, seed=1)).model
    assert fused.bank.vocab_size == fused.config.vocab_size == logits(fused).shape[-1] == 320
    with pytest.raises(CheckpointError, match=rf"has 300 rows, but the tokenizer has {len(tokenizer)}"):
        fuse_models(folder(), folder(vocab_size=300))


@pytest.mark.parametrize(
    ("architecture", "settings", "message"),
    [
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8}, "soft-capped .final_logit_softcapping=30"),
        (
            "hyperclovax",
            {"num_key_value_heads": 2, "logits_scaling": 2.0},
            "the head of HyperCLOVAXForCausalLM",
        ),
        ("mamba", {"state_size": 8}, "the cache of MambaForCausalLM"),
    ],
)
def test_architectures_that_cannot_be_fused_exactly_are_refused(folder, architecture, settings, message):
    with pytest.raises(UltrafuserError, match=message):
        fuse_models(folder(architecture, **settings))


def test_settings_that_do_not_fit_are_refused(folder, tmp_path):
    llama, neox = folder(), folder("gpt_neox")
    adapter = save_adapter(tmp_path / "adapter", tiny_model())
    with pytest.raises(UltrafuserError, match=r"shared needs equal hidden sizes, got \[32, 48\]"):
        fuse_models(llama, neox)
    with pytest.raises(UltrafuserError, match="bank must be one of whole, adapters, got 'both'"):
        fuse_models(llama, bank="both")
    with pytest.raises(UltrafuserError, match="bank adapters needs one base"):
        fuse_models(llama, neox, bank="adapters")
    with pytest.raises(UltrafuserError, match="at least one is needed"):
        fuse_models()
    with pytest.raises(UltrafuserError, match="specialist name '0' must be letters"):
        fuse({"0": SpecialistSource(model=llama)})
    with pytest.raises(UltrafuserError, match="end_token '<end>' is not in the vocabulary"):
        fuse_models(llama, end_token="<end>")
    with pytest.raises(TemplateError, match="template must be one of"):
        fuse({"a": SpecialistSource(model=llama, template="ultralmm")})
    with pytest.raises(TemplateError, match="'b' cannot be aligned"):
        fuse({"a": SpecialistSource(model=llama), "b": SpecialistSource(model=llama, template=UNALIGNED)})
    save_fused(fuse_models(llama), tmp_path / "fused")
    with pytest.raises(UltrafuserError, match="is a fused model itself"):
        fuse_models(str(tmp_path / "fused"))
    with pytest.raises(CheckpointError, match="fits no linear layer of the base"):
        fuse({"a": SpecialistSource(model=neox, adapter=adapter)})
    with pytest.raises(CheckpointError, match=r"has shape \(4, 32\), expected \(4, 40\)"):
        fuse({"a": SpecialistSource(model=folder(hidden_size=40), adapter=adapter)})


def test_the_tokenizers_template_is_each_specialists_own(folder):
    other = tiny_tokenizer()
    other.chat_template = other.chat_template.replace("<|im_start|>", "<s>")
    members = fuse_models(
        folder(), folder(tokenizer=other), folder(tokenizer=None, seed=1)
    ).model.config.members
    first, second, third = (member.template for member in members)
    assert "<|im_start|>" in first
    assert "<s>" in second
    assert third == first  # without a tokenizer of its own it shares the first one's


def test_end_tokens_must_be_agreed(folder):
    other = tiny_tokenizer()
    other.eos_token = "<s>"
    models = folder(), folder(tokenizer=other)
    with pytest.raises(UltrafuserError, match=r"do not agree on an end token: .*'s1': '<s>'"):
        fuse_models(*models)
    assert fuse_models(*models, end_token="<|im_end|>").model.config.eos_token_id == 3
    with pytest.raises(TemplateError, match=r"ends a response with '<\|im_end\|>', .* end token is '<s>'"):
        fuse_models(*models, end_token="<s>")
    with pytest.raises(UltrafuserError, match="none of the specialists' folders holds a tokenizer"):
        fuse_models(folder(tokenizer=None))


def test_dtypes_that_differ_are_refused_unless_one_is_asked_for(folder, tmp_path, tokenizer):
    half = save_model(tmp_path / "half", tiny_model(seed=1).bfloat16(), tokenizer)
    with pytest.raises(UltrafuserError, match=r"one dtype.*torch.float32.*torch.bfloat16"):
        fuse_models(folder(), half)
    assert fuse_models(folder(), half, dtype=torch.float32).model.dtype == torch.float32


def test_relative_folders_are_found_from_anywhere(folder, tmp_path, monkeypatch):
    folder()
    monkeypatch.chdir(tmp_path)
    adapter = Path(save_adapter(Path("adapter"), tiny_model()))
    fused = fuse({"a": SpecialistSource(model="model0", adapter=str(adapter))}, gate_size=8).model
    fused.save_pretrained("gate", gate_only=True)
    monkeypatch.chdir("/")
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")), logits(fused))


# --- specialists that change behind a gate-only checkpoint ------------------------------------------------------


def retrain(folder: str) -> None:
    """Replace weights by others of the same shapes, as somebody might who trains into the same folder again."""
    for file in Path(folder).glob("*.safetensors"):
        tensors = {name: tensor * 1.01 for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture
def adapters(folder, tmp_path) -> FusedModel:
    """Two adapters on one base."""
    base = folder()
    places = [save_adapter(tmp_path / f"adapter{seed}", tiny_model(), seed=seed) for seed in (1, 2)]
    sources = {f"s{i}": SpecialistSource(model=base, adapter=place) for i, place in enumerate(places)}
    return fuse(sources, gate_size=8)


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_a_gate_refuses_specialists_that_have_changed(adapters, tmp_path, part):
    adapters.model.save_pretrained(tmp_path / "gate", gate_only=True)
    adapters.model.save_pretrained(tmp_path / "all")
    expected, member = logits(adapters.model), adapters.model.config.members[1]
    place = getattr(member, part)
    retrain(place)
    names = "s0" if part == "model" else "s1"  # both stand on the one base
    message = rf"specialist {names}: the {part} at {place} is not the one .*expected fingerprint \w{{12}}, got \w{{12}}"
    for opener in (AutoModelForCausalLM, UltraFuserForCausalLM):
        with pytest.raises(CheckpointError, match=message):
            opener.from_pretrained(tmp_path / "gate")
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path / "all")), expected)


def test_a_gate_is_used_with_changed_specialists_on_demand(adapters, tmp_path):
    """As the refusal says; it is also how checkpoints without fingerprints open."""
    adapters.model.save_pretrained(tmp_path / "gate", gate_only=True)
    retrain(adapters.model.config.members[0].model)
    path = tmp_path / "gate" / "config.json"
    settings = json.loads(path.read_text())
    with pytest.raises(CheckpointError, match="set model_fingerprint of s0 to null"):
        UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")
    for specialist in settings["specialists"]:
        specialist["model_fingerprint"] = None
        del specialist["adapter_fingerprint"]
    path.write_text(json.dumps(settings))
    model = UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")
    assert not torch.allclose(logits(model), logits(adapters.model), atol=1e-3)


def test_what_was_loaded_is_recorded_not_what_lies_there_when_saving(adapters, tmp_path):
    """A training lasts for hours between the two."""
    retrain(adapters.model.config.members[0].adapter)
    adapters.model.save_pretrained(tmp_path / "gate", gate_only=True)
    with pytest.raises(CheckpointError, match="s0: the adapter at"):
        UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")


def test_a_specialist_may_move_but_not_vanish(adapters, tmp_path):
    adapters.model.save_pretrained(tmp_path / "gate", gate_only=True)
    place = Path(adapters.model.config.members[0].adapter)
    place.rename(tmp_path / "moved")
    with pytest.raises(UltrafuserError, match=r"adapter1.*there is no such folder"):
        UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")
    path = tmp_path / "gate" / "config.json"
    path.write_text(path.read_text().replace(str(place), str(tmp_path / "moved")))
    model = UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")
    assert torch.equal(logits(model), logits(adapters.model))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without a network: commits in the client's cache, the newest of them called main."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def commit(repo: str, folder: str) -> str:
        place = cache / f"models--{repo.replace('/', '--')}"
        number = sum(1 for _ in place.glob("snapshots/*")) + 1
        revision = f"{number:040x}"
        shutil.copytree(folder, place / "snapshots" / revision)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(revision)
        return revision

    return commit


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_gate_stays_with_the_commits_it_was_trained_with(hub, folder, tmp_path, revision):
    model, adapter = folder(), save_adapter(tmp_path / "adapter", tiny_model())
    commits = hub("org/base", model), hub("org/lora", adapter)
    source = SpecialistSource(
        model="org/base", adapter="org/lora", model_revision=revision, adapter_revision=revision
    )
    fused = fuse({"a": source}, gate_size=8)
    member = fused.model.config.members[0]
    assert (member.model_revision, member.adapter_revision) == commits
    assert (member.model_fingerprint, member.adapter_fingerprint) == (None, None)
    fused.model.save_pretrained(tmp_path / "gate", gate_only=True)
    retrain(model)
    retrain(adapter)
    newer = hub("org/base", model), hub("org/lora", adapter)
    assert newer != commits
    opened = UltraFuserForCausalLM.from_pretrained(tmp_path / "gate")
    assert torch.equal(logits(opened), logits(fused.model))
    anew = fuse({"a": source}, gate_size=8).model
    assert anew.config.members[0].model_revision == newer[0]
    assert not torch.allclose(logits(anew), logits(fused.model), atol=1e-3)


def test_a_commit_that_is_asked_for_is_taken(hub, folder):
    model = folder()
    first = hub("org/base", model)
    expected = logits(fuse_models(model).model)
    retrain(model)
    hub("org/base", model)
    fused = fuse({"a": SpecialistSource(model="org/base", model_revision=first)}, gate_size=8)
    assert torch.equal(logits(fused.model), expected)


def test_what_the_hub_does_not_have_is_named(hub, folder, tmp_path):
    with pytest.raises(
        UltrafuserError, match=r"'org/none' is no folder, and config.json of that hub id cannot be had"
    ):
        fuse_models("org/none")
    hub("org/base", folder())
    with pytest.raises(UltrafuserError, match=r"config.json of that hub id at revision v2 cannot be had"):
        fuse({"a": SpecialistSource(model="org/base", model_revision="v2")})
    with pytest.raises(UltrafuserError, match=r"'org/lora' is no folder, and adapter_config.json"):
        fuse({"a": SpecialistSource(model="org/base", adapter="org/lora")})
