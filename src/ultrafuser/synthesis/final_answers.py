"""Whether the final answer of a response is the reference.

`math-verify` reads LaTeX and compares; this brings plain notation into it, and keeps from it what it would guess at:
units, rounded numbers, letters that name a choice. So there are three verdicts: right, wrong, and not judged. It works
in processes of its own, where what takes too long is ended.
"""

import faulthandler
import math
import multiprocessing
import os
import re
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from typing import Any, NamedTuple

_MOST_CHARACTERS = 400
"""Of a final answer; longer ones are not judged."""
_MOST_S = 20.0
"""Seconds that a comparison may take; the library's own limit does not hold everywhere."""
_MOST_CANDIDATES = 10
"""Numbers in a last line that does not say what the final answer is."""
_SIGNS = str.maketrans({
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": " pi ", "∞": " oo ", "\u00a0": " ",
    "\u202f": " ", "°": " degrees",
})  # fmt: skip
_SIMPLER: list[tuple[str, str]] = [
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
    (r"€\s*(-?[\d.,]*\d)", r"\1 euros"),
    (r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", ""),
    (r"\*\*", "^"),
    (r"\\times|\\cdot", "*"),
    (r"(?<=\d)[eE]([+-]?\d+)\b", r"*10^{\1}"),
    (r"\^\(([^()]*)\)", r"^{\1}"),
    (r"\^(-?\d+)", r"^{\1}"),
    (r"(?<![\d.^{/])(\d+)\s+(?:and\s+)?(\d+)\s*/\s*(\d+)(?![\d.])", r"(\1+\\frac{\2}{\3})"),
    (r"(?<![\d.}])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\\frac{\2}{\3})"),
    (r"\s+(?:and|or)\s+", ", "),
    (r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|exp)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![\\A-Za-z])[pP]i(?![A-Za-z])", r"\\pi "),
    (r"(?<![\\A-Za-z])(?:oo|inf|infinity)(?![A-Za-z])", r"\\infty "),
    (r"(?<=[)\]])\s*U\s*(?=[(\[])", r"\\cup "),
    (r"^\{(.*)\}$", r"\\{\1\\}"),
    (r"\*", r"\\cdot "),
]  # fmt: skip
"""Patterns and what is written instead, one after the other."""
_SCALES = {"percent": 0.01, "degree": math.pi / 180}
"""Units that are numbers."""
_KNOWN = r"\\(?:frac|sqrt|sin|cos|tan|ln|log|exp|pi|infty|cdot|cup|pm|binom|le|ge|lt|gt|leq|geq|in|[{}])(?![A-Za-z])"
_UNCLEAR = re.compile(
    r"[A-Za-z]{2,}|\\|:|\d\s+\d|\b[A-Z]\s*\(|/\s*\d+\s*[a-z]|^\(?[A-E]\)?$|^\d+,\d+$|@\s*\[|\)\s*\^\{?[^}]*/"
    r"|[<>].*,|\^.*\^|\^\{?-?\d{4,}|\d{4,}\s*!|!\s*!|/\s*0(?![.\d])|\}\{0\}"
)
"""What is meant in another way than it would be read, or takes longer than it is worth, such as towers of powers."""
_COUNTED = re.compile(r"dozen|hundred|thousand|[mb]illion|half|third|quarter")
"""Numbers among words."""


class _Answer(NamedTuple):
    """What the library is to read, the unit behind it, and the letter that it is the value of."""

    latex: str
    unit: str
    name: str


def answer_problem(response: str, reference: str) -> str | None:
    """Why the final answer of a response is not the reference; None if they agree, or if it cannot be judged.

    Args:
        response: with its final answer at the end, best in a LaTeX box; otherwise after "####", or "the answer is". If
            nothing says where it is, it is enough that the reference is in the last line.
        reference: the right final answer.
    """
    if _understood(reference) is None:
        return None
    answers, is_marked = _final(response)
    verdicts = [agrees(reference, answer) for answer in answers]
    if is_marked and verdicts and set(verdicts) == {False}:
        return f"{answers[0].strip()[:140]}, {reference[:140]} was expected"
    if not is_marked and True not in verdicts:
        return f"no final answer, {reference} was expected"[:300]
    return None


def agrees(reference: str, answer: str) -> bool | None:
    """Whether a final answer is the reference; None if it cannot be judged."""
    expected, found = _understood(reference), _understood(answer)
    if expected is None or found is None:
        return None
    try:
        verdict = _pool().submit(_compare_in_time, expected, found).result()
    except BrokenProcessPool:  # it took too long; the next one has other processes
        _pool.cache_clear()
        return None
    if verdict is False and len({re.sub(r"[()\[\]\\{}\s]", "", one.latex) for one in (expected, found)}) == 1:
        return None  # a list, a point or an interval
    return (
        None if verdict and "" not in (expected.name, found.name) and expected.name != found.name else verdict
    )


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
        if found := re.findall(r"(?i)\banswer(?:\s+is|\s*:|\s*=)+\s*(?=.*\w)(.{1,400})", line):
            return [re.split(r"[.!](?=\s|\*|$)|\*\*\s", found[-1].strip("*_ :"))[0].strip("*_ ")], True
    last = lines[-1][-2 * _MOST_CHARACTERS :] if lines else ""
    found = re.findall(r"\$[^$]+\$|\\\(.+?\\\)|-?\$?\d[\d.,/]*%?", last)
    return [last.rpartition("=")[2], *found[-_MOST_CANDIDATES:]], False


def _understood(text: str) -> _Answer | None:
    """A final answer as the library reads it; None if it would be another one then."""
    if len(text) > _MOST_CHARACTERS:
        return None
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
        r"(.*[\d})])\s*((?:[A-Za-z]{2,}|[a-z](?=\s*/)|(?<=\s)[a-zA-Z])\b[\w\s/^{}]*)", text
    ):
        text, unit = match[1].strip(), re.sub(r"[\s{}]|(?<=\w\w)s\b", "", match[2])
    if not text or _COUNTED.search(unit) or _UNCLEAR.search(re.sub(_KNOWN, "@", text)):
        return None
    return _Answer(text, unit, next((name for name in names if len(name) == 1), ""))


@cache
def _pool() -> ProcessPoolExecutor:
    """Processes, whose main thread the library's alarm needs; a fork of a process with threads may never start."""
    return ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> None:
    """Let a process of the pool end even where the one that made it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _compare_in_time(expected: _Answer, found: _Answer) -> bool | None:
    """See `_compare`; the process ends if it takes too long, which one in the middle of a power cannot be told else."""
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(_MOST_S, exit=True, file=nowhere)
        try:
            return _compare(expected, found)
        finally:
            faulthandler.cancel_dump_traceback_later()


def _compare(expected: _Answer, found: _Answer) -> bool | None:
    """See `agrees`."""
    from math_verify import parse, verify  # type: ignore[import-untyped]

    one, other = (parse(f"${answer.latex}$", raise_on_error=False) for answer in (expected, found))
    if not one or not other:
        return None
    letters: list[set[Any]] = [getattr(side[0], "free_symbols", set()) for side in (one, other)]
    for answer, read in zip((expected, found), letters, strict=True):
        if not read and re.search(r"[A-Za-df-hj-z]", re.sub(_KNOWN, "@", answer.latex)):
            return None  # it took a letter for a unit
    units = {expected.unit, found.unit}
    if "" not in units and len(units) == 2:
        return None  # 1 km and 1000 m
    first, second = _number(one[0]), _number(other[0])
    if first is None or second is None:
        if verify(one, other, float_rounding=9):
            return True
        return None if letters[0] != letters[1] and len(letters[0]) == len(letters[1]) > 0 else False
    scaled = first * _SCALES.get(expected.unit, 1), second * _SCALES.get(found.unit, 1)
    if _close(first, second) or _close(*scaled):
        return True
    is_rounded = _is_rounded(expected.latex, second) or _is_rounded(found.latex, first)
    return None if is_rounded else False


def _close(one: float, other: float) -> bool:
    """Whether two values are the same; whole numbers are compared exactly, however many digits they have."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    return math.isclose(one, other, rel_tol=1e-9)


def _number(expression: Any) -> float | int | None:
    """Its value, exactly if it is a whole number."""
    try:
        value = expression.doit()
        return int(value) if value.is_Integer else float(value)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None


def _is_rounded(written: str, exact: float) -> bool:
    """Whether a number with decimals may be another one, rounded or cut off."""
    if not (match := re.fullmatch(r"-?\d*\.(\d+)", written)):
        return False
    step, rounded = 10.0 ** -len(match[1]), abs(float(written))
    return abs(rounded - abs(exact)) <= step / 2 or rounded <= abs(exact) < rounded + step
