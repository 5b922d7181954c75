"""Whether a response is right, as far as a machine can tell: code that runs, final answers that agree."""

import re
from collections.abc import Iterator

from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.recipe import Check

_OPENING = re.compile(r"([ \t]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)*)(`{3,}(?=[^`]*\Z)|~{3,})(.*)")
"""Of a fenced block: list markers and indentation, the fence, and what is said of the block."""
_LANGUAGE = re.compile(r"\s*\{?\s*\.?([\w+#-]*)")
_PYTHON = ("python", "python3", "py")
_NOT_JUDGED = ("ModuleNotFoundError", "EOFError")
"""How a program ends that needs what is not in the sandbox: another library, or somebody who types."""


def code_problem(response: str, sandbox: Sandbox) -> str | None:
    """Why the Python of a response does not run; None if it does, or if there is none, or if it cannot be judged.

    Args:
        response: Markdown; its blocks marked as Python are run together, in order. Transcripts of a Python shell are
            no programs, and left out.
        sandbox: where.
    """
    blocks = list(_programs(response))
    if not blocks:
        return None
    result = sandbox.run("\n\n".join(blocks))
    if result.passed:
        return None
    last = result.stderr.strip().splitlines()[-1:] or [""]
    if result.outcome == "ended" and last[0].startswith(_NOT_JUDGED):
        return None
    return f"{result.outcome}: {last[0]}"[:300]


def _programs(response: str) -> Iterator[str]:
    """Blocks of Python in Markdown that are programs, however they are fenced and indented."""
    for language, block in _fenced_blocks(response):
        if language.lower() in _PYTHON and block.strip() and not _is_transcript(block):
            yield block


def _fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block; one that is not closed ends with the text."""
    language, fence, indent = "", "", 0
    content: list[str] | None = None  # None outside of blocks
    for line in re.split(r"\r\n|\r|\n", text):
        if content is None:
            if (opening := _OPENING.fullmatch(line)) is not None:
                indent, fence, content = len(opening[1]), opening[2], []
                marked = _LANGUAGE.match(opening[3])
                language = "" if marked is None else marked[1]
        elif _closes(line, fence, indent):
            yield language, _dedented(content)
            content = None
        else:
            content.append(line)
    if content is not None:
        yield language, _dedented(content)


def _closes(line: str, fence: str, indent: int) -> bool:
    """Whether a line ends a block; one that is indented more belongs to it, as in a docstring."""
    bare = line.strip(" \t")
    is_fence = len(bare) >= len(fence) and set(bare) == {fence[0]}
    return is_fence and _indentation(line) <= indent + 3


def _dedented(lines: list[str]) -> str:
    """Lines without the indentation of the first, where a program begins; a string may hold lines with less."""
    first = next((line for line in lines if line.strip()), "")
    return "\n".join(line[min(_indentation(first), _indentation(line)) :] for line in lines)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _is_transcript(block: str) -> bool:
    lines = (line for line in block.splitlines() if line.strip() and not line.startswith("#"))
    return next(lines, "").startswith(">>>")


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
