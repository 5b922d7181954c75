"""`ultrafuser train`: stage 1 and stage 2 of a recipe, and what they achieved on held-out data."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from ultrafuser.analysis.traces import Measurement
    from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe
    from ultrafuser.training.run import TrainedModel


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: specialists, gate, data, stages.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the fused model; new or empty.")],
    stage: Annotated[int | None, typer.Option(min=1, max=1, help="1: train the gate alone, leave stage 2 out.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that stopped in the folder.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance here.")] = None,
) -> None:
    """Train a gate over specialists (stage 1), then gate and specialists together (stage 2).

    After stage 1 the folder holds a gate-only checkpoint that names its specialists; after stage 2 a self-contained one.
    Where the recipe names held-out data, the loss of every specialist, of their uniform average and of the fused model
    is printed after each stage.
    """
    from ultrafuser.cli.report import provenance, write_metrics
    from ultrafuser.training.recipe import FusionRecipe, read_recipe
    from ultrafuser.training.run import train as run

    settings = read_recipe(recipe, FusionRecipe)
    console = Console()
    metrics: dict[str, float] = {}

    def report(name: str, trained: "TrainedModel") -> None:
        measured = measure_heldout(trained, settings)
        if measured is not None:
            show(console, measured, name.replace("stage", "stage "))
            metrics.update({f"{name}/{key}": value for key, value in measured.metrics().items()})
            metrics.update(measured.metrics())  # the plain names are those of the last stage

    with StateProgress() as progress:
        trained = run(
            settings, output, only_stage1=stage == 1, resume=resume, on_stage=report, on_progress=progress.update
        )
    metrics.update(stage_metrics(trained))
    if json_file is not None:
        write_metrics(json_file, metrics, provenance(seed=settings.seed, recipe=str(recipe)))
    console.print(f"The fused model is in {output}. Talk to it: ultrafuser chat {output}")


class StateProgress:
    """A bar for running the specialists over the data once; it shows when that begins."""

    def __init__(self) -> None:
        from rich.progress import Progress

        self._progress = Progress(transient=True)
        self._task: object = None

    def __enter__(self) -> "StateProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, done: int, total: int) -> None:
        """Move the bar to `done` of `total` conversations."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("running the specialists once", total=total)
        self._progress.update(self._progress.task_ids[0], completed=done)
        if done >= total:
            self._progress.stop()


def measure_heldout(trained: "TrainedModel", settings: "FusionRecipe | SpecializeRecipe") -> "Measurement | None":
    """Losses and gate weights on the recipe's held-out data; None when it names none.

    Args:
        trained: what a run gave.
        settings: its recipe.
    """
    from ultrafuser.analysis.measure import measure
    from ultrafuser.training.data import load_domain_conversations

    if not settings.heldout:
        return None
    rows = {d: c[: settings.heldout_rows] for d, c in load_domain_conversations(settings.heldout_files).items()}
    with StateProgress() as progress:
        return measure(
            trained.fused.model,
            trained.encoder,
            rows,
            too_long="error" if settings.too_long == "error" else "truncate",
            progress=progress.update,
        )


def show(console: Console, measured: "Measurement", title: str) -> None:
    """Print the loss table and the weight table."""
    from ultrafuser.analysis.traces import loss_table, weight_table

    console.rule(title)
    console.print(loss_table(measured))
    console.print(weight_table(measured))


def stage_metrics(trained: "TrainedModel") -> Mapping[str, float]:
    """Time of every stage, and what cached states cost and spare."""
    metrics: dict[str, float] = {}
    for name, result in trained.stages.items():
        metrics[f"seconds/{name}"] = result.seconds
        if result.losses:
            metrics[f"train_loss/{name}"] = result.losses[-1][1]
        if result.cache is not None:
            metrics[f"cache_s/{name}"] = result.cache.seconds
            metrics[f"cache_bytes/{name}"] = float(result.cache.num_bytes)
    return metrics
