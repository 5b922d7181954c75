import json

import pytest
import torch
from conftest import save_adapter, save_model, tiny_model

from ultrafuser.modeling.assembly import SpecialistSource, fuse
from ultrafuser.training import features
from ultrafuser.training.data import load_domain_conversations
from ultrafuser.training.features import StateDataset, cache_states, collate_states
from ultrafuser.training.run import encoder_for
from ultrafuser.training.stages import encode_data


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(features, "_ROWS_PER_FILE", 5)
    monkeypatch.setattr(features, "_TOKENS_PER_PASS", 150)


def encoded(fused, toys):
    files = {domain: [file] for domain, file in toys.files().items()}
    encoder = encoder_for(fused)
    return encoder, encode_data(encoder, load_domain_conversations(files), "error").conversations


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("bank", ["whole", "adapters"])
def test_cached_states_are_the_specialists_own(toys, tmp_path, bank):
    fused = toys.fused(bank)
    encoder, conversations = encoded(fused, toys)
    seen = []
    cache = cache_states(fused.model, encoder, conversations, tmp_path, lambda *now: seen.append(now))
    assert seen[-1] == (24, 24)
    assert seen == sorted(seen)
    assert cache.seconds > 0
    assert cache.num_bytes == sum(path.stat().st_size for path in cache.folder.iterdir())
    assert len(list(cache.folder.glob("*.safetensors"))) == 5

    dataset = StateDataset(cache.folder, conversations)
    assert len(dataset) == 24
    rows = [0, 13, 7]
    batch = encoder.collate([conversations[row] for row in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        expected = fused.model.hidden_states(**batch)
    cached = collate_states([dataset[row] for row in rows])
    assert torch.equal(cached["labels"], labels)
    kept = labels != -100
    for state, own in zip(cached["specialist_hidden_states"], expected, strict=True):
        assert state.dtype == own.dtype
        torch.testing.assert_close(state[kept], own[kept], rtol=0, atol=1e-5)


def test_states_are_those_of_use_not_of_training(toys, tokenizer, tmp_path):
    model = tiny_model("gpt2", n_embd=32)  # drops 0.1 of everything when it is trained
    source = SpecialistSource(model=save_model(tmp_path / "gpt2", model, tokenizer))
    fused = fuse({"gpt2": source})
    encoder, conversations = encoded(fused, toys)
    with torch.no_grad():
        batch = encoder.collate(conversations[:1])
        del batch["labels"]
        expected = fused.model.hidden_states(**batch)[0][0]
    cache = cache_states(fused.model.train(), encoder, conversations, tmp_path / "states")
    states = StateDataset(cache.folder, conversations)[0]["states"][0]
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def cost_in_seconds(fused, toys, folder, change=None):
    encoder, conversations = encoded(fused, toys)
    if change is not None:
        conversations = change(conversations)
    return cache_states(fused.model, encoder, conversations, folder).seconds


def test_states_are_used_again_for_the_same_and_only_for_the_same(toys, tmp_path):
    folder = tmp_path / "states"
    assert cost_in_seconds(toys.fused(), toys, folder) > 0
    assert cost_in_seconds(toys.fused(gate_form="joint"), toys, folder) == 0  # another gate is no other state
    assert cost_in_seconds(toys.fused(), toys, folder, lambda rows: rows[::-1]) > 0
    assert cost_in_seconds(toys.fused(), toys, folder) == 0  # both are kept
    fused = toys.fused()
    with torch.no_grad():
        next(fused.model.bank.parameters()).view(-1)[0] += 1e-3
    assert cost_in_seconds(fused, toys, folder) > 0
    assert cost_in_seconds(fused, toys, folder) == 0


def test_states_in_another_order_of_specialists_are_others(toys, tmp_path):
    sources = {name: SpecialistSource(**source) for name, source in toys.sources().items()}
    turned = fuse(dict(reversed(sources.items())), gate_size=16, dtype=torch.float32)
    assert cost_in_seconds(toys.fused(), toys, tmp_path) > 0
    assert cost_in_seconds(turned, toys, tmp_path) > 0


def test_another_scale_of_the_same_adapter_is_another_state(toys, tmp_path):
    base = tiny_model("llama", seed=9)
    adapter = save_adapter(tmp_path / "adapter", base, seed=1)
    source = SpecialistSource(model=str(toys.folder / "base"), adapter=adapter)
    assert cost_in_seconds(fuse({"letters": source}), toys, tmp_path / "states") > 0
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 16}))
    assert cost_in_seconds(fuse({"letters": source}), toys, tmp_path / "states") > 0
