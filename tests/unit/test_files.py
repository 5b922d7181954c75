"""`atomic_write`: the finished file or folder, or what was there before; nothing is left over."""

import os
from pathlib import Path

import pytest

from ultrafuser.files import atomic_write


class InterruptedWriteError(Exception):
    """Stands for whatever may go wrong while somebody writes."""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def write_folder(folder: Path, **files: str) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.mark.parametrize("as_type", [str, Path])
def test_file_appears_with_its_missing_parents(tmp_path, as_type):
    target = tmp_path / "runs" / "first" / "report.json"
    with atomic_write(as_type(target)) as temporary:
        temporary.write_text("{}")
        assert not target.exists()
    assert target.read_text() == "{}"
    assert names(target.parent) == ["report.json"]


def test_file_replaces_file(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    with atomic_write(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["report.json"]


def test_temporary_keeps_the_name_and_the_file_system(tmp_path):
    """Writers choose a format by the ending, and a rename is only atomic within one file system."""
    with atomic_write(tmp_path / "weights.png") as temporary:
        temporary.write_bytes(b"")
        assert temporary.name == "weights.png"
        assert tmp_path in temporary.parents


def test_folder_appears(tmp_path):
    target = tmp_path / "model"
    with atomic_write(target) as temporary:
        write_folder(temporary, config="a", weights="b")
        assert not target.exists()
    assert names(target) == ["config", "weights"]
    assert names(tmp_path) == ["model"]


def test_folder_replaces_folder_and_all_its_files(tmp_path):
    target = tmp_path / "model"
    write_folder(target, stale="old", weights="old")
    with atomic_write(target) as temporary:
        write_folder(temporary, weights="new")
        assert names(target) == ["stale", "weights"]
    assert names(target) == ["weights"]
    assert (target / "weights").read_text() == "new"
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [InterruptedWriteError, KeyboardInterrupt])
def test_error_leaves_the_old_file(tmp_path, error):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(error), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_error_leaves_the_old_folder(tmp_path):
    target = tmp_path / "model"
    write_folder(target, weights="old")
    with pytest.raises(InterruptedWriteError), atomic_write(target) as temporary:  # noqa: PT012
        write_folder(temporary, weights="half of the n")
        raise InterruptedWriteError
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_error_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(InterruptedWriteError), atomic_write(tmp_path / "report.json") as temporary:  # noqa: PT012
        temporary.write_text("half of the n")
        raise InterruptedWriteError
    assert names(tmp_path) == []


def test_block_that_writes_nothing_is_an_error_and_keeps_the_old_content(tmp_path):
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), atomic_write(target):
        pass
    assert target.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_file_does_not_replace_a_folder(tmp_path):
    target = tmp_path / "model"
    write_folder(target, weights="old")
    with pytest.raises(OSError, match="model"), atomic_write(target) as temporary:
        temporary.write_text("a file")
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["model"]
