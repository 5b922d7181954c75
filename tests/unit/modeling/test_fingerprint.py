"""Fingerprints: equal where weights are equal, different where training changed them, cheap for any size."""

import hashlib
import shutil

import pytest
import torch
from conftest import save_adapter, save_model, tiny_model
from safetensors.torch import load_file, save_file

from ultrafuser.modeling.fingerprint import fingerprint


def flip(path, offset: int, length: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        former = file.read(length)
        file.seek(offset)
        file.write(bytes(byte ^ 1 for byte in former))


@pytest.fixture
def adapter(tmp_path):
    save_adapter(tmp_path / "adapter", tiny_model())
    return tmp_path / "adapter"


def test_it_is_what_checkpoints_already_carry(tmp_path):
    """A change of the algorithm would turn every gate-only checkpoint away from its own specialists."""
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)))
    (tmp_path / "config.json").write_text("{}")
    parts = (b"config.json 2\n", b"{}", b"model.safetensors 256\n", bytes(range(256)))
    assert fingerprint(tmp_path) == hashlib.sha256(b"".join(parts)).hexdigest()
    assert fingerprint(tmp_path / "config.json") == hashlib.sha256(b"".join(parts[:2])).hexdigest()


def test_it_knows_contents_not_places(adapter, tmp_path):
    first = fingerprint(adapter)
    shutil.copytree(adapter, tmp_path / "copy")
    (tmp_path / "link").symlink_to(adapter)
    assert {fingerprint(tmp_path / "copy"), fingerprint(tmp_path / "link")} == {first}
    (adapter / "README.md").write_text("about")
    (adapter / "tokenizer.json").write_text("{}")
    assert fingerprint(adapter) == first


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_one_bit_of_a_small_file_matters(adapter, name):
    first = fingerprint(adapter)
    for offset in (0, (adapter / name).stat().st_size // 3, (adapter / name).stat().st_size - 1):
        flip(adapter / name, offset)
        assert fingerprint(adapter) != first
        flip(adapter / name, offset)
    assert fingerprint(adapter) == first


def test_a_shard_more_or_less_matters(adapter):
    first = fingerprint(adapter)
    save_file({"x": torch.zeros(1)}, adapter / "more.safetensors")
    assert fingerprint(adapter) != first


def test_any_training_of_a_model_is_noticed(tmp_path):
    folder = tmp_path / "model"
    save_model(folder, tiny_model())
    first = fingerprint(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        changed = tensors | {
            name: tensor.clone().view(-1).index_fill(0, torch.tensor([0]), 7).view_as(tensor)
        }
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert fingerprint(folder) != first, name
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) == first


def test_a_large_file_is_sampled(tmp_path):
    """Read whole, 64 GB would take minutes; a stretch of one part in a thousand is never missed."""
    path, size = tmp_path / "large.gguf", 64 * 10**9
    path.touch()
    try:
        with path.open("r+b") as file:
            file.truncate(size)  # a hole: no disk is used
    except OSError:
        pytest.skip("this file system has no sparse files")
    first = fingerprint(path)
    assert fingerprint(path) == first
    for offset in (5, 10**6, size - 10, size - 10**6):
        flip(path, offset)
        assert fingerprint(path) != first
        flip(path, offset)
    with path.open("r+b") as file:
        file.truncate(size + 1)
    assert fingerprint(path) != first


def test_samples_leave_no_long_gap(tmp_path):
    path, size = tmp_path / "middling.safetensors", 70 * 2**20
    path.write_bytes(bytes(size))
    first = fingerprint(path)
    for offset in torch.randint(size - size // 1000, (5,), generator=torch.Generator().manual_seed(0)):
        flip(path, int(offset), size // 1000)
        assert fingerprint(path) != first
        flip(path, int(offset), size // 1000)
