"""`atomic_write`: the finished file or folder, or what was there before; nothing is left over."""

import os
import stat
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


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request):
    """Files that `open` makes get 666 without these bits."""
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_files_get_the_mode_that_open_gives(tmp_path, umask):
    """Libraries write through files of their own, which only the owner may read."""
    with atomic_write(tmp_path / "model") as temporary:
        write_folder(temporary, config="{}", weights="private")
        write_folder(temporary / "deeper", weights="private")
        for path in (temporary / "weights", temporary / "deeper" / "weights"):
            path.chmod(0o600)
    with atomic_write(tmp_path / "report.json") as temporary:
        temporary.write_text("{}")
        temporary.chmod(0o600)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 4
    assert {mode(path) for path in written} == {0o666 & ~umask}
    assert {mode(path) for path in tmp_path.rglob("*") if path.is_dir()} == {0o777 & ~umask}


def test_what_a_link_points_to_keeps_its_mode(tmp_path, umask):
    (tmp_path / "elsewhere").write_text("private")
    (tmp_path / "elsewhere").chmod(0o600)
    with atomic_write(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "link").symlink_to(tmp_path / "elsewhere")
    assert mode(tmp_path / "elsewhere") == 0o600
    assert names(tmp_path / "model") == ["link"]
