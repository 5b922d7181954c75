"""Where models and adapters come from, and what is refused on the way in."""

import json
from pathlib import Path

import pytest
import torch
from conftest import save_adapter, save_model, tiny_model
from safetensors.torch import load_file, save_file

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.modeling import sources


@pytest.fixture
def model_folder(tmp_path, tokenizer) -> Path:
    return Path(save_model(tmp_path / "model", tiny_model(), tokenizer))


@pytest.fixture
def package(tmp_path, monkeypatch, model_folder) -> str:
    """An installed package that carries a model and an adapter, and cannot be imported."""
    root = tmp_path / "site" / "carrier"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise ImportError('needs something that is not installed')")
    model_folder.rename(root / "model")
    save_adapter(root / "adapters" / "code", tiny_model())
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "package://carrier"


def test_a_folder_a_hub_id_and_a_package_are_resolved(package, tmp_path):
    model = tmp_path / "site" / "carrier" / "model"
    assert sources.resolve_model(str(model)) == str(model)
    assert sources.resolve_model(f"{package}/model") == str(model)
    assert sources.resolve_model("org/some-model") == "org/some-model"
    assert sources.resolve_adapter(f"{package}/adapters/code").name == "code"
    loaded = sources.load_model(f"{package}/model")
    assert torch.equal(loaded.lm_head.weight, tiny_model().lm_head.weight)
    assert sources.load_model(f"{package}/model", dtype=torch.bfloat16).dtype == torch.bfloat16
    assert sources.load_tokenizer(f"{package}/model").eos_token == "<|im_end|>"
    assert sources.load_architecture(f"{package}/model")["model_type"] == "llama"


def test_a_home_folder_is_expanded(model_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert sources.resolve_model("~/model") == str(model_folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package://no_such_package/model", "package 'no_such_package' is not installed. Install it"),
        ("package://not-a-name/model", "package 'not-a-name' is not installed"),
        ("package://carrier/other", "'carrier' is installed but holds no 'other'"),
        ("/no/such/folder", "there is no such folder. Give a .* folder or a hub id"),
        ("./no/such/folder", "there is no such folder"),
    ],
)
def test_what_is_not_there_is_named(package, source, message):
    for resolve in (sources.resolve_model, sources.resolve_adapter):
        with pytest.raises(UltrafuserError, match=message):
            resolve(source)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_model_with_only_pickles_is_refused(model_folder, pickle):
    torch.save({}, model_folder / "training_args.bin")  # beside safetensors, pickles are just not read
    torch.save({}, model_folder / pickle)
    sources.load_model(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"only as pickles \({pickle}\), which are never loaded"):
        sources.load_model(str(model_folder))


def test_a_model_without_weights_or_with_some_is_refused(model_folder):
    weights = load_file(model_folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"lacks 1 of its tensors \(first: model.layers.1.mlp.up_proj.weight\)"
    ):
        sources.load_model(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot be opened from safetensors.*Pickled weights are never loaded"
    ):
        sources.load_model(str(model_folder))


def test_remote_code_is_never_run(model_folder):
    (model_folder / "code.py").write_text("raise SystemExit('remote code ran')")
    settings = json.loads((model_folder / "config.json").read_text())
    settings |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model_folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UltrafuserError, match="remote code is never run"):
        sources.load_architecture(str(model_folder))
    settings["model_type"] = "llama"  # known to transformers: then its own class is used, and the map dropped
    (model_folder / "config.json").write_text(json.dumps(settings))
    assert "auto_map" not in sources.load_architecture(str(model_folder))
    assert type(sources.load_model(str(model_folder))).__module__.startswith("transformers.")


def test_bare_weights_have_no_tokenizer_and_a_broken_one_is_named(tmp_path):
    folder = Path(save_model(tmp_path / "bare", tiny_model()))
    assert sources.load_tokenizer(str(folder)) is None
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UltrafuserError, match=r"the tokenizer of .* cannot be opened"):
        sources.load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter_config.json").unlink(), "expected adapter_config.json, not there"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "expected adapter_model.safetensors, not there",
        ),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            r"only a pickle \(adapter_model.bin\), which is never loaded",
        ),
    ],
)
def test_incomplete_adapters_are_refused(tmp_path, spoil, message):
    folder = Path(save_adapter(tmp_path / "adapter", tiny_model()))
    assert sources.resolve_adapter(str(folder)) == folder
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        sources.resolve_adapter(str(folder))


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_a_broken_adapter_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        sources.read_adapter_config(tmp_path)


def test_the_cache_stands_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAFUSER_CACHE", str(tmp_path / "mine"))
    assert sources.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ULTRAFUSER_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    assert sources.cache_folder() == tmp_path / "ultrafuser"


def test_a_fingerprint_says_what_a_source_holds(package, tmp_path):
    adapter = tmp_path / "site" / "carrier" / "adapters" / "code"
    assert sources.source_fingerprint(f"{package}/adapters/code") == sources.source_fingerprint(str(adapter))
    assert sources.source_fingerprint(f"{package}/model") != sources.source_fingerprint(str(adapter))
    assert sources.source_fingerprint("org/some-model") is None
    with pytest.raises(UltrafuserError, match="there is no such folder"):
        sources.source_fingerprint("/no/such/folder")


def test_only_hub_revisions_are_pinned(package, model_folder, monkeypatch):
    monkeypatch.setattr(sources, "hf_hub_download", None)  # nobody asks the hub
    place = f"{package}/model"
    assert sources.pinned_revision(place, None, "config.json") is None
    assert sources.pinned_revision(str(model_folder.parent), "main", "config.json") == "main"
    assert sources.pinned_revision("org/some-model", "a" * 40, "config.json") == "a" * 40


def test_a_converted_gguf_belongs_to_its_content(tmp_path, tokenizer, monkeypatch):
    """Conversion itself is the library's; here the content of a file is the seed of the model that it gives."""
    converted = []

    def model_of(folder: Path, gguf_file: str, **_) -> torch.nn.Module:
        converted.append(folder)
        return tiny_model(seed=int((folder / gguf_file).read_text()))

    monkeypatch.setattr(sources.AutoModelForCausalLM, "from_pretrained", model_of)
    monkeypatch.setattr(sources.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setenv("ULTRAFUSER_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "carrier" / "base.gguf"
    file.parent.mkdir()
    (file.parent / "__init__.py").touch()

    def head_of(content: str) -> torch.Tensor:
        file.write_text(content)
        return load_file(Path(sources.resolve_model("package://carrier/base.gguf")) / "model.safetensors")[
            "lm_head.weight"
        ]

    first, again, other = head_of("1"), head_of("1"), head_of("2")
    assert len(converted) == 2
    assert torch.equal(first, again)
    assert torch.equal(first, tiny_model(seed=1).lm_head.weight.bfloat16())
    assert torch.equal(other, tiny_model(seed=2).lm_head.weight.bfloat16())
    assert torch.equal(head_of("1"), first)
    assert len(converted) == 2
    written = list((tmp_path / "cache").rglob("*.safetensors"))
    assert {path.stat().st_mode & 0o077 for path in written} == {file.stat().st_mode & 0o077}
