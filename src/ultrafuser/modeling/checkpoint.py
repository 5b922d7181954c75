"""Fusing specialists, and writing and opening fused checkpoints.

A checkpoint is a folder with `config.json`, safetensors and, where there is one, the tokenizer. Self-contained ones
hold every tensor (`specialists.<name>.*`, `base.*` for adapters, `gate.*`); gate-only ones hold `gate.*` and name where
the specialists come from, as an adapter names its base.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.fusion.gate import GateForm
from ultrafuser.modeling import sources
from ultrafuser.modeling.configuration import BankKind, SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.lora import Adapter, fold_adapters, unfold
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import (
    AdapterSpecialists,
    SpecialistBank,
    WholeSpecialists,
    build_bank,
    check_exact,
)
from ultrafuser.modeling.templates import ConversationEncoder, resolve_template, vocabulary_difference

WEIGHTS_PATTERN = "model{suffix}.safetensors"
_IGNORED_OPTIONS = {
    "trust_remote_code",
    "_from_auto",
    "low_cpu_mem_usage",
    "use_safetensors",
    "adapter_kwargs",
}
_HUB_OPTIONS = {"revision", "cache_dir", "force_download", "local_files_only", "token"}


@dataclass(frozen=True, kw_only=True)
class SpecialistSource:
    """Where one specialist comes from.

    Attributes:
        model: a model folder, a hub id, or `package://<package>/<path>`.
        adapter: a PEFT LoRA folder (or hub id, or package path) on top of it; None for the model itself.
        template: name of a built-in template, "tokenizer" for the tokenizer's own, or Jinja text.
        model_revision: hub revision of the model.
        adapter_revision: hub revision of the adapter.
    """

    model: str
    adapter: str | None = None
    template: str = "tokenizer"
    model_revision: str | None = None
    adapter_revision: str | None = None


class FusedModel(NamedTuple):
    """A fused model and the tokenizer that its specialists share."""

    model: UltraFuserForCausalLM
    tokenizer: PreTrainedTokenizerBase


def fuse(
    specialists: Mapping[str, SpecialistSource],
    *,
    bank: BankKind | Literal["auto"] = "auto",
    gate_form: GateForm = "shared",
    gate_size: int = 512,
    end_token: str | None = None,
    dtype: torch.dtype | None = None,
) -> FusedModel:
    """Put specialists side by side under a fresh gate (which gives their uniform average until it is trained).

    Args:
        specialists: name -> source, in order.
        bank: "adapters" folds LoRA adapters over their one base, "whole" runs N models (adapters are merged into
            them). "auto" takes "adapters" when all sources name the same model and at least one has an adapter.
        gate_form: see `Gate`.
        gate_size: width of the gate's hidden layer.
        end_token: the token that ends every response; by default the tokenizers' end-of-sequence token, on which
            they must agree.
        dtype: of the specialists' weights; None keeps the stored one.

    Returns:
        The model, in evaluation mode, and the tokenizer.

    Raises:
        UltrafuserError: no specialist, no tokenizer, no agreed end token, or an architecture that cannot be fused.
        TemplateError: a template is unknown, or cannot be aligned.
        CheckpointError: vocabularies that differ (the tokens are named), adapters that do not fit.
    """
    if not specialists:
        raise UltrafuserError("specialists: at least one is needed, got none.")
    specialists = {name: _located(source) for name, source in specialists.items()}
    kind = _bank_kind(specialists, bank)
    tokenizers = _tokenizers(specialists)
    tokenizer = _shared_tokenizer(tokenizers)
    members = [
        SpecialistConfig(
            name=name,
            model=source.model,
            model_revision=source.model_revision,
            adapter=source.adapter,
            adapter_revision=source.adapter_revision,
            template=resolve_template(source.template, tokenizers.get(name, tokenizer)),
            model_config=sources.load_architecture(source.model, source.model_revision),
        )
        for name, source in specialists.items()
    ]
    config = UltraFuserConfig(
        specialists=members,
        bank=kind,
        gate_form=gate_form,
        gate_size=gate_size,
        end_token_id=_end_token_id(tokenizers, end_token),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    _check_templates(config, tokenizer)
    model = UltraFuserForCausalLM(config, open_bank(config, dtype))
    _record(model)
    if model.bank.vocab_size < len(tokenizer):
        raise CheckpointError(
            f"the smallest output head has {model.bank.vocab_size} rows, but the tokenizer has {len(tokenizer)} "
            "tokens. Use specialists of one vocabulary."
        )
    return FusedModel(model.eval(), tokenizer)


def open_bank(config: UltraFuserConfig, dtype: torch.dtype | None = None) -> SpecialistBank:
    """Load every specialist from where `config` says it comes from.

    Args:
        config: with `model` (and `adapter`) set for every specialist.
        dtype: of the weights; None keeps the stored one.

    Raises:
        CheckpointError: a specialist has no source, or cannot be opened.
        UltrafuserError: an architecture whose logits cannot be fused exactly.
    """
    members = config.members
    for member in members:
        if member.model is None:
            raise CheckpointError(
                f"specialist {member.name}: the checkpoint does not say where its weights are. "
                "Use the self-contained checkpoint that holds them."
            )
    adapters = {m.name: _open_adapter(m) for m in members}
    if config.bank == "adapters":
        base = sources.load_model(str(members[0].model), members[0].model_revision, dtype)
        check_exact("base", base)
        return AdapterSpecialists(base, adapters)
    models = {}
    for member in members:
        model = sources.load_model(str(member.model), member.model_revision, dtype)
        check_exact(member.name, model)
        adapter = adapters[member.name]
        models[member.name] = model if adapter.config is None else merge_adapter(model, adapter)
    return WholeSpecialists(models)


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """A plain model with a LoRA adapter added to its weights.

    Args:
        model: the base; changed in place.
        adapter: what to add.

    Returns:
        The same model.
    """
    unfold(model, fold_adapters(model, [adapter]))
    return model.eval()


def model_from_tensors(
    architecture: PretrainedConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> PreTrainedModel:
    """A plain Hugging Face model of an architecture with the given weights.

    Args:
        architecture: its configuration.
        tensors: every tensor under the architecture's names; second names of tied ones may be missing.
        dtype: of the weights.

    Raises:
        CheckpointError: tensors of the architecture are not given, or others are.
    """
    with no_init_weights():
        plain = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    missing, unexpected = plain.load_state_dict(tensors, strict=False)
    wrong = sorted((set(missing) - set(plain.all_tied_weights_keys)) | set(unexpected))
    if wrong:
        raise CheckpointError(
            f"the weights do not belong to the architecture {architecture.model_type}: {len(wrong)} tensors are "
            f"missing or unexpected (first: {wrong[0]})."
        )
    plain.tie_weights()
    return plain.eval()


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
    tensors = {key: _alone(tensor) for key, tensor in tensors.items()}
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing.", dir=folder) as temporary:
        scratch = Path(temporary)
        save_torch_state_dict(
            tensors, scratch, filename_pattern=WEIGHTS_PATTERN, max_shard_size=max_shard_size
        )
        _config_of(model, gate_only).save_pretrained(scratch)
        model.generation_config.save_pretrained(scratch)
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
    tensors = _read_tensors(folder)
    wanted = _as_dtype(dtype, config)
    if config.gate_only:
        tokenizer = _shared_tokenizer(_tokenizers({m.name: _source_of(m) for m in config.members}))
        bank = open_bank(config, wanted)
    else:
        tokenizer = sources.load_tokenizer(str(folder))
        with no_init_weights():
            bank = build_bank(config, wanted)
        bank.load_tensors({k: t for k, t in tensors.items() if not k.startswith("gate.")})
    if tokenizer is not None:
        _check_templates(config, tokenizer)
    model = cls(config, bank)
    _load_gate(model, {k.removeprefix("gate."): t for k, t in tensors.items() if k.startswith("gate.")})
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


def save_fused(fused: FusedModel, folder: str | os.PathLike[str], gate_only: bool = False) -> None:
    """Write model and tokenizer into one folder that `open_fused` and the Auto classes read."""
    fused.tokenizer.save_pretrained(folder)
    fused.model.save_pretrained(folder, gate_only=gate_only)


def export_specialist(model: UltraFuserForCausalLM, name: str, folder: str | os.PathLike[str]) -> None:
    """Write one specialist as a plain Hugging Face model (its adapter merged into the base).

    Args:
        model: the fused model.
        name: of the specialist.
        folder: where the model folder has to be.

    Raises:
        UltrafuserError: there is no specialist of that name.
    """
    _require_member(model, name)
    architecture = model.bank.architectures()[model.bank.names.index(name)]
    plain = model_from_tensors(architecture, model.bank.merged_tensors(name), model.dtype)
    with atomic_write(folder) as scratch:
        plain.save_pretrained(scratch)


def export_adapter(
    model: UltraFuserForCausalLM, name: str, folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write one specialist's adapter as a PEFT folder.

    Args:
        model: a fused model over an adapter bank.
        name: of the specialist.
        folder: where the adapter folder has to be.
        dtype: of the written tensors; None keeps the present one.

    Raises:
        UltrafuserError: no such specialist, or it has no adapter.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    from ultrafuser.modeling.lora import PEFT_PREFIX

    _require_member(model, name)
    bank = model.bank
    settings = bank.adapter_configs[name] if isinstance(bank, AdapterSpecialists) else None
    if not isinstance(bank, AdapterSpecialists) or settings is None:
        raise UltrafuserError(f"specialist {name} has no adapter of its own. Export it as a whole model.")
    tensors = {
        PEFT_PREFIX + key: tensor.to(tensor.dtype if dtype is None else dtype).contiguous().clone()
        for key, tensor in bank.adapter_tensors(name).items()
    }
    known = LoraConfig.__dataclass_fields__
    member = next(m for m in model.config.members if m.name == name)
    skipped = ("peft_type", "auto_mapping", "init_lora_weights")  # how it began no longer matters
    config = LoraConfig(**{k: v for k, v in settings.items() if k in known and k not in skipped})
    named = settings.get("base_model_name_or_path")
    config.base_model_name_or_path = member.model if named is None else named
    config.inference_mode = True
    with atomic_write(folder) as scratch:
        scratch.mkdir()
        config.save_pretrained(scratch)
        save_file(tensors, scratch / sources.ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _bank_kind(specialists: Mapping[str, SpecialistSource], bank: BankKind | Literal["auto"]) -> BankKind:
    bases = {(source.model, source.model_revision) for source in specialists.values()}
    if bank == "adapters" and len(bases) > 1:
        raise UltrafuserError(
            f"bank adapters needs one base for all specialists, got {sorted(base for base, _ in bases)}. "
            "Use bank whole."
        )
    if bank != "auto":
        return bank
    with_adapter = any(source.adapter is not None for source in specialists.values())
    return "adapters" if len(bases) == 1 and with_adapter else "whole"


def _located(source: SpecialistSource) -> SpecialistSource:
    """Folders as absolute paths, so that a gate-only checkpoint finds them from anywhere."""
    places = {
        key: str(Path(place).expanduser().resolve())
        for key, place in (("model", source.model), ("adapter", source.adapter))
        if place is not None and Path(place).expanduser().is_dir()
    }
    return replace(source, **places)


def _tokenizers(specialists: Mapping[str, SpecialistSource]) -> dict[str, PreTrainedTokenizerBase]:
    """Name -> tokenizer of the specialists that have one; each is opened once."""
    keys = {name: (source.model, source.model_revision) for name, source in specialists.items()}
    opened = {key: sources.load_tokenizer(*key) for key in set(keys.values())}
    return {name: tokenizer for name, key in keys.items() if (tokenizer := opened[key]) is not None}


def _shared_tokenizer(tokenizers: Mapping[str, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    if not tokenizers:
        raise UltrafuserError("none of the specialists' folders holds a tokenizer. Save one beside a model.")
    first, shared = next(iter(tokenizers.items()))
    for name, tokenizer in tokenizers.items():
        difference = None if tokenizer is shared else vocabulary_difference(shared, tokenizer)
        if difference is not None:
            raise CheckpointError(
                f"specialists {first} and {name} have different vocabularies: {difference} "
                "Logits can only be fused over one vocabulary; use specialists of one family."
            )
    return shared


def _end_token_id(tokenizers: Mapping[str, PreTrainedTokenizerBase], end_token: str | None) -> int:
    vocabulary = next(iter(tokenizers.values())).get_vocab()
    ends = {name: tokenizer.eos_token for name, tokenizer in tokenizers.items()} if end_token is None else {}
    if None in ends.values() or len(set(ends.values())) > 1:
        raise UltrafuserError(f"the specialists do not agree on an end token: {ends}. Set end_token.")
    token = next(iter(ends.values())) if end_token is None else end_token
    if token not in vocabulary:
        raise UltrafuserError(f"end_token {token!r} is not in the vocabulary. Name a token that is.")
    return vocabulary[token]


def _check_templates(config: UltraFuserConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse templates that cannot be aligned, by building the encoder that would read them."""
    templates = {member.name: member.template for member in config.members if member.template is not None}
    if templates and config.end_token_id is not None:
        ConversationEncoder(tokenizer, templates, end_token_id=config.end_token_id, max_length=sys.maxsize)


def _open_adapter(member: SpecialistConfig) -> Adapter:
    if member.adapter is None:
        return Adapter.bare()
    return Adapter.from_folder(sources.resolve_adapter(member.adapter, member.adapter_revision))


def _source_of(member: SpecialistConfig) -> SpecialistSource:
    if member.model is None:
        raise CheckpointError(
            f"specialist {member.name}: a gate-only checkpoint must name its model, got none."
        )
    return SpecialistSource(model=member.model, model_revision=member.model_revision)


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own, as safetensors wants it; views of joined layers are copied."""
    whole = (
        tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() and tensor.is_contiguous()
    )
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _record(model: UltraFuserForCausalLM) -> None:
    """Put what the bank found out (architectures, adapter settings, dtype) into the configuration."""
    for specialist, architecture in zip(model.config.specialists, model.bank.architectures(), strict=True):
        if specialist["model_config"] is None:
            specialist["model_config"] = architecture.to_dict()
        if isinstance(model.bank, AdapterSpecialists):
            specialist["adapter_config"] = model.bank.adapter_configs[specialist["name"]]
    model.config.dtype = _bank_dtype(model.bank)


def _bank_dtype(bank: SpecialistBank) -> torch.dtype:
    return bank.heads()[0].weight.dtype


def _config_of(model: UltraFuserForCausalLM, gate_only: bool) -> UltraFuserConfig:
    """The configuration as this checkpoint needs it."""
    _record(model)
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
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
            tensors.update(load_file(shard))
        except SafetensorError as error:
            raise CheckpointError(f"{shard} is damaged ({error}). Copy or download it again.") from error
    return tensors


def _load_gate(model: UltraFuserForCausalLM, tensors: Mapping[str, Tensor]) -> None:
    own = model.gate.state_dict()
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
    model.gate.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})


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
    return torch.device(device_map)


def _require_member(model: UltraFuserForCausalLM, name: str) -> None:
    if name not in model.bank.names:
        raise UltrafuserError(f"there is no specialist {name!r}; there are {', '.join(model.bank.names)}.")


def without_sources(config: UltraFuserConfig) -> UltraFuserConfig:
    """The configuration of a model whose specialists were trained further: no longer what their sources hold."""
    members = [
        replace(m, model=None, model_revision=None, adapter=None, adapter_revision=None)
        for m in config.members
    ]
    settings = config.to_dict() | {"specialists": [vars(m) for m in members]}
    return UltraFuserConfig.from_dict(settings)
