"""What every measuring command writes with `--json`: numbers, and how they came about."""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import ultrafuser
from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write


def provenance(**extra: Any) -> dict[str, Any]:
    """How the numbers of this run came about.

    Args:
        **extra: what else belongs to it, such as `seed` or `model`; JSON types.

    Returns:
        Versions, git commit (None outside a checkout), machine, date (UTC), command line, and `extra`.
    """
    return {
        "ultrafuser": ultrafuser.__version__,
        **_git_state(),
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "accelerator": _accelerator_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **extra,
    }


def write_metrics(
    path: str | os.PathLike[str], metrics: Mapping[str, float], provenance: Mapping[str, Any]
) -> None:
    """Write `{"metrics": ..., "provenance": ...}`, whole or not at all.

    Args:
        path: file to write.
        metrics: name -> finite number.
        provenance: what `provenance` gives.

    Raises:
        UltrafuserError: a number is not finite.
    """
    document = {"metrics": {name: _number(name, value) for name, value in metrics.items()}}
    with atomic_write(path) as temporary:
        text = json.dumps({**document, "provenance": dict(provenance)}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def _number(name: str, value: float) -> float:
    number = value if isinstance(value, int) else float(value)
    if number != number or number in (float("inf"), float("-inf")):
        raise UltrafuserError(f"metric {name} must be a finite number, got {number}; nothing was written.")
    return number


def _git_state() -> dict[str, Any]:
    """Commit of the checkout that this package runs from; installed copies have none."""
    root = Path(ultrafuser.__file__).resolve().parents[2]
    commit = _git(root, "rev-parse", "HEAD") if (root / ".git").exists() else None
    if commit is None:
        return {"git_commit": None}
    return {"git_commit": commit, "git_dirty": bool(_git(root, "status", "--porcelain", "-uno"))}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _accelerator_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
