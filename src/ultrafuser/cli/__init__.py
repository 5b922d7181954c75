"""The command line: one module a command, each with a `register`; here they meet.

A command imports what it computes with when it runs: asking for help loads no more than the package does.
"""

import importlib
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ultrafuser.errors import UltrafuserError

_COMMANDS = ("demo", "specialize", "train", "generate", "chat", "serve", "inspect", "export", "synth")


class _Group(TyperGroup):
    """Prints an error that is the user's to mend on one line, and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UltrafuserError as error:
            message = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True).print("ultrafuser:", message, markup=False, highlight=False)
            raise typer.Exit(2) from error


app = typer.Typer(
    name="ultrafuser",
    help="Fuse specialised language models token by token with a small trained gate.",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in _COMMANDS:
    importlib.import_module(f"{__name__}.{_command}").register(app)


def main() -> None:
    """Run the command line."""
    app()
