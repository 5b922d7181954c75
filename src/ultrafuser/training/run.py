"""Whole runs, as the command line starts them: a recipe in, a fused model or a specialist out.

The output folder is the model folder. Beside the model lie `recipe.yaml` (resolved), `inputs.json` (what the data
files and specialists were), and in `checkpoints/` what a killed run needs to go on.
"""

import json
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
from ultrafuser.fusion.gate import Gate
from ultrafuser.modeling.assembly import FusedModel, SpecialistSource, fuse
from ultrafuser.modeling.checkpoint import StoredGate, read_gate, save_fused
from ultrafuser.modeling.configuration import BankKind, without_sources
from ultrafuser.modeling.export import export_adapter, export_specialist_with_tokenizer
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder
from ultrafuser.training.data import Messages, load_domain_conversations
from ultrafuser.training.inputs import describe_files, describe_specialists, describe_tokens
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
from ultrafuser.training.trainer import last_checkpoint

RECIPE_FILE = "recipe.yaml"
INPUTS_FILE = "inputs.json"
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
) -> TrainedModel:
    """Stage 1, and stage 2 if the recipe has one; the model is written to `folder`.

    After stage 1 the checkpoint is gate-only, after stage 2 self-contained.

    Args:
        recipe: what to do.
        folder: of the model and its checkpoints.
        only_stage1: leave stage 2 out.
        resume: go on with a run that stopped in `folder`; recipe, data and specialists must be what they were.
        on_start: called before the first stage, when everything is loaded and encoded.
        on_stage: called after every stage with its name, "stage1" or "stage2".

    Returns:
        The model, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, one that began with other data or specialists, or one that is past
            stage 1 when that is all that is asked for; settings do not fit together.
        DataError: a domain is empty or a row malformed.
    """
    check_folder(folder, recipe, resume)
    if only_stage1 and last_checkpoint(folder / CHECKPOINTS / "stage2") is not None:
        raise RecipeError(
            f"output folder {folder} holds a run that has begun stage 2, and --stage 1 would put the gate of stage 1 "
            "in the place of its model. Leave --stage out, or choose another folder."
        )
    files, conversations = _read_data(recipe, folder)
    torch.manual_seed(recipe.seed)  # the gate's start
    fused = fuse(
        {name: entry.source() for name, entry in recipe.specialists.items()},
        bank=recipe.bank,
        gate_form=recipe.gate.form,
        gate_size=recipe.gate.size,
        end_token=recipe.end_token,
        dtype=getattr(torch, recipe.dtype),
    )
    fused.model.gate.dropout.p = recipe.gate.dropout
    if recipe.gate.start is not None:
        start_gate(fused.model, recipe.gate.start)
    two_stages = recipe.stage2 is not None and not only_stage1
    if two_stages:
        assert recipe.stage2 is not None
        check_stage2(fused.model, recipe.stage2)
    trained = _begin(recipe, folder, fused, files, conversations, on_start)
    encoder, data = trained.encoder, trained.data
    checkpoints = folder / CHECKPOINTS
    trained.stages["stage1"] = run_stage1(
        fused.model, encoder, data, recipe.stage1, checkpoints / "stage1", recipe.seed
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
        resume: go on with a run that stopped in `folder`; recipe, data and base must be what they were.
        on_start: called before the training, when everything is loaded and encoded.

    Returns:
        The specialist as a fused model with N = 1, as it was written, in evaluation mode.

    Raises:
        RecipeError: the folder holds another run, or one that began with other data or specialists; settings do
            not fit together.
        DataError: a domain is empty or a row malformed.
    """
    check_folder(folder, recipe, resume)
    files, conversations = _read_data(recipe, folder)
    fused = _open_single(recipe)
    trained = _begin(recipe, folder, fused, files, conversations, on_start)
    start = [parameter.detach().clone() for parameter in _tuned(recipe, fused)] if recipe.start_share else []
    trained.stages["specialize"] = run_specialize(
        fused.model,
        trained.encoder,
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
    if list(theirs) != list(mine):  # which decides what is drawn together, and which score is whose
        return "its specialists or domains stand in another order than in this recipe"
    return None


def _settings(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_data(
    recipe: FusionRecipe | SpecializeRecipe, folder: Path
) -> tuple[dict[str, str], dict[str, list[Messages]]]:
    """The recipe's training files, described and read; a resumed run must find them as they were."""
    conversations = load_domain_conversations(recipe.data_files, recipe.data_rows)
    files = describe_files(recipe.data_files) if is_main_process() else {}
    _check_inputs(folder, files)
    return files, conversations


def _begin(
    recipe: FusionRecipe | SpecializeRecipe,
    folder: Path,
    fused: FusedModel,
    files: Mapping[str, str],
    conversations: Mapping[str, Sequence[Messages]],
    on_start: Callable[[TrainedModel], None] | None,
) -> TrainedModel:
    """Encode the data, see that a resumed run goes on with what it began with, and write down what that is."""
    fused.model.to(_training_device())  # what is measured before the first stage is measured there, too
    encoder = encoder_for(fused, recipe.max_length)
    data = encode_data(encoder, conversations, recipe.too_long)
    trained = TrainedModel(fused, encoder, data)
    inputs = {**files, **describe_specialists(fused.model), **describe_tokens(data.conversations)}
    _check_inputs(folder, inputs)
    if on_start is not None:
        on_start(trained)
    if is_main_process():
        settings = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        described = json.dumps(inputs, indent=2, ensure_ascii=False)
        for name, content in ((RECIPE_FILE, settings), (INPUTS_FILE, described + "\n")):
            with atomic_write(folder / name) as path:
                path.write_text(content, encoding="utf-8")
    return trained


def _training_device() -> torch.device:
    """Where the Trainer of this process will put the model: a GPU of its own, or the CPU."""
    gpu = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", gpu) if torch.cuda.is_available() else torch.device("cpu")


def _check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Compare with what the run in the folder began with, if one did: it writes this before it trains."""
    path = folder / INPUTS_FILE
    if not is_main_process() or not path.is_file():
        return
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for name, now in inputs.items():
        before = recorded.get(name, "missing")
        if before != now:
            raise RecipeError(
                f"output folder {folder} holds a run that began with other inputs: {name} was {before} then, "
                f"and is {now} now. Put back what it was, or begin a new run in another folder."
            )


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
        RecipeError: forms, sizes or widths differ, or there is no specialist whose network could be taken over.
    """
    names, mine = StoredGate(model.bank.names, model.gate)
    others, theirs = read_gate(source)
    if mine.form != theirs.form:
        pairs = []
    elif mine.form == "shared" or names == others:
        pairs = list(zip(mine.networks, theirs.networks, strict=True))
    elif mine.form == "per_specialist":
        known = [name for name in names if name in others]
        pairs = [(mine.networks[names.index(n)], theirs.networks[others.index(n)]) for n in known]
    else:
        pairs = []
    if not pairs or any(_shapes(own) != _shapes(start) for own, start in pairs):
        raise RecipeError(
            f"gate.start: {source} has {_description(others, theirs)}, which cannot start {_description(names, mine)}: "
            "form, size and widths must be the same, as must the specialists of a joint gate, and one of a "
            "per_specialist gate. Leave gate.start out."
        )
    for own, start in pairs:
        own.load_state_dict(start.state_dict())


def _shapes(network: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in network.parameters()]


def _description(names: Sequence[str], gate: Gate) -> str:
    widths = zip(names, gate.hidden_sizes, strict=True)
    over = ", ".join(f"{name} (width {width})" for name, width in widths)
    return f"a {gate.form} gate of size {gate.gate_size} over {over}"


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
        export_specialist_with_tokenizer(fused, _NAME, folder / "model")
