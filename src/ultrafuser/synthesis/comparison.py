"""Compares final answers by `math-verify`, as a process of its own: a line of JSON for each line of JSON.

`final_answers.py` starts it as a script, and ends it where a comparison takes too long. It ends with its input.
"""

import faulthandler
import json
import math
import os
import re
import sys
from typing import Any

_SCALES = {"percent": 0.01, "degree": math.pi / 180}
"""Units that are numbers."""
_MOST_S = 60.0
"""Seconds of a comparison, after which the process ends itself."""
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-df-hj-z](?![A-Za-z])")


def compare(expected: dict[str, str], found: dict[str, str]) -> bool | None:
    """Whether two answers are the same; None if that cannot be told.

    Args:
        expected: "latex" of the reference, and the "unit" behind it.
        found: likewise.
    """
    from math_verify import parse, verify  # type: ignore[import-untyped]
    from math_verify.errors import TimeoutException  # type: ignore[import-untyped]

    one, other = (parse(f"${answer['latex']}$", raise_on_error=False) for answer in (expected, found))
    if not one or not other:
        return None
    letters: list[set[Any]] = [getattr(side[0], "free_symbols", set()) for side in (one, other)]
    for answer, read in zip((expected, found), letters, strict=True):
        if not read and _VARIABLE.search(answer["latex"]):
            return None  # it took a letter for a unit
    units = {expected["unit"], found["unit"]}
    if "" not in units and len(units) == 2:
        return None  # 1 km and 1000 m
    first, second = _number(one[0]), _number(other[0])
    if first is None or second is None:
        try:
            if verify(one, other, float_rounding=9, raise_on_error=True):
                return True
        except (Exception, TimeoutException):  # it took too long, or the library cannot do it
            return None
        return None if letters[0] != letters[1] and len(letters[0]) == len(letters[1]) > 0 else False
    scaled = first * _SCALES.get(expected["unit"], 1), second * _SCALES.get(found["unit"], 1)
    if _close(first, second) or _close(*scaled):
        return True
    is_rounded = _is_rounded(expected["latex"], second) or _is_rounded(found["latex"], first)
    return None if is_rounded else False


def _close(one: float, other: float) -> bool:
    """Whether two values are the same; whole numbers are compared exactly, however many digits they have."""
    if isinstance(one, int) and isinstance(other, int):
        return one == other
    try:
        return math.isclose(one, other, rel_tol=1e-9)
    except OverflowError:  # a whole number beyond what the other can be
        return False


def _number(expression: Any) -> float | int | None:
    """Its value, exactly if it is a whole number."""
    try:
        value = expression.doit()
        return int(value) if value.is_Integer else float(value)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return None


def _is_rounded(written: str, exact: float) -> bool:
    """Whether a number with decimals may be another one, rounded or cut off."""
    if not (match := re.fullmatch(r"-?\d*\.(\d+)", written)) or abs(exact) > 1e15:
        return False
    step, rounded = 10.0 ** -len(match[1]), abs(float(written))
    return abs(rounded - abs(exact)) <= step / 2 or rounded <= abs(exact) < rounded + step


def main() -> None:
    """Compare what comes."""
    import math_verify  # noqa: F401  # it takes a second: done when "ready" is said

    said = sys.stdout
    print("ready", file=said, flush=True)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # nobody reads what libraries may print
    for line in sys.stdin:
        faulthandler.dump_traceback_later(
            _MOST_S, exit=True, file=sys.stderr
        )  # also if nobody is left to end it
        try:
            verdict = compare(*json.loads(line))
        except Exception:  # of the library, or too large a number
            verdict = None
        print(json.dumps(verdict), file=said, flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
