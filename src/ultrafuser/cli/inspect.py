"""`ultrafuser inspect`: losses of each specialist, of their average and of the fused model; gate weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ultrafuser.cli.opening import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    open_model,
    status_line,
)
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import DataError
from ultrafuser.progress import ProgressBar

if TYPE_CHECKING:
    from ultrafuser.analysis.traces import Measurement
    from ultrafuser.modeling.assembly import FusedModel
    from ultrafuser.training.data import Messages


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="inspect")(inspect)


def inspect(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="DOMAIN=FILE",
            help="Conversations (.jsonl, .jsonl.gz) of a domain; once for every file.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Write figures and metrics into DIR.")
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(
            "--max-rows", min=1, help="Read the first rows of each domain only.", show_default="all"
        ),
    ] = None,
    keep: Annotated[
        int, typer.Option("--keep", min=1, help="Responses of each domain in the token view.")
    ] = 20,
    truncate: Annotated[
        bool,
        typer.Option(
            "--truncate", help="Cut responses that are too long for a specialist instead of refusing them."
        ),
    ] = False,
    batch_tokens: Annotated[
        int,
        typer.Option("--batch-tokens", min=1, help="Tokens that are read at once; less needs less memory."),
    ] = 4096,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Look inside a fused model with conversations of several domains.

    Prints the loss of each specialist, of their uniform average and of the fused model, and the mean gate
    weights. With -o also writes the paper's figures: weights.png (mean weights), samples.png (weights of
    samples), tokens.png and tokens.html (responses, each token coloured by its weights); and metrics.json.

    Example: ultrafuser inspect MODEL --data text=text.jsonl --data code=code.jsonl -o report
    """
    from ultrafuser.analysis.traces import loss_table, weight_table

    conversations = _read(data, max_rows)
    fused = open_model(model, dtype, device)
    measurement = measure_with_progress(
        fused, conversations, keep_traces=keep, truncate=truncate, batch_tokens=batch_tokens
    )
    console = Console()
    console.print(loss_table(measurement))
    console.print(weight_table(measurement))
    origin = provenance(model=model, data=data, max_rows=max_rows, dtype=str(fused.model.dtype))
    if output is not None:
        write_figures(measurement, output)
        write_metrics(output / "metrics.json", measurement.metrics(), origin)
        console.print(f"Figures are in {output}; begin with {output / 'tokens.html'}.", markup=False)
    if json_file is not None:
        write_metrics(json_file, measurement.metrics(), origin)


def measure_with_progress(
    fused: "FusedModel",
    conversations: "dict[str, list[Messages]]",
    *,
    keep_traces: int = 20,
    truncate: bool = False,
    batch_tokens: int = 4096,
) -> "Measurement":
    """Measure with a progress bar; see `ultrafuser.analysis.measure.measure`.

    Args:
        fused: model and tokenizer.
        conversations: domain -> conversations.
        keep_traces: responses of each domain that are kept token by token.
        truncate: cut responses that are too long instead of refusing them.
        batch_tokens: tokens read at once.
    """
    from ultrafuser.analysis.measure import measure

    encoder = fused.model.conversation_encoder(fused.tokenizer)
    with ProgressBar("Measuring response tokens") as bar:
        return measure(
            fused.model,
            encoder,
            conversations,
            keep_traces=keep_traces,
            too_long="truncate" if truncate else "error",
            batch_tokens=batch_tokens,
            progress=bar.update,
        )


def write_figures(measurement: "Measurement", folder: Path) -> None:
    """Write weights.png, samples.png, tokens.png and tokens.html.

    Args:
        measurement: with at least one trace.
        folder: where to; files of the same names are replaced.
    """
    from ultrafuser.analysis.figures import plot_mean_weights, plot_sample_weights, plot_token_view
    from ultrafuser.analysis.token_view import write_token_view

    with status_line("Drawing"):
        plot_mean_weights(measurement, folder / "weights.png")
        plot_sample_weights(measurement, folder / "samples.png")
        plot_token_view(measurement.traces, measurement.specialists, folder / "tokens.png")
        write_token_view(measurement, folder / "tokens.html")


def _read(data: list[str], max_rows: int | None) -> "dict[str, list[Messages]]":
    from ultrafuser.training.data import load_domain_conversations

    files: dict[str, list[str]] = {}
    for entry in data:
        domain, separator, path = entry.partition("=")
        if not (domain and separator and path):
            raise DataError(f"--data must be DOMAIN=FILE, such as text=held-out.jsonl, got {entry!r}.")
        files.setdefault(domain, []).append(path)
    return {domain: rows[:max_rows] for domain, rows in load_domain_conversations(files).items()}
