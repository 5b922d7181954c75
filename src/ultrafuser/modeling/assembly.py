"""Putting specialists together: from the places they come from to one fused model under a fresh gate.

Everything that has to hold for a fusion is checked here: one vocabulary, one end token, templates that align,
architectures that can be fused exactly, and, for a trained gate, the very weights it was trained with.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.fusion.gate import GateForm
from ultrafuser.modeling import sources
from ultrafuser.modeling.configuration import BankKind, SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.lora import Adapter, fold_adapters, unfold
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import (
    AdapterSpecialists,
    SpecialistBank,
    WholeSpecialists,
    check_exact,
)
from ultrafuser.modeling.templates import ConversationEncoder, resolve_template, vocabulary_difference


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
    specialists = _pinned({name: _located(source) for name, source in specialists.items()})
    kind = _bank_kind(specialists, bank)
    tokenizers = _tokenizers(specialists)
    tokenizer = _shared_tokenizer(tokenizers)
    config = UltraFuserConfig(
        specialists=_members(specialists, tokenizers, tokenizer),
        bank=kind,
        gate_form=gate_form,
        gate_size=gate_size,
        end_token_id=_end_token_id(tokenizers, end_token),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    check_templates(config, tokenizer)
    model = UltraFuserForCausalLM(config, open_bank(config, dtype))
    record_bank(model)
    if model.bank.vocab_size < len(tokenizer):
        raise CheckpointError(
            f"the smallest output head has {model.bank.vocab_size} rows, but the tokenizer has {len(tokenizer)} "
            "tokens. Use specialists of one vocabulary."
        )
    return FusedModel(model.eval(), tokenizer)


def open_specialists(
    config: UltraFuserConfig, dtype: torch.dtype | None = None
) -> tuple[SpecialistBank, PreTrainedTokenizerBase]:
    """Load the specialists of a trained gate from where `config` says they come from.

    Args:
        config: of a gate-only checkpoint.
        dtype: of the weights; None keeps the stored one.

    Returns:
        The bank, and the tokenizer that the specialists share.

    Raises:
        CheckpointError: a specialist has no source, is no longer what the gate was trained with, cannot be opened,
            or has another vocabulary than the first.
        UltrafuserError: an architecture whose logits cannot be fused exactly.
    """
    _require_same_weights(config)
    named = {
        m.name: SpecialistSource(model=str(m.model), model_revision=m.model_revision) for m in config.members
    }
    tokenizer = _shared_tokenizer(_tokenizers(named))
    return open_bank(config, dtype), tokenizer


def open_bank(config: UltraFuserConfig, dtype: torch.dtype | None = None) -> SpecialistBank:
    """Load every specialist from where `config` says it comes from.

    Args:
        config: with `model` (and `adapter`) set for every specialist.
        dtype: of the weights; None keeps the stored one.

    Raises:
        CheckpointError: a specialist cannot be opened, or an adapter does not fit.
        UltrafuserError: an architecture whose logits cannot be fused exactly.
    """
    members = config.members
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


def record_bank(model: UltraFuserForCausalLM) -> None:
    """Put what the bank found out (architectures, adapter settings, dtype) into the model's configuration.

    Args:
        model: its `config` is changed in place.
    """
    for specialist, architecture in zip(model.config.specialists, model.bank.architectures(), strict=True):
        if specialist["model_config"] is None:
            specialist["model_config"] = architecture.to_dict()
        if isinstance(model.bank, AdapterSpecialists):
            specialist["adapter_config"] = model.bank.adapter_configs[specialist["name"]]
    model.config.dtype = model.bank.heads()[0].weight.dtype


def check_templates(config: UltraFuserConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """See that every specialist's template can be aligned, by building the encoder that would read them.

    Args:
        config: names the templates; specialists without one are passed over.
        tokenizer: the specialists' own.

    Raises:
        TemplateError: a template cannot be aligned.
    """
    templates = {member.name: member.template for member in config.members if member.template is not None}
    if templates and config.end_token_id is not None:
        ConversationEncoder(tokenizer, templates, end_token_id=config.end_token_id, max_length=sys.maxsize)


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


def _pinned(specialists: Mapping[str, SpecialistSource]) -> dict[str, SpecialistSource]:
    """Hub revisions as commits: everything is read from one, and a gate-only checkpoint finds the same one again."""
    pin = cache(sources.pinned_revision)  # of several adapters on one base the base is asked for once
    return {
        name: replace(
            source,
            model_revision=pin(source.model, source.model_revision, "config.json"),
            adapter_revision=None
            if source.adapter is None
            else pin(source.adapter, source.adapter_revision, sources.ADAPTER_CONFIG),
        )
        for name, source in specialists.items()
    }


def _members(
    specialists: Mapping[str, SpecialistSource],
    tokenizers: Mapping[str, PreTrainedTokenizerBase],
    shared: PreTrainedTokenizerBase,
) -> list[SpecialistConfig]:
    """What the configuration says of each specialist; what they are made of is taken down before it is loaded."""
    fingerprint = cache(sources.source_fingerprint)
    return [
        SpecialistConfig(
            name=name,
            model=source.model,
            model_revision=source.model_revision,
            model_fingerprint=fingerprint(source.model),
            adapter=source.adapter,
            adapter_revision=source.adapter_revision,
            adapter_fingerprint=None if source.adapter is None else fingerprint(source.adapter),
            template=resolve_template(source.template, tokenizers.get(name, shared)),
            model_config=sources.load_architecture(source.model, source.model_revision),
        )
        for name, source in specialists.items()
    ]


def _require_same_weights(config: UltraFuserConfig) -> None:
    """Refuse files that are no longer what the gate was trained with, where the configuration says what that was."""
    fingerprint = cache(sources.source_fingerprint)
    for member in config.members:
        if member.model is None:
            raise CheckpointError(
                f"specialist {member.name}: the checkpoint does not say where its weights are. "
                "Use the self-contained checkpoint that holds them."
            )
        for part, place, expected in (
            ("model", member.model, member.model_fingerprint),
            ("adapter", member.adapter, member.adapter_fingerprint),
        ):
            if place is None or expected is None:
                continue
            found = fingerprint(place)
            if found != expected:
                raise CheckpointError(
                    f"specialist {member.name}: the {part} at {place} is not the one that this gate was trained with "
                    f"(expected fingerprint {expected[:12]}, got {str(found)[:12]}). Put that one back. To use or "
                    f"further train this gate with the {part} of now, set {part}_fingerprint of {member.name} to "
                    "null in the checkpoint's config.json."
                )


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


def _open_adapter(member: SpecialistConfig) -> Adapter:
    if member.adapter is None:
        return Adapter.bare()
    return Adapter.from_folder(sources.resolve_adapter(member.adapter, member.adapter_revision))
