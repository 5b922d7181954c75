"""The shipped code conversations: well-formed, distinct, and every Python and SQL answer runs as claimed."""

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from importlib.resources import files

import pytest

FOLDER = files("ultrafuser") / "demo" / "conversations"
MINIMUM_ROWS = {"train": 60, "heldout": 20}

# Runs in a separate, isolated interpreter: rows arrive on stdin, one list of [index, traceback] leaves.
DRIVER = """
import contextlib, doctest, io, json, sys, traceback
failures = []
for index, (code, check, output, run_doctests) in enumerate(json.load(sys.stdin)):
    namespace, printed = {"__name__": "__main__"}, io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"row {index}", "exec"), namespace)
        assert printed.getvalue() == (output or ""), f"printed {printed.getvalue()!r}, expected {output!r}"
        if run_doctests:
            own = [value for value in namespace.values() if getattr(value, "__module__", "") == "__main__"]
            parse = doctest.DocTestParser().get_doctest
            tests = [parse(v.__doc__, namespace, v.__name__, None, 0) for v in own if v.__doc__]
            report = io.StringIO()
            results = [doctest.DocTestRunner().run(test, out=report.write) for test in tests]
            assert sum(r.attempted for r in results) and not sum(r.failed for r in results), report.getvalue()
        exec(compile(check, f"check {index}", "exec"), namespace)
    except BaseException:
        failures.append([index, traceback.format_exc()])
print(json.dumps(failures))
"""


def read(split):
    text = (FOLDER / f"code.{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {split: read(split) for split in MINIMUM_ROWS}
ALL_ROWS = [row for rows in ROWS.values() for row in rows]


def request(row):
    return "\n".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")


def final_code(row):
    """The code of the last response, without its fence if it has one."""
    response = row["messages"][-1]["content"]
    fenced = re.findall(r"```\w*\n(.*?)```", response, flags=re.DOTALL)
    return fenced[0] if fenced else response


@pytest.mark.parametrize("split", ROWS)
def test_rows_are_well_formed(split):
    assert len(ROWS[split]) >= MINIMUM_ROWS[split]
    for row in ROWS[split]:
        assert set(row) == {"form", "language", "messages", "check", "output"}
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert roles
        assert all(turn["content"] == turn["content"].strip("\n") != "" for turn in row["messages"])
        assert len(re.findall("```", row["messages"][-1]["content"])) in (0, 2)
        assert (row["check"] is not None) == (row["language"] == "python")
        assert row["check"] is None or "assert" in row["check"]


def test_rows_are_varied_and_mostly_checked():
    for rows in ROWS.values():
        assert len({row["form"] for row in rows}) >= 8
        assert len({row["language"] for row in rows} - {"none"}) >= 5
        assert sum(row["check"] is not None for row in rows) >= 0.65 * len(rows)


def test_no_request_or_final_code_occurs_twice():
    turns = [turn["content"] for row in ALL_ROWS for turn in row["messages"] if turn["role"] == "user"]
    for texts in (turns, [final_code(row) for row in ALL_ROWS]):
        normalised = Counter(" ".join(text.lower().split()) for text in texts)
        assert max(normalised.values()) == 1


@pytest.mark.parametrize("split", ROWS)
def test_python_answers_run_and_pass_their_checks(split, tmp_path):
    rows = [row for row in ROWS[split] if row["language"] == "python"]
    jobs = [(final_code(row), row["check"], row["output"], row["form"] == "complete") for row in rows]
    done = subprocess.run(
        [sys.executable, "-I", "-c", DRIVER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    failures = json.loads(done.stdout)
    assert not failures, "\n".join(f"{request(rows[index])}\n{trace}" for index, trace in failures)


@pytest.mark.parametrize("row", [row for row in ALL_ROWS if row["language"] == "sql"], ids=request)
def test_sql_answers_run_on_the_tables_of_the_request(row):
    database = sqlite3.connect(":memory:")
    for name, columns in re.findall(r"(\w+)\(([\w, ]+)\)", request(row)):
        database.execute(f"CREATE TABLE {name} ({columns})")
    statements = [part for part in final_code(row).split(";") if part.strip()]
    results = [values for statement in statements for values in database.execute(statement)]
    printed = "".join("|".join(map(str, values)) + "\n" for values in results)
    assert printed == (row["output"] or "")
