"""Whole runs, as the command line starts them: a recipe in, a fused model or a specialist out.

The output folder is the model folder. Beside the model lie `recipe.yaml` (resolved), and in `checkpoints/`
what a killed run needs to go on.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor, nn

from ultrafuser.errors import RecipeError
from ultrafuser.files import atomic_write
from ultrafuser.modeling.checkpoint import (
    FusedModel,
    SpecialistSource,
    export_adapter,
    export_specialist,
    fuse,
    open_fused,
    save_fused,
    without_sources,
)
from ultrafuser.modeling.configuration import BankKind
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder
from ultrafuser.training.data import Messages, load_domain_conversations
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe
from ultrafuser.training.stages import (
    EncodedData,
    StageResult,
    check_stage2,
    encode_data,
    fresh_adapter,
    hold_in,
    run_specialize,
    run_stage1,
    run_stage2,
)

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
_NAME = "specialist"


@dataclass(frozen=True)
class TrainedModel:
    """What a run gives.

    Attributes:
        fused: model and tokenizer; for `specialize` a fused model with N = 1.
        encoder: reads conversations for it.
        data: what it is trained on.
        stages: stage name -> what it did.
    """

    fused: FusedModel
    encoder: ConversationEncoder
    data: EncodedData
    stages: dict[str, StageResult] = field(default_factory=dict)


def train(
    recipe: FusionRecipe,
    folder: Path,
    *,
    only_stage1: bool = False,
    resume: bool = False,
    on_start: Callable[[TrainedModel], None] | None = None,
    on_stage: Callable[[str, TrainedModel], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TrainedModel:
    """Stage 1, and stage 2 if the recipe has one; the model is written to `folder`.

    After stage 1 the checkpoint is gate-only, after stage 2 self-contained.

    Args:
        recipe: what to do.
        folder: of the model and its checkpoints.
        only_stage1: leave stage 2 out.
        resume: go on with a run that stopped in `folder`.
        on_start: called before the first stage, when everything is loaded and encoded.
        on_stage: called after every stage with its name, "stage1" or "stage2".
        on_progress: called with (done, all) while states are cached.

    Returns:
        The model, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, or settings do not fit together.
        DataError: a domain is empty or a row malformed.
    """
    check_folder(folder, recipe, resume)
    conversations = _training_rows(recipe)
    torch.manual_seed(recipe.seed)  # the gate's start
    fused = fuse(
        {name: entry.source() for name, entry in recipe.specialists.items()},
        bank=recipe.bank,
        gate_form=recipe.gate.form,
        gate_size=recipe.gate.size,
        end_token=recipe.end_token,
        dtype=getattr(torch, recipe.dtype),
    )
    if recipe.gate.start is not None:
        start_gate(fused.model, recipe.gate.start)
    encoder = encoder_for(fused, recipe.max_length)
    trained = TrainedModel(fused, encoder, encode_data(encoder, conversations, recipe.too_long))
    data = trained.data
    two_stages = recipe.stage2 is not None and not only_stage1
    if two_stages:
        assert recipe.stage2 is not None
        check_stage2(fused.model, recipe.stage2)
    if on_start is not None:
        on_start(trained)
    _write_recipe(recipe, folder)
    checkpoints = folder / CHECKPOINTS
    trained.stages["stage1"] = run_stage1(
        fused.model, encoder, data, recipe.stage1, checkpoints / "stage1", recipe.seed, on_progress
    )
    if is_main_process():
        save_fused(fused, folder if not two_stages else checkpoints / "after_stage1", gate_only=True)
    if on_stage is not None:
        on_stage("stage1", trained)
    if two_stages:
        assert recipe.stage2 is not None
        trained.stages["stage2"] = run_stage2(
            fused.model, encoder, data, recipe.stage2, checkpoints / "stage2", recipe.seed
        )
        finish_specialists(fused.model, getattr(torch, recipe.dtype))
        if is_main_process():
            save_fused(fused, folder)
        if on_stage is not None:
            on_stage("stage2", trained)
    return trained


def specialize(
    recipe: SpecializeRecipe,
    folder: Path,
    *,
    resume: bool = False,
    on_start: Callable[[TrainedModel], None] | None = None,
) -> TrainedModel:
    """Fine-tune one base on the recipe's domains; writes a PEFT adapter folder or a whole model folder.

    Args:
        recipe: what to do.
        folder: the result lies in its folder `adapter` or `model`.
        resume: go on with a run that stopped in `folder`.
        on_start: called before the training, when everything is loaded and encoded.

    Returns:
        The specialist as a fused model with N = 1, as it was written, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, or settings do not fit together.
        DataError: a domain is empty or a row malformed.
    """
    check_folder(folder, recipe, resume)
    conversations = _training_rows(recipe)
    fused = _open_single(recipe)
    encoder = encoder_for(fused, recipe.max_length)
    trained = TrainedModel(fused, encoder, encode_data(encoder, conversations, recipe.too_long))
    if on_start is not None:
        on_start(trained)
    _write_recipe(recipe, folder)
    start = [parameter.detach().clone() for parameter in _tuned(recipe, fused)] if recipe.start_share else []
    trained.stages["specialize"] = run_specialize(
        fused.model,
        encoder,
        trained.data,
        recipe.stage,
        recipe.train,
        folder / CHECKPOINTS,
        recipe.seed,
        recipe.gradient_checkpointing,
    )
    _finish_single(recipe, fused, start)
    if is_main_process():
        _write_specialist(recipe, fused, folder)
    return trained


def check_folder(folder: Path, recipe: FusionRecipe | SpecializeRecipe, resume: bool) -> None:
    """See that the output folder is free for this run, or holds what it is to go on with.

    Raises:
        RecipeError: the folder holds another run, or anything else; or this run, without `resume`.
    """
    if not is_main_process() or not folder.exists():
        return  # one process speaks for all: the folder may be its work already
    if not folder.is_dir():
        raise RecipeError(f"output folder {folder} is a file. Choose an empty or new folder.")
    if not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        raise RecipeError(
            f"output folder {folder} is not empty and holds no run. Choose an empty or new folder."
        )
    difference = _difference_from(folder / RECIPE_FILE, recipe)
    if difference is not None:
        raise RecipeError(f"output folder {folder} holds another run: {difference}. Choose another folder.")
    if not resume:
        raise RecipeError(f"output folder {folder} holds this run already. Give --resume to go on with it.")


def _difference_from(path: Path, recipe: FusionRecipe | SpecializeRecipe) -> str | None:
    """The first setting in which a written recipe differs from this one."""
    try:
        written = type(recipe).model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError):
        return f"its {RECIPE_FILE} is no recipe for this command"
    theirs, mine = dict(_settings(written.model_dump())), dict(_settings(recipe.model_dump()))
    for key in (*mine, *theirs):
        if theirs.get(key, "unset") != mine.get(key, "unset"):
            return f"{key} is {theirs.get(key, 'unset')} there, but {mine.get(key, 'unset')} in this recipe"
    return None


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _write_recipe(recipe: FusionRecipe | SpecializeRecipe, folder: Path) -> None:
    if is_main_process():
        content = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        with atomic_write(folder / RECIPE_FILE) as path:
            path.write_text(content, encoding="utf-8")


def encoder_for(fused: FusedModel, max_length: int | None = None) -> ConversationEncoder:
    """The encoder that reads conversations for a fused model, each specialist in its own template.

    Args:
        fused: model and tokenizer.
        max_length: tokens a specialist reads at most; its context length when None or larger than that.

    Raises:
        TemplateError: a specialist has no template, or one that cannot be aligned.
    """
    return fused.model.conversation_encoder(fused.tokenizer, max_length)


def start_gate(model: UltraFuserForCausalLM, source: str) -> None:
    """Start from another fused model's gate: the warm-up after a specialist was added or dropped.

    A shared gate is taken over whole; of a per_specialist gate the networks of specialists that both have.

    Args:
        model: whose gate is set.
        source: folder or hub id of the other fused model.

    Raises:
        RecipeError: forms or widths differ, or nothing can be taken over (joint gates of other specialists).
    """
    other = open_fused(source).model
    mine, theirs = model.gate, other.gate
    same = mine.form == theirs.form and mine.gate_size == theirs.gate_size
    if same and (mine.form == "shared" or model.bank.names == other.bank.names):
        mine.load_state_dict(theirs.state_dict())
        return
    if not same or mine.form == "joint":
        raise RecipeError(
            f"gate.start: {source} has a {theirs.form} gate of size {theirs.gate_size} over "
            f"{', '.join(other.bank.names)}, which cannot start a {mine.form} gate of size {mine.gate_size} "
            f"over {', '.join(model.bank.names)}. Leave gate.start out."
        )
    if not set(model.bank.names) & set(other.bank.names):
        raise RecipeError(
            f"gate.start: {source} and this recipe have no specialist in common, so nothing can be taken over. "
            "Leave gate.start out."
        )
    for index, name in enumerate(model.bank.names):
        if name in other.bank.names:
            mine.networks[index].load_state_dict(theirs.networks[other.bank.names.index(name)].state_dict())


def finish_specialists(model: UltraFuserForCausalLM, dtype: torch.dtype) -> None:
    """After training specialists: merge adopted adapters, return to the recipe's dtype, forget their sources.

    Args:
        model: changed in place.
        dtype: of the recipe.
    """
    if isinstance(model.bank, WholeSpecialists):
        model.bank.merge_adopted()
    model.requires_grad_(False)
    hold_in(model.bank.parameters(), dtype)
    model.config = without_sources(model.config)
    model.eval()


def is_main_process() -> bool:
    """Whether this process writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def _training_rows(recipe: FusionRecipe | SpecializeRecipe) -> dict[str, list[Messages]]:
    return load_domain_conversations(recipe.data_files, recipe.data_rows)


def _open_single(recipe: SpecializeRecipe) -> FusedModel:
    source = SpecialistSource(
        model=recipe.model,
        model_revision=recipe.model_revision,
        adapter=recipe.adapter,
        template=recipe.template,
    )
    dtype = getattr(torch, recipe.dtype)
    bank: BankKind = "whole" if recipe.train == "full" else "adapters"
    fused = fuse({_NAME: source}, bank=bank, end_token=recipe.end_token, dtype=dtype)
    if recipe.train == "full" or recipe.adapter is not None:
        return fused
    bare = fused.model.bank
    assert isinstance(bare, AdapterSpecialists)
    base = bare.base
    adapter = fresh_adapter(base, recipe.lora, recipe.model, recipe.seed)
    model = UltraFuserForCausalLM(fused.model.config, AdapterSpecialists(base, {_NAME: adapter}))
    return FusedModel(model.eval(), fused.tokenizer)


def _tuned(recipe: SpecializeRecipe, fused: FusedModel) -> list[nn.Parameter]:
    bank = fused.model.bank
    assert isinstance(bank, WholeSpecialists | AdapterSpecialists)
    return list(bank.parameters() if recipe.train == "full" else bank.lora_parameters())


def _finish_single(recipe: SpecializeRecipe, fused: FusedModel, start: Sequence[Tensor]) -> None:
    """Average with the start where that is asked for, and bring the weights into the types they are written
    in, so that what is measured is what is kept.
    """
    fused.model.requires_grad_(False)
    tuned = _tuned(recipe, fused)
    for parameter, before in zip(tuned, start, strict=False):  # no start, no averaging
        parameter.lerp_(before.to(parameter), recipe.start_share)  # training may have moved it to a GPU
    hold_in(tuned, getattr(torch, recipe.dtype) if recipe.train == "full" else torch.bfloat16)


def _write_specialist(recipe: SpecializeRecipe, fused: FusedModel, folder: Path) -> None:
    if recipe.train == "lora":
        export_adapter(fused.model, _NAME, folder / "adapter")
    else:
        export_specialist(fused.model, _NAME, folder / "model")
        fused.tokenizer.save_pretrained(folder / "model")
