"""`ultrafuser export`: a fused model in another form."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ultrafuser.cli.opening import DtypeOption, ModelArgument, open_model, status_line


class Form(StrEnum):
    """What `ultrafuser.modeling.export.export` can write."""

    SELF_CONTAINED = "self-contained"
    GATE_ONLY = "gate-only"
    WHOLE = "whole"
    SPECIALIST = "specialist"
    ADAPTER = "adapter"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="export")(export)


def export(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result; new or empty.")
    ],
    form: Annotated[Form, typer.Option("--form", help="What to write; see above.")] = Form.SELF_CONTAINED,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The specialist, for --form specialist and adapter.", show_default=False),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            help="A chat template for all specialists: a built-in name, tokenizer, or Jinja text.",
            show_default="each its own",
        ),
    ] = None,
    dtype: DtypeOption = None,
) -> None:
    """Write a fused model, or one of its specialists, in another form.

    self-contained: gate, specialists and tokenizer in one folder.

    gate-only: the gate (a megabyte or a few) and where the specialists come from.

    whole: self-contained, with adapters merged into whole specialists.

    specialist: one specialist as a plain Hugging Face model with its tokenizer and chat template.

    adapter: one specialist's adapter as a PEFT folder.
    """
    import torch

    from ultrafuser.modeling.export import export as write
    from ultrafuser.modeling.export import require_new_folder

    require_new_folder(output)
    fused = open_model(model, dtype, "cpu")
    with status_line(f"Writing {output}"):
        chosen = None if dtype is None else getattr(torch, dtype.value)
        write(fused, output, form.value, name, chosen, template)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    Console().print(f"Wrote {form.value} to {output} ({size / 1e6:,.1f} MB).", markup=False, highlight=False)
