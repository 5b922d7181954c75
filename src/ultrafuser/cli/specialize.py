"""`ultrafuser specialize`: fine-tune one base into a specialist."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table

from ultrafuser.cli.opening import JsonOption, status_line
from ultrafuser.cli.train import (
    HeldOut,
    ResumeOption,
    show_data,
    stage_metrics,
    training_console,
    write_results,
)

if TYPE_CHECKING:
    from ultrafuser.analysis.traces import Measurement
    from ultrafuser.training.run import TrainedModel


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="specialize")(specialize)


def specialize(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: base, data, settings.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the specialist; new or empty.")
    ],
    resume: ResumeOption = False,
    json_file: JsonOption = None,
) -> None:
    """Fine-tune one base on one domain or on all, with LoRA or in full.

    The result lies in DIR/adapter (a PEFT folder) or DIR/model (a model folder). Where the recipe names
    held-out data, the loss per domain before and after the training is printed. Metrics are also written to
    DIR/metrics.json.

    Example: ultrafuser specialize recipe.yaml -o code
    """
    from ultrafuser.analysis.traces import FUSED
    from ultrafuser.training.recipe import SpecializeRecipe, read_recipe
    from ultrafuser.training.run import specialize as run

    settings = read_recipe(recipe, SpecializeRecipe)
    heldout = HeldOut(settings)
    console = training_console()
    measured: dict[str, Measurement | None] = {}
    opening = ExitStack()

    def start(trained: "TrainedModel") -> None:
        opening.close()
        show_data(console, trained)
        heldout.check(trained, console)
        measured["before"] = heldout.measure(trained)

    with opening:
        opening.enter_context(status_line("Opening the base"))
        trained = run(settings, output, resume=resume, on_start=start)
    measured["specialist"] = heldout.measure(trained)
    losses = {row: found.losses[FUSED] for row, found in measured.items() if found is not None}
    if losses:
        console.print(_table(losses))
    metrics = {
        f"loss/{row}/{domain}": loss for row, cells in losses.items() for domain, loss in cells.items()
    }
    write_results(output, json_file, {**metrics, **stage_metrics(trained)}, settings, recipe)
    finished = output / ("adapter" if settings.train == "lora" else "model")
    console.print(f"The specialist is in {finished}.", soft_wrap=True, markup=False)


def _table(losses: dict[str, dict[str, float]]) -> Table:
    table = Table(title="Loss (nats per response token)", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("")
    for domain in losses["specialist"]:
        table.add_column(domain, justify="right")
    for row, cells in losses.items():
        table.add_row(row, *(f"{loss:.3f}" for loss in cells.values()))
    return table
