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

    from ultrafuser.decoding.engine import FusedDecoder
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
SpeculateOption = Annotated[
    bool | None,
    typer.Option(
        "--speculate/--no-speculate",
        help="Draft several tokens at once where that is faster. Greedy responses stay the same; sampled ones keep "
        "their distribution, but a seed no longer decides them.",
        show_default="speculate, but not with a temperature",
    ),
]
DraftModelOption = Annotated[
    str | None,
    typer.Option(
        "--draft-model",
        metavar="MODEL",
        help="Let this plain model of the same vocabulary draft: a folder, a hub id or package://PACKAGE/PATH.",
        show_default="whatever is fastest here",
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


def whether_to_speculate(speculate: bool | None, draft_model: str | None, temperature: float) -> bool:
    """What a command's options say about drafts; a seed is to decide a sampled response unless they say otherwise.

    Args:
        speculate: `--speculate`, `--no-speculate` or neither.
        draft_model: `--draft-model`.
        temperature: of the responses.

    Raises:
        UltrafuserError: a draft model where nothing is to be drafted.
    """
    if draft_model is not None and speculate is False:
        raise UltrafuserError(
            "--draft-model drafts, and --no-speculate forbids drafts. Leave one of them out."
        )
    return draft_model is not None or (temperature == 0 if speculate is None else speculate)


def open_decoder(
    fused: "FusedModel", max_batch: int, speculate: bool, draft_model: str | None = None
) -> "FusedDecoder":
    """The decoding engine as a command's options ask for it.

    Args:
        fused: model and tokenizer.
        max_batch: conversations at the same time.
        speculate: draft several tokens at once where that is faster.
        draft_model: source of a plain model that drafts instead of the engine's own choice.

    Raises:
        UltrafuserError: a draft model that cannot be opened, or one of another vocabulary.
    """
    from ultrafuser.decoding.engine import FusedDecoder
    from ultrafuser.decoding.speculation import SpeculationParams
    from ultrafuser.modeling.sources import load_model, load_tokenizer
    from ultrafuser.modeling.templates import vocabulary_difference

    if draft_model is None:
        speculation = SpeculationParams() if speculate else None
        return FusedDecoder(*fused, max_batch=max_batch, speculation=speculation)
    with status_line(f"Opening {draft_model}"):
        tokenizer = load_tokenizer(draft_model)
        difference = None if tokenizer is None else vocabulary_difference(fused.tokenizer, tokenizer)
        if difference is not None:
            raise UltrafuserError(
                f"--draft-model {draft_model} has another vocabulary than the fused model: {difference} "
                "Give a model of the same family."
            )
        drafting = load_model(draft_model, dtype=fused.model.dtype).to(fused.model.device)
    return FusedDecoder(*fused, max_batch=max_batch, draft_model=drafting)


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
