"""Fused checkpoints: written and opened.

A checkpoint is a folder with `config.json`, safetensors and, where there is one, the tokenizer. Self-contained ones
hold every tensor (`specialists.<name>.*`, `base.*` for adapters, `gate.*`); gate-only ones hold `gate.*` and name where
the specialists come from, as an adapter names its base, and what they were: a hub commit, or a fingerprint of files.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.files import give_plain_modes
from ultrafuser.fusion.gate import Gate
from ultrafuser.modeling import sources
from ultrafuser.modeling.assembly import FusedModel, check_templates, open_specialists, record_bank
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import build_bank

WEIGHTS_PATTERN = "model{suffix}.safetensors"
_IGNORED_OPTIONS = {
    "trust_remote_code",
    "_from_auto",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
}
_HUB_OPTIONS = {"revision", "cache_dir", "force_download", "local_files_only", "token"}


def save_model(
    model: UltraFuserForCausalLM,
    save_directory: str | os.PathLike[str],
    gate_only: bool = False,
    max_shard_size: str = "5GB",
    **unsupported: Any,
) -> None:
    """Write a checkpoint; see `UltraFuserForCausalLM.save_pretrained`."""
    unknown = set(unsupported) - {"is_main_process", "state_dict", "save_function", "safe_serialization"}
    if unknown or unsupported.get("safe_serialization") is False:
        raise UltrafuserError(
            f"save_pretrained: {sorted(unknown) or ['safe_serialization=False']} is not supported."
        )
    if unsupported.get("is_main_process") is False:
        return
    if gate_only and any(member.model is None for member in model.config.members):
        raise UltrafuserError(
            "save_pretrained(gate_only=True): the specialists have no source that a gate could name (they were built "
            "or trained in memory). Save the self-contained form."
        )
    tensors = {f"gate.{key}": tensor for key, tensor in model.gate.state_dict().items()}
    if not gate_only:
        tensors.update(model.bank.state_tensors())
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing.", dir=folder) as temporary:
        scratch = Path(temporary)
        _write_tensors(tensors, scratch, max_shard_size)
        _config_of(model, gate_only).save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
        give_plain_modes(scratch)
        # A folder without config.json is no checkpoint: it goes first and comes last, so that old and new weights
        # are never read together.
        (folder / "config.json").unlink(missing_ok=True)
        for path in folder.glob("model*.safetensors*"):
            path.unlink()
        for path in sorted(scratch.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, folder / path.name)


def load_model(
    cls: type[Any], name_or_path: str | os.PathLike[str], *args: Any, dtype: Any = None, device_map: Any = None,
    attn_implementation: str | None = None, config: UltraFuserConfig | None = None, **options: Any
) -> Any:  # fmt: skip
    """Open a checkpoint; see `UltraFuserForCausalLM.from_pretrained`."""
    dtype = options.pop("torch_dtype", dtype)
    hub = {key: options.pop(key) for key in _HUB_OPTIONS & options.keys() if options[key] is not None}
    unknown = options.keys() - _IGNORED_OPTIONS - _HUB_OPTIONS
    if args or unknown:
        raise UltrafuserError(f"from_pretrained: unknown options {sorted(unknown) or list(args)}.")
    folder = _checkpoint_folder(name_or_path, hub)
    if config is None:
        config = UltraFuserConfig.from_pretrained(folder)
    if not config.specialists:
        raise CheckpointError(f"{folder} is no fused checkpoint: its config.json names no specialists.")
    if attn_implementation is None:
        attn_implementation = config._attn_implementation  # where the Auto classes put it
    tensors = _read_tensors(folder)
    gate = {key: tensors.pop(key) for key in list(tensors) if key.startswith("gate.")}
    wanted = _as_dtype(dtype, config)
    if config.gate_only:
        bank, tokenizer = open_specialists(config, wanted)
    else:
        tokenizer = sources.load_tokenizer(str(folder))
        with no_init_weights():
            bank = build_bank(config, wanted)
        bank.load_tensors(tensors)
    if tokenizer is not None:
        check_templates(config, tokenizer)
    model = cls(config, bank)
    _load_gate(model.gate, {key.removeprefix("gate."): tensor for key, tensor in gate.items()})
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if attn_implementation is not None:
        for module in model.bank.modules():
            if isinstance(module, PreTrainedModel):
                module.set_attn_implementation(attn_implementation)
    if device_map is not None:
        model.to(_as_device(device_map))
    return model.eval()


def open_fused(folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> FusedModel:
    """Open a checkpoint together with its tokenizer.

    Args:
        folder: a checkpoint folder or hub id.
        dtype: of the specialists' weights; None keeps the stored one.

    Raises:
        CheckpointError: it is no fused checkpoint, or one without a tokenizer.
    """
    model = UltraFuserForCausalLM.from_pretrained(folder, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no tokenizer ({error}). Save the tokenizer into the same folder."
        ) from error
    return FusedModel(model, tokenizer)


class StoredGate(NamedTuple):
    """The gate of a checkpoint, and the names of the specialists it weighs."""

    names: tuple[str, ...]
    gate: Gate


def read_gate(folder: str | os.PathLike[str]) -> StoredGate:
    """Read nothing but the gate of a checkpoint; its specialists are not opened.

    Args:
        folder: a checkpoint folder or hub id.

    Raises:
        CheckpointError: it is no fused checkpoint, or its gate is incomplete.
    """
    path = _checkpoint_folder(folder, {})
    config = UltraFuserConfig.from_pretrained(path)
    if not config.specialists:
        raise CheckpointError(f"{path} is no fused checkpoint: its config.json names no specialists.")
    tensors = _read_tensors(path, "gate.")
    members = config.members
    first = "networks.{}.0.weight"
    if config.gate_form == "joint":
        sizes = [member.architecture().get_text_config(decoder=True).hidden_size for member in members]
    else:
        networks = range(len(members)) if config.gate_form == "per_specialist" else [0] * len(members)
        sizes = [tensors[key].shape[1] for n in networks if (key := first.format(n)) in tensors]
    if len(sizes) != len(members):
        raise CheckpointError(f"{path} lacks tensors of its gate. Copy or download it again.")
    gate = Gate(sizes, config.gate_size, config.gate_form)
    _load_gate(gate, tensors)
    return StoredGate(tuple(member.name for member in members), gate)


def save_fused(fused: FusedModel, folder: str | os.PathLike[str], gate_only: bool = False) -> None:
    """Write model and tokenizer into one folder that `open_fused` and the Auto classes read.

    Where all specialists read one chat template, the written tokenizer has it, for programs that ask no specialist.
    """
    tokenizer, templates = fused.tokenizer, {member.template for member in fused.model.config.members}
    own = tokenizer.chat_template
    try:
        if len(templates) == 1 and None not in templates:
            (tokenizer.chat_template,) = templates
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own
    fused.model.save_pretrained(folder, gate_only=gate_only)


def _config_of(model: UltraFuserForCausalLM, gate_only: bool) -> UltraFuserConfig:
    """The configuration as this checkpoint needs it."""
    record_bank(model)
    settings = model.config.to_dict() | {"gate_only": gate_only, "architectures": [type(model).__name__]}
    return UltraFuserConfig.from_dict(settings)


def _checkpoint_folder(name_or_path: str | os.PathLike[str], hub: Mapping[str, Any]) -> Path:
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        if str(name_or_path).startswith(("/", ".", "~")):
            raise CheckpointError(f"{name_or_path}: there is no such folder.")
        folder = Path(
            snapshot_download(str(name_or_path), allow_patterns=["*.json", "*.safetensors", "*.jinja"], **hub)
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no finished checkpoint.")
    return folder


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """Safetensors, in shards with an index where they are large.

    Tensors may be views of joined layers; the few that are not contiguous are copied, one shard's at a time.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS_PATTERN,
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{WEIGHTS_PATTERN.format(suffix='')}.index.json").write_text(json.dumps(index, indent=2))


def _read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """All tensors whose names begin with the prefix, without it."""
    shards = sorted(folder.glob("model*.safetensors"))
    if not shards:
        pickles = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        found = f"only pickles ({', '.join(pickles)}), which are never loaded" if pickles else "none"
        raise CheckpointError(
            f"{folder}: expected model.safetensors, got {found}. Save with save_pretrained."
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as file:
                wanted = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  # no mapping
                tensors.update({key.removeprefix(prefix): file.get_tensor(key) for key in wanted})
        except SafetensorError as error:
            raise CheckpointError(f"{shard} is damaged ({error}). Copy or download it again.") from error
    return tensors


def _load_gate(gate: Gate, tensors: Mapping[str, Tensor]) -> None:
    own = gate.state_dict()
    wrong = [
        f"gate.{key}: {tuple(tensors[key].shape) if key in tensors else 'missing'}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key not in tensors or tensors[key].shape != value.shape
    ]
    if wrong or tensors.keys() - own.keys():
        extra = sorted(tensors.keys() - own.keys())
        raise CheckpointError(
            f"the gate of this checkpoint does not fit its specialists: {'; '.join(wrong) or extra}. "
            "Were specialists added or dropped, or replaced by others of another width?"
        )
    gate.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})


def _as_dtype(dtype: Any, config: UltraFuserConfig) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        dtype = config.dtype
    chosen = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not isinstance(chosen, torch.dtype):
        raise UltrafuserError(f'dtype must be a torch dtype, its name, or "auto", got {dtype!r}.')
    return chosen


def _as_device(device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        devices = set(device_map.values())
        if len(devices) != 1:
            raise UltrafuserError(
                f"device_map must name one device, got {dict(device_map)}: banks are not split."
            )
        device_map = devices.pop()
    if device_map == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.device(device_map)
    except RuntimeError as error:
        raise UltrafuserError(
            f'device_map must be a device, such as "cpu" or "cuda:0", or "auto", got {device_map!r}.'
        ) from error
