"""`ultrafuser synth`: conversations of any number and field, made with any chat endpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ultrafuser.cli.opening import JsonOption
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import UltrafuserError

if TYPE_CHECKING:
    from ultrafuser.synthesis.estimate import Estimate
    from ultrafuser.synthesis.export import Summary


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="synth")(synth)


def synth(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe: endpoint, model, domains.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder for the run; one that stopped goes on."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and ask nothing.")
    ] = False,
    tokens_per_s: Annotated[
        float, typer.Option("--tokens-per-s", min=0.001, help="Of one answer; for --dry-run.")
    ] = 50.0,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0.0, help="Before an answer begins; for --dry-run.")
    ] = 0.5,
    figure: Annotated[
        bool, typer.Option("--figure/--no-figure", help="Draw how instructions lie apart.")
    ] = True,
    unsandboxed: Annotated[
        bool,
        typer.Option(
            "--unsandboxed",
            help="Run code of answers even without a sandbox: it may do all you may.",
        ),
    ] = False,
    ray: Annotated[
        int | None,
        typer.Option(
            "--ray",
            min=1,
            metavar="N",
            help="Ask from N processes of a Ray cluster, or of this machine; a kill costs more answers.",
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Make conversations as UltraChat 2 was made: topics, instructions, responses, checks.

    Every answer is kept in DIR/book.sqlite before it counts. End it at any moment, and run the same command again: it
    goes on, asks nothing twice that was answered, and ends with what it would have had. It ends with exit code 1 if a
    domain has fewer than half of the conversations that were wanted.

    Example: ultrafuser synth recipe.yaml -o ultrachat --dry-run
    """
    try:
        from ultrafuser.synthesis.embedding import Embedder
        from ultrafuser.synthesis.estimate import estimate
        from ultrafuser.synthesis.export import export, metrics
        from ultrafuser.synthesis.pipeline import Pipeline
        from ultrafuser.synthesis.recipe import read_synthesis_recipe
    except ImportError as error:
        raise UltrafuserError(
            f"synth needs the package {error.name!r}: pip install 'ultrafuser[synth]'."
        ) from error
    settings = read_synthesis_recipe(recipe)
    console = Console()
    if dry_run:
        expected = list(estimate(settings, tokens_per_s, wait_s))
        console.print(_estimate_table(expected))
        if json_file is not None:
            found = {f"{name}/{e.stage}/{e.domain}": value for e in expected
                     for name, value in (("calls", e.calls), ("input_tokens", e.input_tokens),
                                         ("output_tokens", e.output_tokens), ("seconds", e.seconds))}  # fmt: skip
            write_metrics(json_file, found, provenance(recipe=str(recipe), seed=settings.seed))
        return
    # Opened before anything is paid for, lest it cannot be afterwards.
    embedder = None if settings.embedding is None else Embedder(settings.embedding)
    pipeline = Pipeline(settings, output, unsandboxed=unsandboxed, num_askers=ray)
    try:
        pipeline.run()
        summaries = export(pipeline.tools, output, embedder=embedder, figure=figure)
        numbers = metrics(summaries, pipeline.tools.book.spent())
    finally:
        pipeline.close()
    console.print(_summary_table(summaries))
    console.print(
        f"{output}: README.md says more, review.html shows some of it.", markup=False, highlight=False
    )
    document = provenance(recipe=str(recipe), seed=settings.seed)
    write_metrics(output / "metrics.json", numbers, document)
    if json_file is not None:
        write_metrics(json_file, numbers, document)
    few = [name for name, one in summaries.items() if 2 * one.total < one.wanted]
    if few:
        console.print(
            f"There is less than half of what was wanted of {', '.join(few)}: README.md says what was removed and "
            "given up.", markup=False, highlight=False,
        )  # fmt: skip
        raise typer.Exit(1)


def _estimate_table(expected: Sequence["Estimate"]) -> Table:
    table = Table("stage", "domain", *(("calls", "tokens read", "tokens written", "cost", "time")))
    for column in table.columns[2:]:
        column.justify = "right"

    def row(stage: str, domain: str, parts: Sequence["Estimate"], *, end: bool) -> None:
        money = (
            None if any(part.money is None for part in parts) else sum(part.money or 0.0 for part in parts)
        )
        cells = [
            f"{sum(getattr(part, name) for part in parts):,.0f}"
            for name in ("calls", "input_tokens", "output_tokens")
        ]
        table.add_row(
            stage.replace("_", " "), domain, *cells, "" if money is None else f"{money:,.2f}",
            _duration(sum(part.seconds for part in parts)), end_section=end,
        )  # fmt: skip

    for one in expected:
        row(one.stage, one.domain, [one], end=one is expected[-1])
    row("all", "", expected, end=False)
    return table


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _summary_table(summaries: dict[str, "Summary"]) -> Table:
    table = Table("", *summaries)
    rows = {
        "meta-topics": [f"{one.meta_topics:,}" for one in summaries.values()],
        "sub-topics": [f"{one.sub_topics:,}" for one in summaries.values()],
        "conversations": [f"{one.total:,} of {one.wanted:,}" for one in summaries.values()],
        "held out": [f"{one.conversations['heldout']:,}" for one in summaries.values()],
        "mean words": [f"{one.words / max(one.total, 1):,.1f}" for one in summaries.values()],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
