"""Telling whether weights are still the same, without reading all of them.

A gate is right only for the weights it was trained with, and a converted model only for the file it was made from.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

_CONFIGURATIONS = ("config.json", "adapter_config.json")
_WHOLE_BYTES = 64 * 2**20
_END_BYTES = 2**20
_NUM_SAMPLES = 1024
_SAMPLE_BYTES = 4096


def fingerprint(path: Path) -> str:
    """A digest of a weight file, or of the safetensors and the configuration in a folder.

    Files up to 64 MiB (so nearly every adapter) are read whole. Of larger ones count the size, both ends (the header
    is at one) and 1024 samples between them, which lie closer than the matrices of a language model are long. Other
    training is noticed, since that changes every matrix; a change of a few rows need not be. A 5 GB file costs 6 MB
    of reading.

    Args:
        path: a file, or a folder with weights directly in it; links are followed.

    Returns:
        SHA-256, 64 hexadecimal digits. It depends on names and contents, not on where the path is.
    """
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else _weight_files(path):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        for part in _sampled(file):
            digest.update(part)
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    configurations = [folder / name for name in _CONFIGURATIONS if (folder / name).is_file()]
    return configurations + sorted(folder.glob("*.safetensors"))


def _sampled(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            yield file.read()
            return
        yield file.read(_END_BYTES)
        step = (size - 2 * _END_BYTES) // _NUM_SAMPLES
        for index in range(_NUM_SAMPLES):
            file.seek(_END_BYTES + index * step)
            yield file.read(_SAMPLE_BYTES)
        file.seek(-_END_BYTES, os.SEEK_END)
        yield file.read()
