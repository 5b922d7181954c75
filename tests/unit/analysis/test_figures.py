"""Measurements sum up as the formulas say, and every figure is drawn whole for any number of specialists."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from ultrafuser.analysis.figures import lay_out, plot_mean_weights, plot_sample_weights, plot_token_view
from ultrafuser.analysis.palette import mix_colours, specialist_colours, tint
from ultrafuser.analysis.traces import Measurement, TokenTrace, loss_rows, loss_table, weight_table
from ultrafuser.errors import ShapeError, UltrafuserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def make_trace(
    domain: str, tokens: tuple[str, ...], specialists: tuple[str, ...], seed: int = 0
) -> TokenTrace:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(specialists)), size=len(tokens)).astype(np.float32)
    losses = {row: rng.gamma(1.0, size=len(tokens)).astype(np.float32) for row in loss_rows(specialists)}
    return TokenTrace(domain, f"Ask {domain}.\nSecond line.", tokens, weights, losses)


def make_measurement(num_specialists: int) -> Measurement:
    names = tuple(f"s{index}" for index in range(num_specialists))
    traces = [
        make_trace(
            "text",
            ("Costs", " $5", " or", " $x_2$", ".", "\n", "\n", "\ufffd", "\ufffd", "おは", ""),
            names,
            1,
        ),
        make_trace("text", ("One",), names, 2),
        make_trace("code", ("def", " f", "():\n", "\treturn", " '\x1b[0m'", "\n"), names, 3),
    ]
    return Measurement.from_traces(names, traces)


def rendered(table: Table) -> str:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="truecolor")
    console.print(table)
    return console.file.getvalue()


def test_metrics_carry_the_contracted_names() -> None:
    metrics = make_measurement(2).metrics()
    rows, domains, names = ("s0", "s1", "uniform", "fused"), ("text", "code"), ("s0", "s1")
    assert set(metrics) == {f"loss/{row}/{domain}" for row in rows for domain in domains} | {
        f"weight/{domain}/{name}" for domain in domains for name in names
    }
    assert all(type(value) is float for value in metrics.values())


def test_means_weigh_every_token_the_same() -> None:
    names = ("a", "b")

    def trace(losses: list[float], weights: list[float]) -> TokenTrace:
        rows = {row: np.array(losses, dtype=np.float32) for row in loss_rows(names)}
        gate = np.array([[w, 1 - w] for w in weights], dtype=np.float32)
        return TokenTrace("text", "", ("x",) * len(losses), gate, rows)

    measurement = Measurement.from_traces(
        names, [trace([1.0, 2.0, 3.0], [0.25, 0.5, 0.75]), trace([6.0], [1.0])]
    )
    assert measurement.losses["fused"]["text"] == pytest.approx((1 + 2 + 3 + 6) / 4)
    assert measurement.weights["text"]["a"] == pytest.approx((0.25 + 0.5 + 0.75 + 1.0) / 4)
    assert measurement.sample_weights["text"] == pytest.approx(np.array([[0.5, 0.5], [1.0, 0.0]]))
    assert measurement.num_tokens == {"text": 4}


@pytest.mark.parametrize("num_specialists", [1, 3, 9])
def test_every_figure_is_written_whole(num_specialists: int, tmp_path: Path) -> None:
    measurement = make_measurement(num_specialists)
    plot_mean_weights(measurement, tmp_path / "mean.png")
    plot_sample_weights(measurement, tmp_path / "samples.png")
    plot_token_view(measurement.traces, measurement.specialists, tmp_path / "tokens.png", width=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean.png", "samples.png", "tokens.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_a_failing_figure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    target = tmp_path / "tokens.unknown"
    target.write_text("old")
    measurement = make_measurement(1)
    with pytest.raises(ValueError, match="unknown"):
        plot_token_view(measurement.traces, measurement.specialists, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_long_token_view_is_cut_to_a_bounded_height(tmp_path: Path) -> None:
    traces = [make_trace("text", ("word ",) * 400, ("a",)) for _ in range(20)]
    plot_token_view(traces, ("a",), tmp_path / "long.png", width=20, max_traces=2, max_lines=3)
    height = int.from_bytes((tmp_path / "long.png").read_bytes()[20:24], "big")
    assert height < 800


def test_layout_wraps_between_words_and_keeps_newlines() -> None:
    tokens = ("Hello", " wor", "ld", " again", "\n", "", "  indented")
    pieces = lay_out(tokens, width=12)
    lines: dict[int, str] = {}
    for piece in pieces:
        lines[piece.line] = lines.get(piece.line, "").ljust(piece.column) + piece.text
    assert list(lines.values()) == ["Hello world ", "again↵", "∅  indented"]
    assert [piece.token for piece in pieces] == sorted(piece.token for piece in pieces)
    assert {piece.token for piece in pieces} == set(range(len(tokens)))


def test_layout_breaks_what_is_longer_than_a_line_and_counts_wide_characters() -> None:
    pieces = lay_out(("x" * 25, " おはよう"), width=10)
    assert [piece.text for piece in pieces if piece.token == 0] == ["x" * 10, "x" * 10, "x" * 5]
    assert all(piece.column + cell_len(piece.text) <= 10 for piece in pieces)


def test_loss_table_marks_the_best_of_each_column() -> None:
    measurement = make_measurement(3)
    text = rendered(loss_table(measurement))
    for row in loss_rows(measurement.specialists):
        assert row in text
    best = min(cells["text"] for cells in measurement.losses.values())
    assert f"\x1b[1;32m{best:.3f}" in text
    assert text.count("\x1b[1;32m") == len(measurement.domains) + 1


def test_names_are_never_read_as_markup() -> None:
    names = ("[bold]a", "b")
    measurement = Measurement.from_traces(names, [make_trace("[red]d", ("x",), names)])
    assert "[bold]a" in rendered(loss_table(measurement))
    assert "[red]d" in rendered(weight_table(measurement))


def test_traces_that_do_not_fit_are_refused() -> None:
    one, good = np.ones((1, 1), dtype=np.float32), {"a": np.ones(1, dtype=np.float32)}
    with pytest.raises(ShapeError, match="at least 1 response token"):
        TokenTrace("text", "", (), one[:0], {})
    with pytest.raises(ShapeError, match=r"\(2, N\)"):
        TokenTrace("text", "", ("x", "y"), one, {})
    with pytest.raises(UltrafuserError, match="sum to 1"):
        TokenTrace("text", "", ("x",), one * 3, good)
    with pytest.raises(UltrafuserError, match="sum to 1"):
        TokenTrace("text", "", ("x",), one * np.nan, good)
    with pytest.raises(UltrafuserError, match="finite, got inf at token 0"):
        TokenTrace("text", "", ("x",), one, {"a": np.array([np.inf], dtype=np.float32)})
    with pytest.raises(UltrafuserError, match=r"none for \['uniform', 'fused'\]"):
        Measurement.from_traces(("a",), [TokenTrace("text", "", ("x",), one, good)])
    with pytest.raises(ShapeError, match=r"\(R, 2\)"):
        Measurement.from_traces(("a", "b"), [make_trace("text", ("x",), ("a",))])
    with pytest.raises(UltrafuserError, match="Rename one"):
        Measurement.from_traces(("fused",), [])
    with pytest.raises(UltrafuserError, match="at least 1 trace"):
        Measurement.from_traces(("a",), [])
    with pytest.raises(UltrafuserError, match="at least 1 trace"):
        plot_token_view([], ("a",), "never.png")


@pytest.mark.parametrize("num", [1, 3, 7, 8, 9, 24])
def test_colours_are_distinct_hex(num: int) -> None:
    colours = specialist_colours(num)
    assert len(set(colours)) == num
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours)


def test_mixing_keeps_pure_colours_and_meets_in_the_middle_in_linear_light() -> None:
    colours = specialist_colours(3)
    assert mix_colours(colours, [0, 1, 0]) == colours[1]
    assert mix_colours(["#000000", "#ffffff"], [0.5, 0.5]) == "#bcbcbc"
    red, green, blue = (int(mix_colours(colours, [1, 1, 1])[at : at + 2], 16) for at in (1, 3, 5))
    assert max(red, green, blue) - min(red, green, blue) < 25  # nobody's colour


def test_a_token_is_fainter_the_less_the_gate_decided() -> None:
    colours = specialist_colours(2)
    opacities = [tint(colours, weights)[1] for weights in ([0.5, 0.5], [0.7, 0.3], [1.0, 0.0])]
    assert opacities == pytest.approx([0.25, 0.43, 0.7])
    assert tint(specialist_colours(1), [1.0]) == (specialist_colours(1)[0], pytest.approx(0.7))


def test_colours_refuse_what_they_cannot_mean() -> None:
    with pytest.raises(UltrafuserError, match="at least 1"):
        specialist_colours(0)
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(UltrafuserError, match="Mixing 2 colours"):
            mix_colours(["#000000", "#ffffff"], weights)
