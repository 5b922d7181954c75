"""The token view: one HTML file in which every token of every response shows who weighed in on it.

The page (`token_view.html`) is static and asks nothing from the network; what was measured travels in it as
JSON. Texts of models and users reach the document through `textContent` alone, so nothing in them can run.
"""

import json
import os
from importlib import resources
from typing import Any

from ultrafuser.analysis.palette import specialist_colours, tint
from ultrafuser.analysis.traces import Measurement, TokenTrace, loss_rows
from ultrafuser.files import atomic_write

_PLACEHOLDER = "__MEASUREMENT__"
_DIGITS = 4  # finer than anything the page shows; keeps a page of a hundred responses at a few megabytes


def write_token_view(measurement: Measurement, path: str | os.PathLike[str]) -> None:
    """Write the token view of a measurement as one self-contained HTML file.

    The page shows each trace: domain, prompt, and the response with every token on its mix of the
    specialists' colours; pointing at a token, tapping it or moving to it with the arrow keys shows its gate
    weights and its loss under every row. Responses are built when they come into view, so that a page of
    hundreds opens at once.

    Args:
        measurement: what was measured; all its traces are shown.
        path: file to write.
    """
    template = (resources.files("ultrafuser.analysis") / "token_view.html").read_text(encoding="utf-8")
    # "<" never appears in the data, so no text of a model can end the script element or open another.
    embedded = json.dumps(_page_data(measurement), allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    with atomic_write(path) as temporary:
        temporary.write_text(template.replace(_PLACEHOLDER, embedded), encoding="utf-8")


def _page_data(measurement: Measurement) -> dict[str, Any]:
    """What the page needs, JSON types only; weights and losses rounded to 4 decimals."""
    colours = specialist_colours(len(measurement.specialists))
    rows = loss_rows(measurement.specialists)
    return {
        "specialists": [
            {"name": name, "colour": colour}
            for name, colour in zip(measurement.specialists, colours, strict=True)
        ],
        "rows": rows,
        "domains": measurement.domains,
        "losses": [[measurement.losses[row][domain] for domain in measurement.domains] for row in rows],
        "weights": [
            [measurement.weights[domain][name] for name in measurement.specialists]
            for domain in measurement.domains
        ],
        "numTokens": [measurement.num_tokens[domain] for domain in measurement.domains],
        "traces": [_trace_data(trace, rows, colours) for trace in measurement.traces],
    }


def _trace_data(trace: TokenTrace, rows: tuple[str, ...], colours: list[str]) -> dict[str, Any]:
    return {
        "domain": trace.domain,
        "prompt": trace.prompt,
        "tokens": trace.tokens,
        "tints": [_css_tint(colours, weights) for weights in trace.gate_weights.tolist()],
        "weights": [[round(w, _DIGITS) for w in weights] for weights in trace.gate_weights.tolist()],
        "losses": [[round(loss, _DIGITS) for loss in trace.losses[row].tolist()] for row in rows],
    }


def _css_tint(colours: list[str], weights: list[float]) -> str:
    colour, opacity = tint(colours, weights)
    return f"{colour}{round(255 * opacity):02x}"
