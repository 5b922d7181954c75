"""What a run is made from besides its recipe: data files, specialists, and the tokens that these read.

A run that is resumed has to find them as they were, and cached states belong to the very specialists and tokens
they were made with. Each input is named and described in a few words that change when it does.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.templates import EncodedConversation

_NUM_SAMPLES = 1024
_NOT_ARCHITECTURE = ("transformers_version", "_name_or_path")


def describe_files(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Name and content of every data file.

    Args:
        files: domain -> files.
    """
    described = {}
    for domain, paths in files.items():
        for path in paths:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            described[f"data.{domain} ({path})"] = f"{path.stat().st_size:,} bytes, sha256 {digest[:16]}"
    return described


def describe_specialists(model: UltraFuserForCausalLM) -> dict[str, str]:
    """Weights and settings of every specialist, and of the base that adapters share.

    Of a tensor count name, shape, type, the sum of its bits (as 64-bit integers, so that no single change goes
    unseen) and 1024 samples, which tell values that have changed places. A 7B model takes a second or two, where a
    cryptographic digest of every byte would take minutes.
    """
    digests: dict[str, Any] = {}
    for member in model.config.members:
        architecture = dict({} if member.model_config is None else member.model_config)
        for key in _NOT_ARCHITECTURE:
            architecture.pop(key, None)
        settings = json.dumps([architecture, member.adapter_config], sort_keys=True, default=str)
        digests[f"specialists.{member.name}"] = hashlib.sha256(settings.encode())
    for name, tensor in sorted(model.bank.state_tensors().items()):
        owner = ".".join(name.split(".")[: 2 if name.startswith("specialists.") else 1])
        digest = digests.setdefault(owner, hashlib.sha256())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _summary(tensor):
            digest.update(part)
    return {owner: f"sha256 {digest.hexdigest()[:16]}" for owner, digest in digests.items()}


def describe_tokens(conversations: Sequence[EncodedConversation]) -> dict[str, str]:
    """What the specialists read and predict, as tokenizers and templates made it of the data."""
    digest = hashlib.sha256()
    for row in conversations:
        digest.update(json.dumps([row.input_ids, row.response_positions, row.labels]).encode())
    return {"tokens": f"{len(conversations):,} conversations, sha256 {digest.hexdigest()[:16]}"}


def _summary(tensor: Tensor) -> Iterator[bytes]:
    flat = tensor.detach().contiguous().flatten()
    per_word = 8 // flat.element_size()
    words, rest = flat.split([flat.numel() // per_word * per_word, flat.numel() % per_word])
    if words.storage_offset() % per_word:
        words = words.clone()  # a view of larger elements must begin where one of them may
    words = words.view(torch.int64)
    yield str(int(words.sum())).encode()  # modulo 2**64, in any order, so the same on every device
    for part in (words[:: max(1, words.numel() // _NUM_SAMPLES)], rest):
        yield part.contiguous().cpu().view(torch.uint8).numpy().tobytes()
