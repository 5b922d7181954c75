"""Answers as models give them, and what is checked of responses."""

import json

import jsonschema_rs
import pytest

from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.answers import (
    Instructions,
    SolvedInstruction,
    SubTopics,
    Topics,
    UnreadableError,
    read_json,
    schema_of,
)
from ultrafuser.synthesis.verification import answer_problem, code_problem


@pytest.mark.parametrize(
    "text",
    [
        '{"topics": ["a", "b"]}',
        '["a", "b"]',
        '```json\n{"topics": ["a", "b"]}\n```',
        'Here you are:\n```\n["a", "b"]\n```\nAnything else?',
        'Sure! {"topics": ["a", "b",],} I hope that helps.',
        '{"topics": ["a ", " b"], "note": "more"}',
        'I thought of {this} first. {"topics": ["a", "b"]}',
        '```json\n{"topics": ["a", "b"]}',
    ],
)
def test_json_in_every_dress(text):
    assert read_json(text, Topics).topics == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "no JSON"),
        ("I am sorry.", "no JSON"),
        ('{"topics": ["a", "b"', "no JSON"),
        ('{"topics": "a"}', "topics: "),
        ('{"themes": ["a"]}', "topics: Field required"),
        ("[1, 2]", r"topics\.0"),
        ("[" * 100_000, "."),
        ("x" * 300_000, "300,000 characters"),
    ],
)
def test_what_cannot_be_read(text, problem):
    with pytest.raises(UnreadableError, match=problem):
        read_json(text, Topics)


@pytest.mark.parametrize("kind", [Topics, SubTopics, Instructions, SolvedInstruction])
def test_schemas_are_what_endpoints_want(kind):
    """No references, nothing optional, nothing beyond what is named; and they say what is read."""
    schema = schema_of(kind)
    text = json.dumps(schema)
    assert "$ref" not in text
    assert "$defs" not in text

    def check(part):
        if part.get("type") == "object":
            assert part["additionalProperties"] is False
            assert sorted(part["required"]) == sorted(part["properties"])
            for inner in part["properties"].values():
                check(inner)
        if part.get("type") == "array":
            check(part["items"])

    check(schema)
    examples = {
        Topics: {"topics": ["a"]},
        SubTopics: {"sub_topics": [{"name": "a", "relevance": "b", "use_case": "c"}]},
        Instructions: {"instructions": [{"instruction": "a"}]},
        SolvedInstruction: {"instruction": "a", "reference": "1"},
    }
    assert jsonschema_rs.is_valid(schema, examples[kind])
    assert read_json(json.dumps(examples[kind]), kind).model_dump() == examples[kind]


@pytest.mark.parametrize(
    ("response", "reference", "is_right"),
    [
        ("So it is $\\boxed{42}$.", "42", True),
        ("So it is $\\boxed{\\frac{1}{2}}$.", "0.5", True),
        ("It costs $12 in all. The answer is 12.", "12", True),
        ("So it is $\\boxed{41}$.", "42", False),
        ("I do not know.", "42", False),
        ("It is Tuesday.", "Tuesday", True),  # no number: not judged
    ],
)
def test_final_answers(response, reference, is_right):
    assert (answer_problem(response, reference) is None) == is_right


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ("No code.", None),
        ("```python\nprint(1)\n```", None),
        ("```python\ndef f(x):\n    return x\n```\nand\n```python\nassert f(2) == 2\n```", None),
        ("```python\ndef f(x): return x\nassert f(2) == 3\n```", "ended: AssertionError"),
        ("```py\nprint(\n```", "SyntaxError"),
        ("```\nthis is no Python\n```", None),
        ("```python\nimport no_such_library\n```", None),
        ("```python\nname = input()\n```", None),
        ("```python\nwhile True: print('x' * 1000)\n```", "output"),
    ],
)
def test_code(response, problem):
    found = code_problem(response, Sandbox())
    assert (found is None) if problem is None else (problem in found)
