"""Writing files whole or not at all, readable for whom the user's umask lets read."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; move it into place when the block ends without an error.

    Works for a file and for a folder (write either at the yielded path). What already exists at `path` is
    replaced. On any error the temporary is removed and `path` stays as it was. Files get the mode that `open` gives.

    Args:
        path: where the finished file or folder has to be. Missing parents are created.

    Yields:
        A path in the same folder, so that the final rename stays on one file system.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    temporary = scratch / target.name
    try:
        yield temporary
        give_plain_modes(scratch)
        replaced = scratch / "replaced"
        if temporary.is_dir() and target.is_dir():
            os.replace(target, replaced)  # a rename cannot replace a folder that holds something
        try:
            os.replace(temporary, target)
        except OSError:
            if replaced.exists():
                os.replace(replaced, target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def give_plain_modes(folder: str | os.PathLike[str]) -> None:
    """Give every file below a folder the mode that `open` gives a new one.

    safetensors writes files that only their owner may read, but a server often runs under another account.

    Args:
        folder: holds nothing but what this process has just written.
    """
    # The umask itself cannot be read without changing it for all threads; a new file shows it.
    probe = Path(folder) / ".mode"
    probe.touch(exist_ok=False)
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
