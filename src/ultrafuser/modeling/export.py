"""A fused model in its other forms: gate-only, self-contained, whole specialists, one specialist, an adapter.

Every form is one new folder, written whole or not at all.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import save_file

from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.modeling.assembly import FusedModel, check_templates, model_from_tensors
from ultrafuser.modeling.checkpoint import save_fused
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.lora import PEFT_PREFIX
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.sources import ADAPTER_WEIGHTS
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import resolve_template

ExportForm = Literal["self-contained", "gate-only", "whole", "specialist", "adapter"]
EXPORT_FORMS: tuple[ExportForm, ...] = get_args(ExportForm)
_FORMS_OF_ONE = ("specialist", "adapter")


def export(
    fused: FusedModel,
    folder: str | os.PathLike[str],
    form: ExportForm = "self-contained",
    name: str | None = None,
    dtype: torch.dtype | None = None,
    template: str | None = None,
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
        template: that all specialists read from now on: a built-in name, "tokenizer", or Jinja text. None leaves each
            its own. Neither specialists nor gate were trained on it, so stage 2 should follow.

    Raises:
        TemplateError: the template is unknown or cannot be aligned.
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
    if template is not None:
        fused = with_template(fused, template)
    with atomic_write(folder) as target:
        if form == "adapter":
            export_adapter(fused.model, str(name), target, dtype)
        elif form == "specialist":
            export_specialist_with_tokenizer(fused, str(name), target)
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


def with_template(fused: FusedModel, template: str) -> FusedModel:
    """The same fused model, all of whose specialists read one chat template.

    Args:
        fused: its configuration is changed in place.
        template: a built-in name, "tokenizer", or Jinja text.

    Raises:
        TemplateError: the template is unknown or cannot be aligned; nothing is changed then.
    """
    jinja = resolve_template(template, fused.tokenizer)
    config = fused.model.config
    settings = config.to_dict() | {"specialists": [s | {"template": jinja} for s in config.specialists]}
    check_templates(UltraFuserConfig.from_dict(settings), fused.tokenizer)
    for specialist in config.specialists:
        specialist["template"] = jinja
    return fused


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
        save_file(tensors, scratch / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def export_specialist_with_tokenizer(fused: FusedModel, name: str, folder: str | os.PathLike[str]) -> None:
    """Write one specialist as a plain model beside a tokenizer that has the specialist's own chat template.

    Args:
        fused: model and tokenizer.
        name: of the specialist.
        folder: where the model folder has to be; both are there, or neither is.

    Raises:
        UltrafuserError: there is no specialist of that name.
    """
    _require_member(fused.model, name)
    member = next(member for member in fused.model.config.members if member.name == name)
    tokenizer = fused.tokenizer
    own_template = tokenizer.chat_template
    with atomic_write(folder) as scratch:
        export_specialist(fused.model, name, scratch)
        try:
            tokenizer.chat_template = own_template if member.template is None else member.template
            tokenizer.save_pretrained(scratch)
        finally:
            tokenizer.chat_template = own_template


def _require_member(model: UltraFuserForCausalLM, name: str) -> None:
    if name not in model.bank.names:
        raise UltrafuserError(f"there is no specialist {name!r}; there are {', '.join(model.bank.names)}.")
