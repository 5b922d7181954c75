"""Re-verifies the shipped maths conversations: answers, inline arithmetic, variety, separation of files."""

import itertools
import json
import math
import re
from fractions import Fraction
from importlib import resources

import pytest

BUILTINS = (abs, all, any, int, len, map, max, min, range, round, set, sorted, str, sum)
NAMESPACE = {"math": math, "Fraction": Fraction, "itertools": itertools}
NAMESPACE |= {"__builtins__": {function.__name__: function for function in BUILTINS}}

# A chain such as `3 * 4 - 2 = 10` or `84 - 9 * 5 = 84 - 45 = 39`, numbers only; the guards keep out pieces of
# longer expressions with variables, powers or subscripts.
NUMBERS = r"[\d(][\d. ()*/+-]*"
BEFORE, AFTER = r"(?<![-)}^*/+] )(?<![-\w.)}^*/+|(])", r"(?<=[\d)])(?!\w|\.\d| *[-*/+^\\(])"
STATEMENT = re.compile(rf"{BEFORE}({NUMBERS}[-+*/] *{NUMBERS}(?:= *-?{NUMBERS})+){AFTER}")
LATEX = [
    (r"\\frac\{(\d+)\}\{(\d+)\}", r"Fraction(\1, \2)"),
    (r"\\sqrt\{(\d+)\}", r"math.sqrt(\1)"),
    (r"\\pi", "math.pi"),
    (r"(\d)(?=math)", r"\1*"),
]


def load(split):
    path = resources.files("ultrafuser").joinpath("demo", "conversations", f"math.{split}.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SPLITS = {split: load(split) for split in ("train", "heldout")}
ROWS = [pytest.param(row, id=f"{split}-{i}") for split, rows in SPLITS.items() for i, row in enumerate(rows)]


def evaluate(expression):
    return eval(expression, dict(NAMESPACE))


def same(checked, answer):
    if str(checked) == answer:
        return True
    for pattern, replacement in LATEX:
        answer = re.sub(pattern, replacement, answer)
    return not isinstance(checked, (str, tuple)) and math.isclose(checked, evaluate(answer), rel_tol=1e-9)


def arithmetic(text):
    """Yields the sides of every numeric equality that stands in `text`."""
    text = re.sub(r" *\\(?:cdot|times)(?![a-z]) *", " * ", text).replace(r"\div", "/").replace("$", " ")
    text = re.sub(r"\\boxed\{(-?\d+)\}", r"\1", text).replace(")(", ") * (").replace("^", "**")
    for match in STATEMENT.finditer(text):
        yield match.group(1).split("=")


@pytest.mark.parametrize("row", ROWS)
def test_row_is_well_formed_and_right(row):
    assert set(row) == {"form", "messages", "check", "answer"}
    messages = row["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * (2 if row["form"] == "two_turn" else 1)
    assert all(m["content"] == m["content"].strip() != "" for m in messages)
    for message in messages[1::2]:
        for sides in arithmetic(message["content"]):
            values = [evaluate(side) for side in sides]
            assert all(math.isclose(value, values[0], rel_tol=1e-9) for value in values), sides

    response = messages[-1]["content"]
    if row["check"] is None:
        assert row["answer"] is None
        return
    assert same(evaluate(row["check"]), row["answer"])
    assert row["answer"] in response
    if row["form"] == "word_problem":
        assert response.splitlines()[-1] == f"#### {row['answer']}"
    if row["form"] == "competition":
        assert response.count(r"\boxed{") == 1
        assert rf"\boxed{{{row['answer']}}}" in response


@pytest.mark.parametrize(("split", "at_least"), [("train", 60), ("heldout", 20)])
def test_counts_and_forms(split, at_least):
    rows = SPLITS[split]
    assert len(rows) >= at_least
    assert len({row["form"] for row in rows}) >= 8
    assert sum(row["check"] is None for row in rows) <= 0.12 * len(rows)


def test_no_user_message_repeats_within_or_between_files():
    # Without digits, so that one problem with other numbers also counts as a repetition.
    users = [
        re.sub(r"\d+", "#", message["content"].lower())
        for rows in SPLITS.values()
        for row in rows
        for message in row["messages"][::2]
    ]
    assert len(users) == len(set(users))


def test_arithmetic_statements_are_found():
    assert list(arithmetic("so 3 * 4 = 12 and $x + 3 = 5$")) == [["3 * 4 ", " 12"]]
    assert sum(1 for p in ROWS for m in p.values[0]["messages"][1::2] for _ in arithmetic(m["content"])) > 300
