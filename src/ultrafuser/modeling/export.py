"""A fused model in its other forms: gate-only, self-contained, whole specialists, one specialist, an adapter.

Every form is one new folder, written whole or not at all.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.modeling.checkpoint import (
    FusedModel,
    export_adapter,
    export_specialist,
    model_from_tensors,
    save_fused,
)
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists

ExportForm = Literal["self-contained", "gate-only", "whole", "specialist", "adapter"]
EXPORT_FORMS: tuple[ExportForm, ...] = get_args(ExportForm)
_FORMS_OF_ONE = ("specialist", "adapter")


def export(
    fused: FusedModel,
    folder: str | os.PathLike[str],
    form: ExportForm = "self-contained",
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a fused model, or one of its specialists, in another form.

    Forms:
        self-contained: gate, specialists and tokenizer.
        gate-only: the gate and where the specialists come from.
        whole: self-contained, adapters merged into whole specialists.
        specialist: one specialist as a plain model of its architecture, with tokenizer and its chat template.
        adapter: one specialist's adapter as a PEFT folder.

    Args:
        fused: a fused model and its tokenizer.
        folder: where the result has to be; it must not exist, or be empty.
        form: one of `EXPORT_FORMS`.
        name: of the specialist, for the last two forms.
        dtype: of the tensors of an adapter that is written; as they are when None.

    Raises:
        UltrafuserError: the folder is in use, `name` is missing, unknown or not wanted, or this model has no
            such form.
    """
    if form not in EXPORT_FORMS:
        raise UltrafuserError(f"form must be one of {', '.join(EXPORT_FORMS)}, got {form!r}.")
    if (name is not None) != (form in _FORMS_OF_ONE):
        raise UltrafuserError(
            f"form {form} needs the name of a specialist ({', '.join(fused.model.specialist_names)})."
            if name is None
            else f"form {form} holds all specialists, but a name was given ({name}). Leave the name out."
        )
    require_new_folder(folder)
    with atomic_write(folder) as target:
        if form == "adapter":
            export_adapter(fused.model, str(name), target, dtype)
        elif form == "specialist":
            _export_whole_specialist(fused, str(name), target)
        else:
            save_fused(as_whole(fused) if form == "whole" else fused, target, gate_only=form == "gate-only")


def require_new_folder(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something, before time goes into what should be written there.

    Raises:
        UltrafuserError: it is a file, or a folder that is not empty.
    """
    path = Path(folder)
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists():
        raise UltrafuserError(f"output folder {path} must be new or empty, but it is in use. Choose another.")


def as_whole(fused: FusedModel) -> FusedModel:
    """The same fused model with every adapter merged into a whole specialist of its own.

    Args:
        fused: over either bank; over whole specialists it is returned as it is.

    Returns:
        A model with the same gate that gives the same logits up to rounding. It holds N copies of the base.
    """
    model, bank = fused.model, fused.model.bank
    if not isinstance(bank, AdapterSpecialists):
        return fused
    merged = {
        name: model_from_tensors(bank.base.config, bank.merged_tensors(name), bank.base.dtype)
        for name in bank.names
    }
    members = [replace(member, adapter_config=None) for member in model.config.members]
    settings = model.config.to_dict() | {"bank": "whole", "specialists": [vars(member) for member in members]}
    whole = UltraFuserForCausalLM(UltraFuserConfig.from_dict(settings), WholeSpecialists(merged))
    whole.gate.load_state_dict(model.gate.state_dict())
    whole.generation_config = model.generation_config
    return FusedModel(whole.to(model.device).eval(), fused.tokenizer)


def _export_whole_specialist(fused: FusedModel, name: str, folder: Path) -> None:
    export_specialist(fused.model, name, folder)
    member = next(member for member in fused.model.config.members if member.name == name)
    tokenizer = fused.tokenizer
    own_template = tokenizer.chat_template
    try:
        tokenizer.chat_template = own_template if member.template is None else member.template
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = own_template
