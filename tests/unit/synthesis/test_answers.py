"""Answers as models give them."""

import json
import time

import jsonschema_rs
import pytest

from ultrafuser.synthesis.answers import (
    Instructions,
    SolvedInstruction,
    SolvedInstructions,
    SubTopics,
    Topics,
    UnreadableError,
    read_json,
    schema_of,
)


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
    ("text", "topics"),
    [
        ('{"topics": ["a,]", "b, }"]}', ["a,]", "b, }"]),
        ('{"topics": ["a,]", "b",],}', ["a,]", "b"]),
        ('A 5" pipe, say: {"topics": ["a,]", "say \\",]\\"",],} So.', ["a,]", 'say ",]"']),
        ('{"topics": ["a,]"', None),
    ],
)
def test_strings_keep_their_commas(text, topics):
    if topics is None:
        with pytest.raises(UnreadableError):
            read_json(text, Topics)
    else:
        assert read_json(text, Topics).topics == topics


@pytest.mark.parametrize(
    "text",
    [
        'As in ["x", "y"]: {"topics": ["a", "b"]}',
        'As in ["x", "y"]:\n```json\n{"topics": ["a", "b"]}\n```',
        '```json\n["x", "y"]\n```\nis the form; here it is:\n```json\n{"topics": ["a", "b"]}\n```',
        'So: {"topics": ["a", "b"], "form": "```json\n[]\n```, ```json\n[\\"x\\"]\n```"}',
        'So:\n```json\n{"form": "```json\n[\\"x\\"]\n```", "topics": ["a", "b"],}\n```',
        '{"form": ["x"]} is no form, {"form": ["x"], "topics": ["a", "b"]} is one.',
        "{x}" * 50 + ' {"topics": ["a", "b"]}',
    ],
)
def test_what_was_asked_for_comes_before_other_lists(text):
    assert read_json(text, Topics).topics == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('So: {"themes": ["x"]}', Topics),
        ('So: {"instruction": 1, "form": [{"instruction": "Add.", "reference": "1"}]}', SolvedInstruction),
    ],
)
def test_parts_of_something_else_are_no_answer(text, kind):
    with pytest.raises(UnreadableError, match=r"topics: |instruction: "):
        read_json(text, kind)


@pytest.mark.parametrize("part", ['["', '"\\', "[1,]{", "```json[", '{"a":[', ', "]'])
def test_odd_answers_take_no_long_time(part):
    start_s = time.monotonic()
    with pytest.raises(UnreadableError):
        read_json((part * 100_000)[:199_999] + "x", Topics)
    assert time.monotonic() - start_s < 2


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


@pytest.mark.parametrize(
    ("said", "reference"),
    [("42", "42"), ("0.5", "0.5"), ("-3", "-3"), ('" 1/2 "', "1/2"), ("true", None), ("null", None)],
)
def test_a_final_answer_may_be_a_number(said, reference):
    text = f'{{"instruction": "Add.", "reference": {said}}}'
    if reference is None:
        with pytest.raises(UnreadableError, match=r"reference: .*string"):
            read_json(text, SolvedInstruction)
    else:
        assert read_json(text, SolvedInstruction).reference == reference
        assert read_json(f"[{text}]", SolvedInstructions).instructions[0].reference == reference


@pytest.mark.parametrize(
    ("text", "topics"),
    [
        ('{"topics": ["a", 1, "b", null]}', ["a", "b"]),
        ('["a", {"name": "c"}, "b"]', ["a", "b"]),
        ('[1, "no"] and then ["a", "b"]', ["a", "b"]),  # one that is right as a whole comes first
        ("[1, 2]", None),
    ],
)
def test_one_bad_item_costs_no_other(text, topics):
    for _ in range(2):  # an answer is read more than once
        if topics is None:
            with pytest.raises(UnreadableError):
                read_json(text, Topics)
        else:
            assert read_json(text, Topics).topics == topics


def test_one_bad_instruction_costs_no_other():
    good = [{"instruction": f"Add {number}.", "reference": number} for number in range(9)]
    said = [*good[:4], {"instruction": "Add."}, *good[4:], {"instruction": "Add.", "reference": ["1", "2"]}]
    read = read_json(json.dumps({"instructions": said}), SolvedInstructions).instructions
    assert [one.reference for one in read] == list("012345678")


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
