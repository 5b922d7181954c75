"""Whether a response is right, as far as a machine can tell: code that runs, final answers that agree.

What cannot be told is not held against a response: a wrong one that stays costs less than a right one that is lost.
"""

import ast
import contextlib
import json
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock

from ultrafuser.sandbox import Result, Sandbox
from ultrafuser.synthesis.final_answers import answer_problem
from ultrafuser.synthesis.recipe import Check

_OPENING = re.compile(r"(`{3,}+(?=[^`]*\Z)|~{3,}+)(.*)")
"""Of a fenced block, without indentation: the fence, and what is said of the block."""
_LANGUAGE = re.compile(r"\s*\{?\s*\.?([\w+#-]*)")
_PYTHON = ("python", "python3", "py")

_OUTSIDE = {"ModuleNotFoundError", "EOFError", "OSError", "TclError"}
"""Errors (and all kinds of them) of programs that need what is not in the sandbox: another library, somebody who types,
a file, a network, a screen."""
_ASKS = re.compile(r"\b(?:argv|argparse|optparse|getopt|stdin|fileinput|environ|getenv)\b")
_NOT_TOLD = {"SystemExit", "IndexError", "KeyError", "ValueError", "StopIteration"}
"""How programs end that ask for something (see `_ASKS`) and get nothing."""
_AT_ONCE = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Programs that run: more would only take each other's time."""
_WRAPPER = """\
def _run(code, mark):
    import linecache
    # Traceback and `inspect` find the program where Python finds this file.
    linecache.cache[__file__] = len(code), None, code.splitlines(True), __file__
    try:
        exec(compile(code, __file__, "exec", dont_inherit=True), globals())
    except BaseException as error:
        import json, os
        try:
            text = str(error)[:300]
        except Exception:
            text = ""
        chain = [error]
        while chain[-1] is not None and len(chain) < 10:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)
        kinds = [[kind.__name__ for kind in type(one).__mro__] for one in chain if one is not None]
        told = json.dumps({"kinds": kinds, "text": text})
        os.write(2, f"\\n{mark}{told}\\n".encode())
        if isinstance(error, SystemExit):
            raise
        raise SystemExit(1) from None
_run(%s, %r)
"""
"""Runs a program in its own place, and says behind a mark how it failed: what the program itself writes, or has as the
text of an error, looks like an error as well."""


def code_problem(response: str, sandbox: Sandbox, earlier: Sequence[str] = ()) -> str | None:
    """Why the Python of a response does not run; None if it does, or if there is none, or if it cannot be judged.

    It cannot where the program needs what the sandbox does not have (other libraries, arguments, input, files, a
    network), or waits for too long: a busy machine looks the same. What uses up its processor time does not run.

    Args:
        response: Markdown; its blocks marked as Python are run together, in order. Transcripts of a Python shell are
            no programs, and left out.
        sandbox: where. No more programs run at once than there are processors; others wait.
        earlier: responses before it in the conversation; what fails alone may need their programs ahead of it.
    """
    blocks = list(_programs(response))
    if not blocks:
        return None
    problem = _problem(_joined(blocks), sandbox)
    known = [block for one in earlier for block in _programs(one)]
    if problem is not None and known:
        problem = _problem(_joined([*known, *blocks]), sandbox)
    return problem


def _problem(program: str, sandbox: Sandbox) -> str | None:
    mark = secrets.token_hex(16)
    with _AT_ONCE:
        result = sandbox.run(_WRAPPER % (ascii(program), mark))
    if result.passed:
        return None
    if result.exit_code == -signal.SIGXCPU:  # what counts is its own time, however busy the machine is
        return "time: it does not end"
    if result.outcome == "time":
        return None
    kinds, text = _failure(result, mark)
    names = {name for kind in kinds for name in kind}
    if names & _OUTSIDE or (names & _NOT_TOLD and _ASKS.search(program)):
        return None
    return f"{result.outcome}: {f'{kinds[0][0]}: ' if kinds else ''}{text}"[:300]


def _failure(result: Result, mark: str) -> tuple[list[list[str]], str]:
    """The error that ended a program and those that led to it (each with all that it is a kind of), and its text."""
    _, found, said = result.stderr.rpartition(mark)
    if found and result.outcome == "ended":  # otherwise it may be cut off
        with contextlib.suppress(
            ValueError, TypeError, KeyError, IndexError, RecursionError
        ):  # the program may have written it, too
            told, _ = json.JSONDecoder().raw_decode(said)
            return [[str(name) for name in kind] for kind in told["kinds"] if kind], str(told["text"])
    last = result.stderr.strip().splitlines()[-1:] or [""]
    return [], last[0]


def _joined(blocks: Sequence[str]) -> str:
    """Blocks as one program; what they want of the future comes first, since Python takes it nowhere else."""
    if len(blocks) == 1:
        return blocks[0]
    wanted: dict[str, None] = {}
    rests = []
    for block in blocks:
        rest, features = _without_future(block)
        wanted |= dict.fromkeys(features)
        rests.append(rest)
    first = [f"from __future__ import {', '.join(wanted)}"] if wanted else []
    return "\n\n".join([*first, *rests])


def _without_future(block: str) -> tuple[str, list[str]]:
    """A block with `pass` for its imports of the future, and what they are; one that is no Python stays as it is."""
    if "__future__" not in block:
        return block, []
    try:
        statements = ast.parse(block).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return block, []
    lines = [line.encode() for line in re.split(r"(?<=\n)", block)]
    features: list[str] = []
    for one in reversed(statements):  # places before it stay what they are
        if isinstance(one, ast.ImportFrom) and one.module == "__future__" and not one.level:
            assert one.end_lineno is not None
            assert one.end_col_offset is not None
            features = [alias.name for alias in one.names] + features
            first, last = lines[one.lineno - 1], lines[one.end_lineno - 1]
            kept = first[: one.col_offset] + b"pass" + last[one.end_col_offset :]
            lines[one.lineno - 1 : one.end_lineno] = [kept]
    return b"".join(lines).decode(), features


def _programs(response: str) -> Iterator[str]:
    """Blocks of Python in Markdown that are programs, however they are fenced and indented."""
    for token in _markdown().parse(response):
        marked = _LANGUAGE.match(token.info)
        is_python = token.type == "fence" and marked is not None and marked[1].lower() in _PYTHON
        if is_python and token.content.strip() and not _is_transcript(token.content):
            yield token.content


@cache
def _markdown() -> MarkdownIt:
    """Reads fenced blocks, and what they may be in: lists and quotes."""
    parser = MarkdownIt("zero").enable(["blockquote", "list", "fence"])
    parser.core.ruler.enableOnly(["normalize", "block"])
    parser.block.ruler.at("fence", _fence, {"alt": ["blockquote", "list"]})
    parser.block.ruler.at("paragraph", _line)
    return parser


def _line(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Text is read line by line, so that a block may begin in any, even where CommonMark sees a line of a paragraph."""
    state.line = start + 1
    return True


def _fence(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A fenced block: like CommonMark's, but with as much indentation as models like, and as little in what follows.

    A fence inside that is indented more belongs to the block, as in a docstring. One that is not closed ends with what
    it is in.
    """
    lines = [state.src[state.bMarks[start] + state.tShift[start] : state.eMarks[start]]]
    opening = _OPENING.fullmatch(lines[0])
    if opening is None or silent:
        return opening is not None
    fence, content = opening[1], []
    place = start + 1
    while place < end:
        line = state.src[state.bMarks[place] : state.eMarks[place]]
        bare = line.strip(" \t")
        place += 1
        is_fence = len(bare) >= len(fence) and set(bare) == {fence[0]}
        if is_fence and state.sCount[place - 1] <= state.sCount[start] + 3:
            break
        content.append(line)
    state.line = place
    token = state.push("fence", "code", 0)
    token.info, token.content = opening[2], _dedented(content)
    return True


def _dedented(lines: Sequence[str]) -> str:
    """Lines without the indentation of the first, where a program begins; a string may hold lines with less."""
    first = next((line for line in lines if line.strip()), "")
    return "\n".join(line[min(_indentation(first), _indentation(line)) :] for line in lines)


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))


def _is_transcript(block: str) -> bool:
    lines = (line for line in block.splitlines() if line.strip() and not line.startswith("#"))
    return next(lines, "").startswith(">>>")


def problem_of(
    check: Check, response: str, reference: str | None, sandbox: Sandbox | None, earlier: Sequence[str] = ()
) -> str | None:
    """What is wrong with a response.

    Args:
        check: what is looked at.
        response: that.
        reference: its right final answer, if it is known.
        sandbox: where code runs.
        earlier: responses before it in the conversation.
    """
    if check == "code" and sandbox is not None:
        return code_problem(response, sandbox, earlier)
    if check == "math" and reference is not None:
        return answer_problem(response, reference)
    return None
