"""`ultrafuser train`: stage 1 and stage 2 of a recipe, and what they achieved on held-out data."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ultrafuser.cli.opening import JsonOption, status_line
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.progress import ProgressBar

if TYPE_CHECKING:
    from ultrafuser.analysis.traces import Measurement
    from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe
    from ultrafuser.training.run import TrainedModel
    from ultrafuser.training.stages import EncodedData

ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on with the run that stopped in the output folder.")
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: specialists, gate, data, stages.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the fused model; new or empty.")
    ],
    stage: Annotated[
        int | None,
        typer.Option("--stage", min=1, max=1, help="1: train the gate alone.", show_default="both stages"),
    ] = None,
    resume: ResumeOption = False,
    json_file: JsonOption = None,
) -> None:
    """Train a gate over specialists (stage 1), then gate and specialists together (stage 2).

    After stage 1 alone, DIR holds a gate-only checkpoint that names its specialists; after stage 2 a
    self-contained one. Where the recipe names held-out data, the loss of every specialist, of their uniform
    average and of the fused model is printed after each stage. Metrics are also written to DIR/metrics.json.

    Several processes (torchrun) share the work of a step; but for dropout, the result is the same.

    Example: ultrafuser train recipe.yaml -o fused
    """
    from ultrafuser.training.recipe import FusionRecipe, read_recipe
    from ultrafuser.training.run import train as run

    settings = read_recipe(recipe, FusionRecipe)
    heldout = HeldOut(settings)
    console = training_console()
    metrics: dict[str, float] = {}
    opening = ExitStack()

    def start(trained: "TrainedModel") -> None:
        opening.close()
        show_data(console, trained)
        heldout.check(trained, console)

    def report(name: str, trained: "TrainedModel") -> None:
        if name == "stage1":
            show_cache(console, trained)
        measured = heldout.measure(trained)
        if measured is not None:
            show(console, measured, name.replace("stage", "stage "))
            metrics.update({f"{name}/{key}": value for key, value in measured.metrics().items()})
            metrics.update(measured.metrics())  # the plain names are those of the last stage

    with opening:
        opening.enter_context(status_line("Opening the specialists"))
        trained = run(
            settings,
            output,
            only_stage1=stage == 1,
            resume=resume,
            on_start=start,
            on_stage=report,
        )
    metrics.update(stage_metrics(trained))
    write_results(output, json_file, metrics, settings, recipe)
    console.print(
        f"The fused model is in {output}. Talk to it: ultrafuser chat {output}", soft_wrap=True, markup=False
    )


class HeldOut:
    """The held-out data of a recipe: read before anything is trained, measured afterwards.

    Args:
        settings: the recipe.

    Raises:
        DataError: a file is malformed.
    """

    def __init__(self, settings: "FusionRecipe | SpecializeRecipe") -> None:
        from ultrafuser.training.data import load_domain_conversations

        files = settings.heldout_files
        self._rows = load_domain_conversations(files, settings.heldout_rows, "heldout")
        self._too_long = settings.too_long

    def check(self, trained: "TrainedModel", console: Console) -> None:
        """Treat long conversations as the recipe treats long ones of the training data, and say so.

        Args:
            trained: what is going to be trained.
            console: where to print what was cut or left out.

        Raises:
            TemplateError: a conversation cannot be read, or is too long and the recipe refuses that.
            DataError: nothing is left of a domain.
        """
        from ultrafuser.training.stages import encode_data

        data = encode_data(trained.encoder, self._rows, self._too_long, "heldout")
        self._rows = {
            domain: [rows[place] for place in data.kept[domain]] for domain, rows in self._rows.items()
        }
        for domain in data.domain_sizes:
            if domain in data.truncated or domain in data.dropped:
                _show_domain(console, "held-out ", domain, data)

    def measure(self, trained: "TrainedModel") -> "Measurement | None":
        """Losses and gate weights; None when the recipe names no held-out data.

        Args:
            trained: what a run gave.
        """
        from ultrafuser.analysis.measure import measure
        from ultrafuser.training.run import is_main_process

        if not self._rows:
            return None
        with ProgressBar("Measuring response tokens", quiet=not is_main_process()) as bar:
            return measure(
                trained.fused.model, trained.encoder, self._rows, too_long="truncate", progress=bar.update
            )


def training_console() -> Console:
    """Where a training reports: the main process only; the libraries' own bars and hints are turned off."""
    from transformers.utils import logging

    from ultrafuser.training.run import is_main_process

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Console(quiet=not is_main_process())


def show_data(console: Console, trained: "TrainedModel") -> None:
    """Print what is trained on, a line per domain, and what had to be cut or left out."""
    for domain in trained.data.domain_sizes:
        _show_domain(console, "", domain, trained.data)


def _show_domain(console: Console, prefix: str, domain: str, data: "EncodedData") -> None:
    cut, dropped = data.truncated.get(domain, 0), data.dropped.get(domain, 0)
    notes = [f"{cut:,} of them cut to max_length"] if cut else []
    notes += [f"{dropped:,} more left out as too long"] if dropped else []
    counted = f"{prefix}{domain}: {data.domain_sizes[domain]:,} conversations"
    console.print(counted, *notes, sep=", ", markup=False, highlight=False)


def show(console: Console, measured: "Measurement", title: str) -> None:
    """Print the loss table and the weight table."""
    from ultrafuser.analysis.traces import loss_table, weight_table

    console.rule(title)
    console.print(loss_table(measured))
    console.print(weight_table(measured))


def show_cache(console: Console, trained: "TrainedModel") -> None:
    """Print what cached states cost, where they were used."""
    for result in trained.stages.values():
        if result.cache is not None:
            size = result.cache.num_bytes / 2**20
            made = f"made in {result.cache.seconds:.0f} s" if result.cache.seconds else "found"
            console.print(f"Cached states: {size:.1f} MiB, {made}.")


def stage_metrics(trained: "TrainedModel") -> Mapping[str, float]:
    """Time and last loss of every stage, and what cached states cost."""
    metrics: dict[str, float] = {}
    for name, result in trained.stages.items():
        metrics[f"seconds/{name}"] = result.seconds
        if result.losses:
            metrics[f"train_loss/{name}"] = result.losses[-1][1]
        if result.cache is not None:
            metrics[f"cache_s/{name}"] = result.cache.seconds
            metrics[f"cache_bytes/{name}"] = float(result.cache.num_bytes)
    return metrics


def write_results(
    folder: Path,
    json_file: Path | None,
    metrics: Mapping[str, float],
    settings: "FusionRecipe | SpecializeRecipe",
    recipe: Path,
) -> None:
    """Write metrics, versions and seed beside the result, and to `--json`.

    Args:
        folder: of the result.
        json_file: what `--json` names.
        metrics: name -> number.
        settings: the recipe.
        recipe: its file.
    """
    from ultrafuser.training.run import is_main_process

    if is_main_process():
        origin = provenance(seed=settings.seed, recipe=str(recipe))
        for path in (folder / "metrics.json", json_file):
            if path is not None:
                write_metrics(path, metrics, origin)
