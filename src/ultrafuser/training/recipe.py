"""Recipes of `ultrafuser train` and `ultrafuser specialize`.

Defaults are the paper's. Relative paths in a recipe are relative to the recipe's own folder, so that a recipe
and its data can move together; package:// sources and hub ids stay as they are.
"""

from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, field_validator, model_validator

from ultrafuser.fusion.gate import GateForm
from ultrafuser.modeling.assembly import SpecialistSource
from ultrafuser.modeling.configuration import BankKind
from ultrafuser.modeling.sources import PACKAGE_SCHEME, resolve_file
from ultrafuser.recipes import RecipeSection, load_recipe


class SpecialistEntry(RecipeSection):
    """One specialist: see `ultrafuser.SpecialistSource`."""

    model: str = Field(description="model folder, hub id, or package://<package>/<path>")
    adapter: str | None = Field(
        default=None, description="PEFT LoRA folder on top of it; leave out for the model itself"
    )
    template: str = Field(
        default="tokenizer", description="built-in template name, 'tokenizer', or Jinja text"
    )
    model_revision: str | None = Field(default=None, description="hub revision of the model")
    adapter_revision: str | None = Field(default=None, description="hub revision of the adapter")

    def source(self) -> SpecialistSource:
        """The same as the source that `fuse` takes."""
        return SpecialistSource(**self.model_dump())


class GateSettings(RecipeSection):
    """The gate (paper, section 3.1)."""

    form: GateForm = Field(default="shared", description="shared (the paper's), per_specialist or joint")
    size: int = Field(default=512, ge=1, description="width of the hidden layer")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the hidden states' entries that the gate does not see in training; with little data 0.3 "
        "to 0.5 keeps it from learning its conversations by heart",
    )
    start: str | None = Field(
        default=None, description="fused checkpoint whose gate to start from, after adding a specialist"
    )


class LoraSettings(RecipeSection):
    """Low-rank adapters for fine-tuning."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, description="the update is scaled by alpha / rank")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="layers that get an adapter"
    )


class StageSettings(RecipeSection):
    """One stage of training: what every stage has in common."""

    steps: int = Field(ge=0, description="optimiser steps")
    examples_per_domain: int = Field(
        ge=1, description="examples of every domain in a batch, over all processes"
    )
    examples_per_pass: int | None = Field(
        default=None,
        ge=1,
        description="examples of every domain in one forward pass of one process; all of its share if unset",
    )
    learning_rate: float = Field(default=2e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.0, ge=0, description="of everything that is trained, biases too")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradients are clipped to this norm; 0 does not clip"
    )
    balanced: bool = Field(
        default=True, description="same number of every domain in a batch; false is the paper's ablation"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; a tenth of the stage if unset"
    )
    log_every: int = Field(default=10, ge=1, description="steps between log lines")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.examples_per_pass is not None and self.examples_per_domain % self.examples_per_pass:
            raise ValueError(
                f"examples_per_pass ({self.examples_per_pass}) must divide examples_per_domain "
                f"({self.examples_per_domain})"
            )
        if self.warmup_steps > self.steps > 0:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be at most steps ({self.steps})")
        return self


class Stage1(StageSettings):
    """Stage 1: the gate alone, specialists frozen."""

    steps: int = Field(default=400, ge=0)
    examples_per_domain: int = Field(default=64, ge=1)
    cache_states: bool | str = Field(
        default=False,
        description="run the specialists once and keep their hidden states on disk for the whole stage; a folder "
        "keeps them there, for every run over the same specialists and conversations",
    )


class TuningSettings(StageSettings):
    """A stage that trains specialists.

    Whatever `dtype` a recipe names, the weights that are trained are float32, and so are their gradients and
    AdamW's moments: steps of 2e-5 vanish in bfloat16. `mixed_precision` says in what the specialists compute.
    After the stage the weights are rounded to `dtype` (the adapter of `specialize` to bfloat16), as they are written.
    What is not trained (the base under an adapter) is held in `dtype` throughout.
    """

    mixed_precision: Literal["auto", "none", "bfloat16"] = Field(
        default="auto",
        description="bfloat16: the specialists and their heads multiply in bfloat16 (autocast); gate, loss and trained "
        "weights stay float32. none: in the type of the weights. auto: bfloat16 on CUDA devices that can, else none",
    )


class Stage2(TuningSettings):
    """Stage 2: gate and specialists together."""

    steps: int = Field(default=9000, ge=0)
    examples_per_domain: int = Field(default=32, ge=1)
    train: Literal["full", "lora"] = Field(
        default="full",
        description="full: every weight of whole specialists. lora: the adapters of an adapter bank, or new "
        "ones on whole specialists, merged at the end",
    )
    lora: LoraSettings | None = Field(
        default=None, description="new adapters on whole specialists; its defaults if unset"
    )
    gate_learning_rate: float | None = Field(
        default=None, gt=0, description="the gate's own rate; learning_rate if unset"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations: less memory, more time"
    )

    @model_validator(mode="after")
    def _has_adapters(self) -> Self:
        if self.lora is not None and self.train == "full":
            raise ValueError("lora has no say in train: full. Set train: lora, or leave lora out")
        return self


class _RunSettings(RecipeSection):
    data: dict[str, list[str]] = Field(
        min_length=1, description="domain -> files of conversations to train on"
    )
    data_rows: int | None = Field(
        default=None, ge=1, description="train on the first so many rows of every file"
    )
    heldout: dict[str, list[str]] = Field(default_factory=dict, description="domain -> files to measure on")
    heldout_rows: int | None = Field(
        default=None, ge=1, description="measure on the first so many rows of every file"
    )
    max_length: int = Field(default=1024, ge=8, description="tokens a specialist reads at most")
    too_long: Literal["truncate", "drop", "error"] = Field(
        default="truncate",
        description="longer conversations lose response tokens from their end (and are dropped when none is "
        "left), are dropped, or are refused",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="of the specialists' weights, as long as they are frozen and as they are written; see "
        "`TuningSettings` for those that are trained",
    )
    seed: int = Field(default=0, ge=0)

    @field_validator("data", "heldout", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {domain: [files] if isinstance(files, str) else files for domain, files in value.items()}
        return value

    @property
    def data_files(self) -> dict[str, list[Path]]:
        """Domain -> files to train on, package:// resolved."""
        return {domain: [resolve_file(file) for file in files] for domain, files in self.data.items()}

    @property
    def heldout_files(self) -> dict[str, list[Path]]:
        """Domain -> files to measure on, package:// resolved."""
        return {domain: [resolve_file(file) for file in files] for domain, files in self.heldout.items()}


class FusionRecipe(_RunSettings):
    """What `ultrafuser train` reads: specialists, gate, data, two stages."""

    specialists: dict[str, SpecialistEntry] = Field(min_length=1)
    bank: BankKind | Literal["auto"] = Field(
        default="auto", description="whole, adapters, or auto (see `fuse`)"
    )
    end_token: str | None = Field(
        default=None, description="token that ends every response; the tokenizers' own if unset"
    )
    gate: GateSettings = Field(default_factory=GateSettings)
    stage1: Stage1 = Field(default_factory=Stage1)
    stage2: Stage2 | None = Field(default_factory=Stage2, description="null leaves stage 2 out")


class SpecializeRecipe(_RunSettings):
    """What `ultrafuser specialize` reads: one base, one or several domains."""

    model: str = Field(description="the base: model folder, hub id, or package://<package>/<path>")
    model_revision: str | None = None
    adapter: str | None = Field(default=None, description="LoRA adapter to go on from; a fresh one if unset")
    template: str = Field(
        default="tokenizer", description="built-in template name, 'tokenizer', or Jinja text"
    )
    end_token: str | None = None
    train: Literal["lora", "full"] = "lora"
    lora: LoraSettings | None = Field(default=None, description="of a fresh adapter; its defaults if unset")
    start_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the start in the result: trained tensors (of an adapter: its low-rank factors) are "
        "averaged with those it went on from, as in WiSE-FT (arXiv 2109.01903)",
    )
    stage: TuningSettings
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _has_a_start(self) -> Self:
        if self.start_share > 0 and self.train == "lora" and self.adapter is None:
            raise ValueError("start_share needs an adapter to go on from: set adapter, or leave it out")
        if self.lora is not None and (self.train == "full" or self.adapter is not None):
            raise ValueError(
                "lora shapes a fresh adapter, but the recipe names one to go on from, or says train: full. "
                "Leave lora out"
            )
        return self


R = TypeVar("R", bound=_RunSettings)


def read_recipe(path: str | Path, kind: type[R]) -> R:
    """Read and check a recipe.

    Args:
        path: YAML file.
        kind: `FusionRecipe` or `SpecializeRecipe`.

    Returns:
        The recipe with relative paths resolved against its folder.

    Raises:
        RecipeError: the file cannot be read, or a key or value is wrong; the message names it.
    """
    return _resolved(load_recipe(path, kind), Path(path).parent)


def _resolved(recipe: R, folder: Path) -> R:
    """The recipe with relative paths made absolute; what is no path that exists is left alone."""

    def place(value: str, must_exist: bool) -> str:
        if value.startswith(PACKAGE_SCHEME):
            return value
        candidate = Path(value).expanduser()
        if candidate.is_absolute():
            return str(candidate)
        local = folder / candidate
        is_path = must_exist or value.startswith(("./", "../"))  # anything else may be a hub id
        return str(local.resolve()) if is_path or local.exists() else value

    settings = recipe.model_dump()
    for section in ("data", "heldout"):
        settings[section] = {
            domain: [place(file, True) for file in files] for domain, files in settings[section].items()
        }
    for entry in settings["specialists"].values() if "specialists" in settings else [settings]:
        for key in ("model", "adapter"):
            if entry.get(key) is not None:
                entry[key] = place(entry[key], False)
    if isinstance(settings.get("stage1", {}).get("cache_states"), str):
        settings["stage1"]["cache_states"] = place(settings["stage1"]["cache_states"], True)
    if settings.get("gate", {}).get("start") is not None:
        settings["gate"]["start"] = place(settings["gate"]["start"], False)
    return type(recipe).model_validate(settings)
