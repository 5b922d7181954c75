"""The token view carries its data faithfully, asks nothing of the network, and runs nothing a model wrote."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ultrafuser.analysis.token_view import write_token_view
from ultrafuser.analysis.traces import Measurement, TokenTrace, loss_rows

NAMES = ("text", "co<de", "math")
HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script>",
    "<script>alert(2)</script>",
    "<!--",
    "\u2028",
    "\ud800",
    " fine\n",
)


@pytest.fixture
def measurement() -> Measurement:
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(3), size=len(HOSTILE)).astype(np.float32)
    losses = {row: rng.gamma(1.0, size=len(HOSTILE)).astype(np.float32) for row in loss_rows(NAMES)}
    return Measurement.from_traces(
        NAMES, [TokenTrace("a</script>b", "".join(HOSTILE), HOSTILE, weights, losses)]
    )


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text of each script."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script":
            self.scripts[-1] += data


@pytest.fixture
def page(measurement: Measurement, tmp_path: Path) -> str:
    write_token_view(measurement, tmp_path / "view.html")
    assert [path.name for path in tmp_path.iterdir()] == ["view.html"]
    return (tmp_path / "view.html").read_text(encoding="utf-8")


def test_hostile_text_stays_data(page: str) -> None:
    parsed = Elements(page)
    assert len(parsed.scripts) == 2  # the data and the page's own
    assert "img" not in [tag for tag, _ in parsed.elements]
    assert "<" not in parsed.scripts[0]
    assert not any(name.startswith("on") for _, attributes in parsed.elements for name in attributes)
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert sink not in page


def test_nothing_is_asked_of_the_network(page: str) -> None:
    parsed = Elements(page)
    links = [attributes.get(name) for _, attributes in parsed.elements for name in ("src", "href")]
    assert [link for link in links if link is not None] == ["data:,"]
    assert (
        re.findall(r"https?://[^\"']*", parsed.scripts[1]) == ["http://www.w3.org/2000/svg"] * 2
    )  # a namespace
    assert "default-src 'none'" in page
    for request in ("fetch(", "XMLHttpRequest", "import(", "@import", "url("):
        assert request not in page


def test_data_reads_back_as_measured(page: str, measurement: Measurement) -> None:
    data = json.loads(Elements(page).scripts[0])
    (trace,) = data["traces"]
    (measured,) = measurement.traces
    assert tuple(trace["tokens"]) == HOSTILE
    assert (trace["domain"], trace["prompt"]) == ("a</script>b", "".join(HOSTILE))
    assert [specialist["name"] for specialist in data["specialists"]] == list(NAMES)
    np.testing.assert_allclose(trace["weights"], measured.gate_weights, atol=5.1e-5)
    for row, losses in zip(data["rows"], trace["losses"], strict=True):
        np.testing.assert_allclose(losses, measured.losses[row], atol=5.1e-5)
    assert all(re.fullmatch(r"#[0-9a-f]{8}", tint) for tint in trace["tints"])
    assert data["losses"][-1] == [measurement.losses["fused"]["a</script>b"]]


def test_a_failing_write_leaves_the_old_page_alone(
    measurement: Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "view.html"
    target.write_text("old")

    def full_disk(path: Path, *_: object, **__: object) -> int:
        path.open("w").close()
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write_token_view(measurement, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
