"""Whether a response is right, as far as a machine can tell: code that runs, final answers that agree."""

import re

from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.recipe import Check

_CODE = re.compile(r"```(?:python|py|python3)[ \t]*\n(.*?)```", re.DOTALL)
_NOT_JUDGED = ("ModuleNotFoundError", "EOFError")
"""How a program ends that needs what is not in the sandbox: another library, or somebody who types."""


def code_problem(response: str, sandbox: Sandbox) -> str | None:
    """Why the Python of a response does not run; None if it does, or if there is none, or if it cannot be judged.

    Args:
        response: Markdown; its blocks marked as Python are run together, in order.
        sandbox: where.
    """
    blocks = _CODE.findall(response)
    if not blocks:
        return None
    result = sandbox.run("\n\n".join(blocks))
    if result.passed:
        return None
    last = result.stderr.strip().splitlines()[-1:] or [""]
    if result.outcome == "ended" and last[0].startswith(_NOT_JUDGED):
        return None
    return f"{result.outcome}: {last[0]}"[:300]


def answer_problem(response: str, reference: str) -> str | None:
    """Why the final answer of a response is not the reference; None if they agree, or if the reference is no number.

    It must run in the main thread: what takes too long is ended by a signal.

    Args:
        response: with its final answer at the end, best in a LaTeX box.
        reference: a number or an expression.
    """
    from math_verify import parse, verify  # type: ignore[import-untyped]

    expected = parse(f"${reference}$") if any(character.isdigit() for character in reference) else []
    if not expected:
        return None
    found = parse(response)
    if not found:
        return f"no final answer, {reference} was expected"
    return None if verify(expected, found) else f"{found[-1]}, {reference} was expected"


def problem_of(check: Check, response: str, reference: str | None, sandbox: Sandbox | None) -> str | None:
    """What is wrong with a response.

    Args:
        check: what is looked at.
        response: that.
        reference: its right final answer, if it is known.
        sandbox: where code runs.
    """
    if check == "code" and sandbox is not None:
        return code_problem(response, sandbox)
    if check == "math" and reference is not None:
        return answer_problem(response, reference)
    return None
