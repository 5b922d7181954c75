"""Options that the commands share, and opening the fused model that they name."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ultrafuser.errors import CheckpointError, UltrafuserError

if TYPE_CHECKING:
    import torch

    from ultrafuser.modeling.assembly import FusedModel


class Dtype(StrEnum):
    """Floating types that weights can be held in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Fused model: a folder or a hub id.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option("--dtype", help="Hold the specialists' weights in this type.", show_default="as stored"),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device", help="Run here: cpu, cuda, cuda:1, ...", show_default="a GPU where there is one"
    ),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write metrics and provenance to FILE.")
]


def open_model(model: str, dtype: Dtype | None, device: str | None) -> "FusedModel":
    """Open a fused model for a command, with a spinner while it takes.

    Args:
        model: folder or hub id.
        dtype: of the specialists' weights; as stored when None.
        device: where to put it; an accelerator where there is one when None.

    Raises:
        UltrafuserError: it cannot be opened, or there is no such device.
    """
    with status_line(f"Opening {model}"):
        import torch
        from huggingface_hub.errors import HFValidationError
        from transformers.utils import logging

        from ultrafuser.modeling.assembly import FusedModel
        from ultrafuser.modeling.checkpoint import open_fused

        logging.disable_progress_bar()
        target = _device(device)
        try:
            fused = open_fused(model, None if dtype is None else getattr(torch, dtype.value))
        except (OSError, HFValidationError) as error:  # the hub's client: no such model, no network
            raise CheckpointError(
                f"{model}: there is no such folder, and it cannot be fetched from the hub "
                f"({str(error).splitlines()[0]})"
            ) from error
        return FusedModel(fused.model.to(target), fused.tokenizer)


@contextmanager
def status_line(text: str) -> Iterator[None]:
    """A spinner with a text, on the terminal only and on stderr, while the block runs."""
    with Console(stderr=True).status(text):
        yield


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UltrafuserError(
            f"--device {name}: there is no such device here. Leave it out, or name cpu."
        ) from error
    return device
