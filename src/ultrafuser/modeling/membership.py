"""Adding a specialist to a fused model, and dropping one.

Both work on what is in memory, so also on specialists that were trained further in stage 2. What the gate has
learned is kept as far as it still applies; afterwards it should be warmed up again (stage 1).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.modeling import sources
from ultrafuser.modeling.assembly import FusedModel, SpecialistSource, fuse, model_from_tensors
from ultrafuser.modeling.configuration import SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, SpecialistBank, WholeSpecialists
from ultrafuser.modeling.templates import vocabulary_difference


def add_specialist(fused: FusedModel, name: str, source: SpecialistSource) -> FusedModel:
    """Put one more specialist beside the others, as the last.

    The new one has to end its responses with the fused model's end token. A shared gate is kept whole. Of a
    per_specialist gate the networks of the others are kept; the new one's scores are 0 until it is trained.
    A joint gate starts anew, as the uniform average.

    Args:
        fused: a fused model and its tokenizer. Whole specialists are shared with the result, not copied.
        name: of the new specialist.
        source: where it comes from ("tokenizer" as its template means its own tokenizer's). For an adapter
            bank: an adapter on the bank's base, or that base bare.

    Returns:
        The larger model, in evaluation mode, on the same device, and the same tokenizer.

    Raises:
        UltrafuserError: the name is taken or not valid, the new one has no tokenizer, or a shared gate cannot
            read its hidden size.
        TemplateError: its template cannot be aligned.
        CheckpointError: another vocabulary, another base in an adapter bank, or an adapter that does not fit.
    """
    model, tokenizer = fused
    if name in model.specialist_names:
        raise UltrafuserError(
            f"there is a specialist {name!r} already. Drop it first, or choose another name."
        )
    own = sources.load_tokenizer(source.model, source.model_revision)
    difference = None if own is None else vocabulary_difference(tokenizer, own)
    if difference is not None:
        raise CheckpointError(
            f"specialist {name} has another vocabulary than the fused model: {difference} Logits can only be "
            "fused over one vocabulary; use a specialist of the same family."
        )
    end_token = tokenizer.convert_ids_to_tokens(model.config.end_token_id)
    dtype = model.bank.heads()[0].weight.dtype
    newcomer = fuse({name: source}, bank=model.config.bank, end_token=end_token, dtype=dtype).model
    if isinstance(model.bank, AdapterSpecialists) and isinstance(newcomer.bank, AdapterSpecialists):
        _require_same_base(model.bank, newcomer.bank, f"specialist {name}: {source.model}")
    members = [*model.config.members, *newcomer.config.members]
    return FusedModel(_rebuilt(model, members, _parts(model.bank) | _parts(newcomer.bank)), tokenizer)


def drop_specialist(fused: FusedModel, name: str) -> FusedModel:
    """Leave one specialist out.

    A shared gate is kept whole, of a per_specialist gate the networks of those that stay; a joint gate starts
    anew, as the uniform average.

    Args:
        fused: a fused model and its tokenizer. Whole specialists are shared with the result, not copied.
        name: of the specialist that goes.

    Returns:
        The smaller model, in evaluation mode, on the same device, and the same tokenizer.

    Raises:
        UltrafuserError: there is no such specialist, or no other one.
    """
    model, tokenizer = fused
    if name not in model.specialist_names:
        known = ", ".join(model.specialist_names)
        raise UltrafuserError(f"there is no specialist {name!r}; there are {known}.")
    if model.num_specialists == 1:
        raise UltrafuserError(f"{name} is the only specialist; at least 1 must stay. Add another one first.")
    members = [member for member in model.config.members if member.name != name]
    parts = _parts(model.bank)
    del parts[name]
    return FusedModel(_rebuilt(model, members, parts), tokenizer)


def _parts(bank: SpecialistBank) -> dict[str, Any]:
    """What makes each specialist: its adapter in an adapter bank, else its model."""
    if isinstance(bank, AdapterSpecialists):
        return {name: Adapter(bank.adapter_configs[name], bank.adapter_tensors(name)) for name in bank.names}
    assert isinstance(bank, WholeSpecialists)
    return dict(zip(bank.names, bank.models, strict=True))


def _rebuilt(
    old: UltraFuserForCausalLM, members: Sequence[SpecialistConfig], parts: Mapping[str, Any]
) -> UltraFuserForCausalLM:
    """The model over other specialists, with what applies of the old gate."""
    if isinstance(old.bank, AdapterSpecialists):
        base = model_from_tensors(old.bank.base.config, old.bank.base_tensors(), old.bank.base.dtype)
        folded = AdapterSpecialists(base, parts)
        members = [replace(member, adapter_config=folded.adapter_configs[member.name]) for member in members]
        bank: SpecialistBank = folded
    else:
        bank = WholeSpecialists(parts)
    settings = old.config.to_dict() | {"specialists": [vars(member) for member in members]}
    model = UltraFuserForCausalLM(UltraFuserConfig.from_dict(settings), bank)
    model.generation_config = copy.deepcopy(old.generation_config)
    _keep_gate(old, model)
    return model.to(old.device).eval()


def _keep_gate(old: UltraFuserForCausalLM, new: UltraFuserForCausalLM) -> None:
    if old.gate.form == "shared":
        new.gate.load_state_dict(old.gate.state_dict())
    elif old.gate.form == "per_specialist":
        kept = dict(zip(old.specialist_names, old.gate.networks, strict=True))
        for name, network in zip(new.specialist_names, new.gate.networks, strict=True):
            if name in kept:
                network.load_state_dict(kept[name].state_dict())


def _require_same_base(bank: AdapterSpecialists, newcomer: AdapterSpecialists, who: str) -> None:
    """Compare weights, not names: one base may have several names, and one name several weights."""
    mine, theirs = bank.base_tensors(), newcomer.base_tensors()
    # A base that was once stored in bfloat16 differs from its float32 source by the rounding.
    differing = [
        key
        for key in sorted(mine.keys() | theirs.keys())
        if key not in mine
        or key not in theirs
        or mine[key].shape != theirs[key].shape
        or not torch.allclose(mine[key].cpu().float(), theirs[key].float(), rtol=5e-3, atol=1e-5)
    ]
    if differing:
        raise CheckpointError(
            f"{who} is not the base that the adapters of this model stand on ({len(differing)} tensors "
            f"differ, first: {differing[0]}). Use an adapter on the same base, or export the fused model as "
            "whole specialists and add it there."
        )
