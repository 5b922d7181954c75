"""Figures of a measurement: mean gate weights, weights of single samples, and text tinted by its specialists.

Everything is drawn on plain `Figure` objects, so no display and no global plotting state is needed. The
format follows the suffix of the path (png, pdf, svg).
"""

import os
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.cells import cell_len
from rich.text import Text

from ultrafuser.analysis.palette import specialist_colours, tint
from ultrafuser.analysis.traces import Measurement, TokenTrace
from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_WEIGHT_COLOURS = "Blues"
_MAX_SAMPLES = 100
_DPI = 150

# The token view stands on a grid of character cells, sized for DejaVu Sans Mono (which comes with
# matplotlib).
_FONT_SIZE = 9.0
_CELL_WIDTH = 0.602 * _FONT_SIZE
_LINE_HEIGHT = 1.6 * _FONT_SIZE
_MARGIN_CELLS, _MARGIN_LINES = 2, 1
_WIDE_FONTS = ("Noto Sans Mono CJK SC", "Noto Sans CJK SC", "Noto Sans CJK JP", "Hiragino Sans", "MS Gothic")


def plot_mean_weights(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Draw the annotated matrix of mean gate weights: rows are data domains, columns are specialists.

    Args:
        measurement: what was measured.
        path: file to write; the suffix gives the format.
    """
    names, domains = measurement.specialists, measurement.domains
    matrix = np.array([[measurement.weights[domain][name] for name in names] for domain in domains])
    figure = _constrained_figure(2.4 + 0.9 * len(names), 1.5 + 0.7 * len(domains))
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap=_WEIGHT_COLOURS, vmin=0.0, vmax=_top_weight(matrix), aspect="auto")
    for (row, column), weight in np.ndenumerate(matrix):
        dark = weight > 0.6 * _top_weight(matrix)
        axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color="white" if dark else "black")
    _name_ticks(axes, columns=names, rows=domains)
    axes.set_xlabel("specialist")
    axes.set_ylabel("data")
    axes.set_title("Mean gate weight", loc="left")
    _weight_scale(figure, image, [axes], len(names))
    _save(figure, path)


def plot_sample_weights(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Draw a heat map of the mean gate weights of single samples, one panel a domain.

    Rows are specialists. Columns are the first 100 samples at most, sorted by the weight of the specialist
    that dominates the domain, highest first.

    Args:
        measurement: what was measured.
        path: file to write; the suffix gives the format.
    """
    names, domains = measurement.specialists, measurement.domains
    samples = {domain: measurement.sample_weights[domain][:_MAX_SAMPLES] for domain in domains}
    top = max(_top_weight(weights) for weights in samples.values())
    figure = _constrained_figure(8.0, 0.6 + len(domains) * (0.85 + 0.26 * len(names)))
    panels = figure.subplots(len(domains), 1, squeeze=False)[:, 0].tolist()
    for axes, (domain, weights) in zip(panels, samples.items(), strict=True):
        dominant = int(weights.mean(axis=0).argmax())
        ordered = weights[np.argsort(-weights[:, dominant], kind="stable")]
        image = axes.imshow(
            ordered.T, cmap=_WEIGHT_COLOURS, vmin=0.0, vmax=top, aspect="auto", interpolation="nearest"
        )
        _name_ticks(axes, columns=(), rows=names)
        plural = "s" if len(weights) != 1 else ""
        title = f"{domain} data · {len(weights)} sample{plural}, sorted by the weight of {names[dominant]}"
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    _weight_scale(figure, image, panels, len(names))
    _save(figure, path)


def plot_token_view(
    traces: Sequence[TokenTrace],
    specialists: Sequence[str],
    path: str | os.PathLike[str],
    *,
    width: int = 96,
    max_traces: int = 6,
    max_lines: int = 30,
) -> None:
    """Draw responses as text, each token on its mix of the colours and underlined in that of the strongest.

    Args:
        traces: responses to draw. Of more than `max_traces` the first of each domain are taken, then the
            second, and so on. The title of each is its domain and the first line of its prompt.
        specialists: N names, in the order of the gate weights.
        path: file to write; the suffix gives the format.
        width: characters a line; longer lines wrap.
        max_traces: responses drawn at most.
        max_lines: lines drawn of each response at most; what is left out is counted below it.

    Raises:
        UltrafuserError: if there are no traces.
    """
    from matplotlib.figure import Figure

    if not traces:
        raise UltrafuserError(
            "A token view needs at least 1 trace, got 0. Keep some traces in the measurement."
        )
    colours = specialist_colours(len(specialists))
    sheet = _Sheet(width)
    sheet.legend(specialists, colours)
    for trace in _spread(traces, max_traces):
        sheet.response(trace, colours, max_lines)
    num_lines = sheet.line + 2 * _MARGIN_LINES
    size = ((width + 2 * _MARGIN_CELLS) * _CELL_WIDTH / 72, num_lines * _LINE_HEIGHT / 72)
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN_CELLS, width + _MARGIN_CELLS)
    axes.set_ylim(num_lines - _MARGIN_LINES, -_MARGIN_LINES)
    sheet.draw(axes)
    _save(figure, path)


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text of one token on one line: `column` and `line` are grid cells."""

    line: int
    column: int
    text: str
    token: int


@dataclass(frozen=True, slots=True)
class _Box:
    """A filled rectangle on the grid."""

    line: float
    column: float
    width: float
    height: float
    colour: str
    opacity: float = 1.0


class _Sheet:
    """Text and boxes on a grid of character cells, collected from the top down and drawn at the end."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.line = 0
        self._boxes: list[_Box] = []
        self._words: list[tuple[int, float, str, dict[str, Any]]] = []

    def legend(self, specialists: Sequence[str], colours: Sequence[str]) -> None:
        column = 0
        for name, colour in zip(specialists, colours, strict=True):
            name = _shortened(name, self.width - 3)
            if column and column + 3 + cell_len(name) > self.width:
                self.line, column = self.line + 1, 0
            self._boxes.append(_Box(self.line + 0.2, column, 2, 0.6, colour))
            self._words.append((self.line, column + 3, name, {}))
            column += 3 + cell_len(name) + 3
        self.line += 1

    def response(self, trace: TokenTrace, colours: Sequence[str], max_lines: int) -> None:
        domain = _shortened(trace.domain, self.width // 3)
        title = _shortened(_first_line(trace.prompt), self.width - cell_len(domain) - 4)
        self.line += 1
        self._boxes.append(_Box(self.line + 0.05, 0, cell_len(domain) + 2, 0.9, "#e4e4e7"))
        self._words.append((self.line, 1, domain, {}))
        self._words.append((self.line, cell_len(domain) + 4, title, {"weight": "bold"}))
        top = self.line + 1
        pieces = lay_out(trace.tokens, self.width)
        shown = [piece for piece in pieces if piece.line < max_lines]
        for piece in shown:
            self._token(piece, top, trace.gate_weights[piece.token], colours)
        self.line = top + shown[-1].line + 1
        left_out = len(trace.tokens) - 1 - shown[-1].token
        if left_out:
            self._words.append(
                (self.line, 0, f"… {left_out} more token{'s' if left_out > 1 else ''}", {"color": "#71717a"})
            )
            self.line += 1

    def _token(self, piece: Piece, top: int, weights: np.ndarray, colours: Sequence[str]) -> None:
        line, cells = top + piece.line, cell_len(piece.text)
        mix, opacity = tint(colours, weights.tolist())
        # A hair of white between tokens shows where one ends.
        self._boxes.append(_Box(line + 0.06, piece.column + 0.06, cells - 0.12, 0.88, mix, opacity))
        strongest = colours[int(weights.argmax())]
        self._boxes.append(_Box(line + 0.86, piece.column + 0.06, cells - 0.12, 0.08, strongest))
        self._words.append((line, piece.column, piece.text, {}))

    def draw(self, axes: "Axes") -> None:
        from matplotlib.font_manager import get_font_names
        from matplotlib.patches import Rectangle

        installed = set(get_font_names())
        family = ["DejaVu Sans Mono", *(font for font in _WIDE_FONTS if font in installed)]
        for box in self._boxes:
            corner = (box.column, box.line)
            axes.add_patch(
                Rectangle(corner, box.width, box.height, facecolor=box.colour, alpha=box.opacity, linewidth=0)
            )
        for line, column, text, style in self._words:
            # A dollar sign in a response is a dollar sign, never the start of a formula.
            axes.text(
                column,
                line + 0.7,
                text,
                family=family,
                fontsize=_FONT_SIZE,
                va="baseline",
                parse_math=False,
                **style,
            )


def lay_out(tokens: Sequence[str], width: int) -> list[Piece]:
    """Place the texts of tokens on lines of `width` character cells, breaking between words where possible.

    A newline shows as a return sign at the end of its line, and an empty text as an empty-set sign, so that
    every token has a place. Wide characters take two cells. Spaces beyond the end of a line are dropped.
    """
    characters = [(character, index) for index, token in enumerate(tokens) for character in _visible(token)]
    pieces: list[Piece] = []
    line = column = position = 0
    for run in re.findall(r"\n|[^\S\n]+|\S+", "".join(character for character, _ in characters)):
        if not run.isspace() and column > 0 and column + cell_len(run) > width:
            line, column = line + 1, 0
        for character, index in characters[position : position + len(run)]:
            if character == "\n":
                line, column = line + 1, 0
                continue
            cells = cell_len(character)
            if column + cells > width:
                if character == " ":
                    continue
                line, column = line + 1, 0
            last = pieces[-1] if pieces else None
            if last is not None and (last.line, last.token) == (line, index):
                pieces[-1] = Piece(line, last.column, last.text + character, index)
            else:
                pieces.append(Piece(line, column, character, index))
            column += cells
        position += len(run)
    return pieces


def _visible(token: str) -> str:
    """The token as drawn: tabs as spaces, newlines and nothing as signs, other control codes as U+FFFD."""
    if token == "":
        return "∅"
    drawn = token.replace("\r\n", "\n").expandtabs(4).replace("\n", "↵\n")
    return "".join(
        character if character == "\n" or unicodedata.category(character) not in ("Cc", "Cs") else "\ufffd"
        for character in drawn
    )


def _spread(traces: Sequence[TokenTrace], limit: int) -> list[TokenTrace]:
    """At most `limit` traces, taken in turn from every domain, listed domain by domain."""
    seen: Counter[str] = Counter()
    turns = []
    for trace in traces:
        turns.append((seen[trace.domain], trace))
        seen[trace.domain] += 1
    chosen = [trace for _, trace in sorted(turns, key=lambda turn: turn[0])[:limit]]
    order = list(seen)
    return sorted(chosen, key=lambda trace: order.index(trace.domain))


def _first_line(prompt: str) -> str:
    lines = prompt.strip().splitlines()
    return _visible(lines[0]) if lines else "(empty prompt)"


def _shortened(text: str, width: int) -> str:
    shortened = Text(text)
    shortened.truncate(max(width, 1), overflow="ellipsis")
    return shortened.plain


def _constrained_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches whose parts make room for each other."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def _top_weight(weights: np.ndarray) -> float:
    """Top of a colour scale that starts at 0: the largest weight, so that small differences stay visible."""
    return float(weights.max())


def _name_ticks(axes: "Axes", *, columns: Sequence[str], rows: Sequence[str]) -> None:
    long = any(len(name) > 10 for name in columns)
    axes.set_xticks(
        range(len(columns)), columns, rotation=30 if long else 0, ha="right" if long else "center"
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _weight_scale(
    figure: "Figure", image: "AxesImage", panels: Sequence["Axes"], num_specialists: int
) -> None:
    """Add the colour scale, with a mark where a gate that does not choose would be."""
    bar = figure.colorbar(image, ax=panels, label="gate weight", pad=0.02, fraction=0.05, aspect=30)
    bar.outline.set_visible(False)
    bar.ax.axhline(1 / num_specialists, color="#d55e00", linewidth=1.5)
    bar.ax.set_title("— 1/N", fontsize=8, color="#d55e00")


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
    with atomic_write(path) as temporary, warnings.catch_warnings():
        # A script without an installed font is drawn as boxes; one warning a character would help nobody.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(temporary, dpi=_DPI)
