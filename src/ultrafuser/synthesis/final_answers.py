"""Whether the final answer of a response is the reference.

`math-verify` reads LaTeX and compares; this brings plain notation into it, and keeps from it what it would guess at:
units, rounded numbers, letters that name a choice. So there are three verdicts: right, wrong, and not judged. It works
in processes of its own (`comparison.py`), where what takes too long is ended.
"""

import json
import os
import queue
import re
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ultrafuser.errors import UltrafuserError

_MOST_CHARACTERS = 400
"""Of a final answer; longer ones are not judged."""
_MOST_S = 20.0
"""Seconds that a comparison may take; the library's own limit does not hold everywhere."""
_MOST_CANDIDATES = 10
"""Numbers in a last line that does not say what the final answer is."""
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "⁄": "/", "π": " pi ", "∞": " oo ", "\u00a0": " ",
    "\u202f": " ", "°": " degrees", "√": " sqrt", "∪": " U ", "±": r" \pm ",
})  # fmt: skip
_CURRENCIES = {"€": "euros", "£": "sterling", "¥": "yen"}
_SIMPLER: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r"[⁻⁰¹²³⁴-⁹]+", lambda match: f"^{{{unicodedata.normalize('NFKC', match[0])}}}".replace("−", "-")),
    (r"[¼-¾⅐-⅞]", lambda match: f" {unicodedata.normalize('NFKC', match[0])}".replace("⁄", "/")),
    (r"^(?i:the\s+)?(?i:final\s+)?(?i:answer)\s*(?:is|:)\s*", ""),
    (r"\\(?:left|right|displaystyle|[,;!:]|[()\[\]])|^\$(?=[^$]*\$$)|(?<=[^$\\])\$$", ""),
    (r"\\boxed\{(.*)\}", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt(\d)", r"\\sqrt{\1}"),
    (r"\^\s*\{?\s*\\circ\s*\}?", " degrees"),
    (r"\\(?:text|mathrm|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\ |~", " "),
    (r"\\?%", " percent"),
    (r"\\?[$]\s*(-?[\d.,]*\d)", r"\1 dollars"),
    (r"([€£¥])\s*(-?[\d.,]*\d)", lambda match: f"{match[2]} {_CURRENCIES[match[1]]}"),
    (r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", ""),
    (r"\*\*", "^"),
    (r"\\times|\\cdot", "*"),
    (r"(?<=\d)[eE]([+-]?\d+)\b", r"*10^{\1}"),
    (r"\^\(([^()]*)\)", r"^{\1}"),
    (r"\^(-?\d+)", r"^{\1}"),
    (r"(?<![\d.^{/])(\d+)\s+(?:and\s+)?(\d+)\s*/\s*(\d+)(?![\d.])", r"(\1+\\frac{\2}{\3})"),
    (r"(?<![\d.}])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
    (r"\s+(?:and|or)\s+", ", "),
    (r"(?<!\\)\bsqrt\s*(?:\(([^()]*)\)|(\w+))", r"\\sqrt{\1\2}"),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])[pP]i(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])(?:oo|inf|infinity)(?![A-Za-z])", r"\\infty "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"^\{(.*)\}$", r"\\{\1\\}"),
    (r"\*", r"\\cdot "),
]  # fmt: skip
"""Patterns and what is written instead, one after the other."""
_KNOWN = r"\\(?:frac|sqrt|sin|cos|tan|ln|log|exp|pi|infty|cdot|cup|pm|binom|le|ge|lt|gt|leq|geq|in|[{}])(?![A-Za-z])"
_UNCLEAR = re.compile(
    r"[^\x00-\x7f]|[A-Za-z]{2,}|\\"  # what is left of other signs, words and commands
    r"|^[<>~=]|_\s*\{?\d|\b0[xXbo]|:|\d\s+\d|^\d+,\d+$"  # bounds, other bases, ratios, spaces or commas in numbers
    r"|\b[A-Z]\s*\(|/\s*\d+\s*[a-z]|^\(?[A-E]\)?$"  # C(5, 2), 1/2x, and one of several choices
    r"|@\s*\[|\)\s*\^\{?[^}]*/|[<>].*,|/\s*0(?![.\d])|\}\{0\}"  # roots of negative numbers, inequalities, no number
    r"|\^.*\^|\^\{?-?\d{4,}|\d{4,}\s*!|!\s*!"  # towers
)
"""What is meant in another way than it would be read, or takes longer than it is worth, such as towers of powers."""
_LETTER = re.compile(r"\W*[A-Za-z]?\W*")
"""A letter alone, in a last line that names a variable."""
_COUNTED = re.compile(r"mod|choose|base|(?<!\^)\d|dozen|hundred|thousand|[mb]illion|half|third|quarter")
"""Numbers among words, and what is done with numbers."""


class _Answer(NamedTuple):
    """What the library is to read, the unit behind it, and the letter that it is the value of."""

    latex: str
    unit: str
    name: str


def answer_problem(response: str, reference: str) -> str | None:
    """Why the final answer of a response is not the reference; None if they agree, or if it cannot be judged.

    Args:
        response: with its final answer at the end, best in a LaTeX box; otherwise after "####", or "the answer is". If
            nothing says where it is, it is enough that the reference, or what cannot be judged, is in the last line
            that has a number or a formula.
        reference: the right final answer.
    """
    if _understood(reference) is None:
        return None
    answers, is_marked = _final(response)
    if not is_marked and _LETTER.fullmatch(reference):
        return None
    verdicts = [agrees(reference, answer) for answer in answers]
    if is_marked and verdicts and set(verdicts) == {False}:
        return f"{answers[0].strip()[:140]}, {reference[:140]} was expected"
    if not is_marked and not {True, None} & set(verdicts):
        return f"no final answer, {reference} was expected"[:300]
    return None


def agrees(reference: str, answer: str) -> bool | None:
    """Whether a final answer is the reference; None if it cannot be judged."""
    expected, found = _understood(reference), _understood(answer)
    if expected is None or found is None:
        return None
    verdict = _compare(expected, found)
    both = (expected, found)
    if verdict and "" not in (expected.name, found.name) and expected.name != found.name:
        return None
    if verdict is False and len({re.search("[<>]", one.latex) is None for one in both}) == 2:
        return None  # an interval, and what leaves it
    if verdict is False and len({re.sub(r"[()\[\]\\{}\s]", "", one.latex) for one in both}) == 1:
        return None  # a list, a point or an interval
    if verdict is False and len({re.sub(r"(?<=\d)[LKVWNJAC]$", "", one.latex) for one in both}) == 1:
        return None  # a letter, and a unit or none
    return verdict


def _final(response: str) -> tuple[list[str], bool]:
    """What may be the final answer of a response, and whether it says so."""
    if boxes := re.findall(
        r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}?", response[-4000:]
    ):
        several = [", ".join(boxes)] if len(set(boxes)) > 1 else []
        return [boxes[-1], *several], True
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("####") and line.strip("# "):
            return [line], True
        if found := re.findall(r"(?i)\banswer(?:\s+is|\s*:|\s*=)++\s*+(?=.*\w)(.{1,400})", line):
            return [re.split(r"[.!](?=\s|\*|$)|\*\*\s", found[-1].strip("*_ :"))[0].strip("*_ ")], True
    last = (_in_line(line[-2 * _MOST_CHARACTERS :]) for line in reversed(lines))
    return next((answers for answers in last if answers), []), False


def _in_line(line: str) -> list[str]:
    """What may be a final answer in a line that does not say so: numbers, formulas, the line if it is one."""
    found = re.findall(
        r"\$[^$]+\$|\\\(.+?\\\)|-?\$?\d(?:[\d.,/]*\d)?%?(?:\s*[A-Za-z]{2,12}|\s+[mgshlLKVWNJAC]\b)?", line
    )[-_MOST_CANDIDATES:]
    if not re.search(r"[\\$]", line):
        found.append(", ".join(re.findall(r"(?<![\w.])-?\d(?:[\d.,/]*\d)?", line)[-_MOST_CANDIDATES:]))
    if "=" in line:
        found.insert(0, line.rpartition("=")[2])
    is_formula = re.search(r"\\[A-Za-z\[]", line) and not re.search(r"\$|\\\(", line)
    # One with numbers that is not understood stands for what cannot be judged; one without says nothing.
    if is_formula and (found or _understood(line) is not None):
        found.insert(0, line)
    return [answer for answer in found if answer and not _LETTER.fullmatch(answer)]


def _understood(text: str) -> _Answer | None:
    """A final answer as the library reads it; None if it would be another one then."""
    if len(text) > _MOST_CHARACTERS or re.search(r"(?<!\\)[(\[][^)\]]*\d,\d{3}(?!\d)", text):
        return None  # (1,200) may be a number, and a point
    text = text.translate(_SIGNS).strip("#* \n").rstrip(". ")
    for pattern, into in _SIMPLER:
        text = re.sub(pattern, into, text).strip()
    *names, text = (part.strip() for part in text.split("="))
    if not all(
        re.fullmatch(r"[A-Za-z](?:_?\w|\([A-Za-z]\))?|[A-Za-z]{4,}|[\d+\-. ]+", name) for name in names
    ):
        return None  # an equation, or several
    unit = ""
    if match := re.fullmatch(
        r"(.*[\d})])\s*((?:[A-Za-z]{2,}|[a-z](?=\s*/)|(?<=\s)[mgshlLKVWNJAC])\b[\w\s/^{}]*)", text
    ):
        text, unit = match[1].strip(), re.sub(r"[\s{}]|(?<=\w\w)s\b", "", match[2])
    if not text or _COUNTED.search(unit) or _UNCLEAR.search(re.sub(_KNOWN, "@", text)):
        return None
    return _Answer(text, unit, next((name for name in names if len(name) == 1), ""))


class _Comparer:
    """A process that compares. It ends with its input, so with the one that started it, however that ends.

    Raises:
        UltrafuserError: it does not start.
    """

    def __init__(self) -> None:
        script = Path(__file__).with_name("comparison.py")
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the one that started it
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise UltrafuserError(
                f"final answers cannot be compared: {self._process.communicate()[1].strip()[-300:]}"
            )

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def compare(self, expected: _Answer, found: _Answer) -> bool | None:
        """The verdict; the process is ended where it takes too long."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(_MOST_S, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps([expected._asdict(), found._asdict()]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watch.cancel()
        if not line.endswith("\n"):
            self._process.communicate()
            return None
        return json.loads(line)


_COMPARERS: "queue.SimpleQueue[_Comparer]" = queue.SimpleQueue()
"""Those that have nothing to do."""
_AT_ONCE = threading.BoundedSemaphore(os.cpu_count() or 1)


def _compare(expected: _Answer, found: _Answer) -> bool | None:
    with _AT_ONCE:
        comparer = _idle_comparer()
        verdict = comparer.compare(expected, found)
        if comparer.is_alive:
            _COMPARERS.put(comparer)
        return verdict


def _idle_comparer() -> _Comparer:
    """One that has nothing to do; those that have ended meanwhile are dropped."""
    while True:
        try:
            comparer = _COMPARERS.get_nowait()
        except queue.Empty:
            return _Comparer()
        if comparer.is_alive:
            return comparer
