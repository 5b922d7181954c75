"""Whole runs, as the command line starts them: a recipe and an output folder in, a fused model or a specialist out.

The output folder is the model folder. Beside the model lie `recipe.yaml` (resolved), and in `checkpoints/` what a
killed run needs to go on.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from ultrafuser.errors import RecipeError
from ultrafuser.files import atomic_write
from ultrafuser.modeling import sources
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
from ultrafuser.modeling.configuration import SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder
from ultrafuser.training.data import Messages, load_domain_conversations
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe
from ultrafuser.training.stages import (
    StageResult,
    encode_data,
    fresh_adapter,
    run_specialize,
    run_stage1,
    run_stage2,
)

RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainedModel:
    """What a run gives.

    Attributes:
        fused: model and tokenizer; for `specialize` a fused model with N = 1.
        encoder: reads conversations for it.
        stages: stage name -> what it did.
        after_stage: called states in between, by stage name, when `train` was asked to report them.
    """

    fused: FusedModel
    encoder: ConversationEncoder
    stages: dict[str, StageResult] = field(default_factory=dict)


def train(
    recipe: FusionRecipe,
    folder: Path,
    *,
    only_stage1: bool = False,
    resume: bool = False,
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
        on_stage: called after every stage with its name, "stage1" or "stage2".
        on_progress: called with (done, all) while states are cached.

    Returns:
        The model, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, or settings do not fit together.
        DataError: a domain is empty or a row malformed.
    """
    claim_folder(folder, recipe, resume)
    conversations = _training_rows(recipe)
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
    data = encode_data(encoder, conversations, recipe.too_long)
    trained = TrainedModel(fused, encoder)
    checkpoints = folder / CHECKPOINTS
    trained.stages["stage1"] = run_stage1(
        fused.model, encoder, data, recipe.stage1, checkpoints / "stage1", recipe.seed, on_progress
    )
    two_stages = recipe.stage2 is not None and not only_stage1
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


def specialize(recipe: SpecializeRecipe, folder: Path, *, resume: bool = False) -> TrainedModel:
    """Fine-tune one base on the recipe's domains; writes a PEFT adapter folder or a whole model folder.

    Args:
        recipe: what to do.
        folder: where adapter or model go.
        resume: go on with a run that stopped in `folder`.

    Returns:
        The specialist as a fused model with N = 1, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, or settings do not fit together.
        DataError: a domain is empty or a row malformed.
    """
    claim_folder(folder, recipe, resume)
    conversations = _training_rows(recipe)
    fused = _open_single(recipe)
    encoder = encoder_for(fused, recipe.max_length)
    data = encode_data(encoder, conversations, recipe.too_long)
    result = run_specialize(
        fused.model, encoder, data, recipe.stage, recipe.train, folder / CHECKPOINTS, recipe.seed,
        recipe.gradient_checkpointing,
    )  # fmt: skip
    trained = TrainedModel(fused, encoder, {"specialize": result})
    if is_main_process():
        _write_specialist(recipe, fused, folder)
    return trained


def claim_folder(folder: Path, recipe: FusionRecipe | SpecializeRecipe, resume: bool) -> None:
    """Make the output folder this run's own, with its resolved recipe in it.

    Raises:
        RecipeError: the folder holds another run, or anything else.
    """
    wanted = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    written = folder / RECIPE_FILE
    if folder.is_dir() and any(folder.iterdir()):
        if not written.is_file():
            raise RecipeError(f"output folder {folder} is not empty and holds no run. Choose an empty or new folder.")
        if written.read_text() != wanted:
            raise RecipeError(
                f"output folder {folder} holds another run: its {RECIPE_FILE} differs from this recipe. "
                "Choose another folder."
            )
        if not resume:
            raise RecipeError(f"output folder {folder} holds this run already. Give --resume to go on with it.")
    if is_main_process():
        with atomic_write(written) as path:
            path.write_text(wanted)


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
    """Start from another fused model's gate: after a specialist was added or dropped, this is the warm-up's start.

    A shared gate is taken over whole; of a per_specialist gate the networks of the specialists that both have.

    Args:
        model: whose gate is set.
        source: folder or hub id of the other fused model.

    Raises:
        RecipeError: the forms or widths differ, or nothing can be taken over (joint gates of other specialists).
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
            f"{', '.join(other.bank.names)}, which cannot start a {mine.form} gate of size {mine.gate_size} over "
            f"{', '.join(model.bank.names)}. Leave gate.start out."
        )
    for index, name in enumerate(model.bank.names):
        if name in other.bank.names:
            mine.networks[index].load_state_dict(theirs.networks[other.bank.names.index(name)].state_dict())


def finish_specialists(model: UltraFuserForCausalLM, dtype: torch.dtype) -> None:
    """After training specialists: merge adopted adapters, return to the recipe's dtype, forget the old sources."""
    if isinstance(model.bank, WholeSpecialists):
        model.bank.merge_adopted()
    model.requires_grad_(False)
    model.bank.to(dtype)
    model.config = without_sources(model.config)
    model.eval()


def is_main_process() -> bool:
    """Whether this process writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def _training_rows(recipe: FusionRecipe | SpecializeRecipe) -> dict[str, list[Messages]]:
    return {d: rows[: recipe.data_rows] for d, rows in load_domain_conversations(recipe.data_files).items()}


def _open_single(recipe: SpecializeRecipe) -> FusedModel:
    source = SpecialistSource(
        model=recipe.model, model_revision=recipe.model_revision, adapter=recipe.adapter, template=recipe.template
    )
    dtype = getattr(torch, recipe.dtype)
    if recipe.train == "full":
        return fuse({"specialist": source}, bank="whole", end_token=recipe.end_token, dtype=dtype)
    fused = fuse({"specialist": source}, bank="adapters", end_token=recipe.end_token, dtype=dtype)
    if recipe.adapter is not None:
        return fused
    base = sources.load_model(recipe.model, recipe.model_revision, dtype)
    adapter = fresh_adapter(base, recipe.lora, recipe.model, recipe.seed)
    bank = AdapterSpecialists(base, {"specialist": adapter})
    members: list[SpecialistConfig | Mapping] = list(fused.model.config.members)
    config = UltraFuserConfig.from_dict(fused.model.config.to_dict() | {"specialists": [vars(m) for m in members]})
    return FusedModel(UltraFuserForCausalLM(config, bank).eval(), fused.tokenizer)


def _write_specialist(recipe: SpecializeRecipe, fused: FusedModel, folder: Path) -> None:
    finished = folder / ("adapter" if recipe.train == "lora" else "model")
    if recipe.train == "lora":
        export_adapter(fused.model, "specialist", finished, dtype=torch.bfloat16)
    else:
        fused.model.bank.to(getattr(torch, recipe.dtype))
        export_specialist(fused.model, "specialist", finished)
        fused.tokenizer.save_pretrained(finished)
