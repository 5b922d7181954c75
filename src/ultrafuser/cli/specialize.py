"""`ultrafuser specialize`: fine-tune one base into a specialist."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="specialize")(specialize)


def specialize(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: base, data, settings.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the specialist; new or empty.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that stopped in the folder.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance here.")] = None,
) -> None:
    """Fine-tune one base on one domain or on all, with LoRA or in full.

    The result lies in OUTPUT/adapter (a PEFT folder) or OUTPUT/model (a model folder). Where the recipe names held-out
    data, the loss of the base before and of the specialist after the training are printed per domain.
    """
    from ultrafuser.cli.report import provenance, write_metrics
    from ultrafuser.cli.train import measure_heldout
    from ultrafuser.training.recipe import SpecializeRecipe, read_recipe
    from ultrafuser.training.run import specialize as run

    settings = read_recipe(recipe, SpecializeRecipe)
    trained = run(settings, output, resume=resume)
    console = Console()
    metrics = {f"seconds/{name}": stage.seconds for name, stage in trained.stages.items()}
    measured = measure_heldout(trained, settings)
    if measured is not None:
        for domain, loss in measured.losses["fused"].items():
            metrics[f"loss/specialist/{domain}"] = loss
            console.print(f"held-out loss, {domain}: {loss:.4f} nats per response token")
    if json_file is not None:
        write_metrics(json_file, metrics, provenance(seed=settings.seed, recipe=str(recipe)))
    console.print(f"written to {output}")
