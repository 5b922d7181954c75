"""What `inspect` measures, token by token and summed up: from the measuring to tables, figures and JSON."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text

from ultrafuser.analysis.palette import specialist_colours
from ultrafuser.errors import ShapeError, UltrafuserError

UNIFORM = "uniform"
FUSED = "fused"


def loss_rows(specialists: Sequence[str]) -> tuple[str, ...]:
    """The rows of every loss table: each specialist, the uniform average of logits, the fused model.

    Raises:
        UltrafuserError: if a specialist is named like one of the other rows, or two share a name.
    """
    rows = (*specialists, UNIFORM, FUSED)
    if len(set(rows)) != len(rows):
        raise UltrafuserError(
            f"Specialists need names that differ from each other and from '{UNIFORM}' and '{FUSED}', "
            f"got {list(specialists)}. Rename one."
        )
    return rows


@dataclass(frozen=True, slots=True, eq=False)
class TokenTrace:
    """One response and what the gate and every row made of each of its tokens.

    Attributes:
        domain: name of the data domain the sample came from.
        prompt: what the response answers, as people read it (no template).
        tokens: R texts, one for each response token; they may hold newlines, leading spaces and, for a part
            of a UTF-8 character, U+FFFD.
        gate_weights: float32, (R, N); the weights with which each token was predicted, summing to 1 over N.
        losses: row name (see `loss_rows`) -> float32, (R,); negative log-likelihood of each token in nats.

    Raises:
        ShapeError: if there is no token, or an array does not fit the tokens.
        UltrafuserError: if a weight or a loss is not finite, or weights do not sum to 1.
    """

    domain: str
    prompt: str
    tokens: tuple[str, ...]
    gate_weights: NDArray[np.float32]
    losses: dict[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        num_tokens = len(self.tokens)
        if num_tokens == 0:
            raise ShapeError(
                f"A trace of domain '{self.domain}' must hold at least 1 response token, got 0. "
                "Leave out samples with an empty response."
            )
        if self.gate_weights.ndim != 2 or len(self.gate_weights) != num_tokens:
            raise ShapeError(
                f"gate_weights must be ({num_tokens}, N), one row a token, got {self.gate_weights.shape}."
            )
        for row, losses in self.losses.items():
            if losses.shape != (num_tokens,):
                raise ShapeError(
                    f"losses['{row}'] must be ({num_tokens},), one for each token, got {losses.shape}."
                )
            if not np.isfinite(losses).all():
                position = int(np.flatnonzero(~np.isfinite(losses))[0])
                raise UltrafuserError(
                    f"losses['{row}'] must be finite, got {losses[position]} at token {position} of a "
                    f"'{self.domain}' sample. Check that model for overflow, or load it in float32."
                )
        sums = self.gate_weights.sum(axis=1, dtype=np.float64)
        if not np.allclose(sums, 1.0, atol=1e-2):  # also refuses NaN; bfloat16 weights are off by less
            worst = int(np.nanargmax(np.where(np.isfinite(sums), np.abs(sums - 1), np.inf)))
            raise UltrafuserError(
                f"gate_weights must sum to 1 over the specialists, got {sums[worst]:.4g} at token {worst} "
                f"of a '{self.domain}' sample. Pass weights (after the softmax), not scores."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """Losses and gate weights of a fused model over samples of several domains.

    Attributes:
        specialists: N names, in the order of the gate weights.
        domains: names of the data domains, in the order of the tables.
        losses: row -> domain -> nats per response token.
        weights: domain -> specialist -> gate weight, mean over response tokens.
        sample_weights: domain -> float64, (S, N); mean over the tokens of each of the domain's S responses.
        traces: single responses to look into; may be fewer than were measured
            (`dataclasses.replace(measurement, traces=...)` keeps the sums and drops the rest).
        num_tokens: domain -> number of response tokens measured.
    """

    specialists: tuple[str, ...]
    domains: tuple[str, ...]
    losses: dict[str, dict[str, float]]
    weights: dict[str, dict[str, float]]
    sample_weights: dict[str, NDArray[np.float64]]
    traces: tuple[TokenTrace, ...]
    num_tokens: dict[str, int]

    @classmethod
    def from_traces(cls, specialists: Sequence[str], traces: Sequence[TokenTrace]) -> "Measurement":
        """Sum up traces; every token of a domain counts the same, whichever sample it is in.

        Args:
            specialists: N names, in the order of the gate weights.
            traces: at least one, each with N weights a token and a loss for every row. Domains keep the order
                in which they first appear.

        Raises:
            UltrafuserError: if there are no traces, or names clash or are missing.
            ShapeError: if a trace has another number of specialists.
        """
        rows = loss_rows(specialists)
        if not traces:
            raise UltrafuserError(
                "A measurement needs at least 1 trace, got 0. Give data files with responses."
            )
        by_domain: dict[str, list[TokenTrace]] = {}
        for trace in traces:
            _check_fits(trace, specialists, rows)
            by_domain.setdefault(trace.domain, []).append(trace)

        def mean_loss(row: str, group: list[TokenTrace]) -> float:
            return float(np.concatenate([trace.losses[row] for trace in group]).mean(dtype=np.float64))

        def mean_weights(group: list[TokenTrace]) -> dict[str, float]:
            means = np.concatenate([trace.gate_weights for trace in group]).mean(axis=0, dtype=np.float64)
            return dict(zip(specialists, means.tolist(), strict=True))

        return cls(
            specialists=tuple(specialists),
            domains=tuple(by_domain),
            losses={
                row: {domain: mean_loss(row, group) for domain, group in by_domain.items()} for row in rows
            },
            weights={domain: mean_weights(group) for domain, group in by_domain.items()},
            sample_weights={
                domain: np.stack([trace.gate_weights.mean(axis=0, dtype=np.float64) for trace in group])
                for domain, group in by_domain.items()
            },
            traces=tuple(traces),
            num_tokens={
                domain: sum(len(trace.tokens) for trace in group) for domain, group in by_domain.items()
            },
        )

    def metrics(self) -> dict[str, float]:
        """Numbers for `--json`: `loss/<row>/<domain>` (nats a token) and `weight/<domain>/<specialist>`."""
        losses = {
            f"loss/{row}/{domain}": v for row, cells in self.losses.items() for domain, v in cells.items()
        }
        weights = {
            f"weight/{domain}/{name}": v
            for domain, cells in self.weights.items()
            for name, v in cells.items()
        }
        return losses | weights


def loss_table(measurement: Measurement) -> Table:
    """Losses as a terminal table: rows as in `loss_rows`, a column for each domain, and their mean.

    The mean weighs every domain the same. What reads as the lowest number of a column is bold green.
    """
    table = _plain_table("Loss (nats per response token)")
    table.add_column("model", no_wrap=True)
    for heading in (*measurement.domains, "mean"):
        table.add_column(Text(heading), justify="right", overflow="fold", min_width=5)
    cells: dict[str, list[str]] = {}
    for row in loss_rows(measurement.specialists):
        values = [measurement.losses[row][domain] for domain in measurement.domains]
        cells[row] = [f"{value:.3f}" for value in (*values, float(np.mean(values)))]
    best = [min(column, key=float) for column in zip(*cells.values(), strict=True)]
    for row, numbers in cells.items():
        if row == FUSED:
            table.add_section()
        base = "cyan" if row == FUSED else ""
        styled = [
            Text(number, style="bold green" if number == lowest else base)
            for number, lowest in zip(numbers, best, strict=True)
        ]
        table.add_row(Text(row, style="bold cyan" if row == FUSED else base), *styled)
    return table


def weight_table(measurement: Measurement) -> Table:
    """Mean gate weights as a terminal table: a row for each data domain, a column for each specialist.

    The largest weight of a row is bold. The last column counts the response tokens that the means, here and
    in `loss_table`, were taken over.
    """
    table = _plain_table("Mean gate weight")
    table.add_column("data", no_wrap=True)
    for name, colour in zip(
        measurement.specialists, specialist_colours(len(measurement.specialists)), strict=True
    ):
        table.add_column(Text.assemble(("■ ", colour), name), justify="right", overflow="fold", min_width=5)
    table.add_column("tokens", justify="right", no_wrap=True, min_width=6)
    for domain in measurement.domains:
        weights = [measurement.weights[domain][name] for name in measurement.specialists]
        cells = [Text(f"{weight:.3f}", style="bold" if weight == max(weights) else "") for weight in weights]
        table.add_row(Text(domain), *cells, f"{measurement.num_tokens[domain]:,}")
    return table


def _plain_table(title: str) -> Table:
    """A table without walls, narrow enough for nine specialists on 80 columns."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _check_fits(trace: TokenTrace, specialists: Sequence[str], rows: Sequence[str]) -> None:
    """Raise unless the trace has a weight for every specialist and a loss for every row."""
    if trace.gate_weights.shape[1] != len(specialists):
        raise ShapeError(
            f"gate_weights must be (R, {len(specialists)}), a column for each of {list(specialists)}, "
            f"got {trace.gate_weights.shape}."
        )
    missing = [row for row in rows if row not in trace.losses]
    if missing:
        raise UltrafuserError(
            f"A trace needs losses for the rows {list(rows)}, got none for {missing}. "
            "Measure every specialist, the uniform average and the fused model."
        )
