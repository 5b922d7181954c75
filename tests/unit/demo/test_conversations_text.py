"""The text conversations shipped for the demo's gate: well formed, varied, and held-out means held out."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import ultrafuser

FOLDER = Path(ultrafuser.__file__).parent / "demo" / "conversations"
MINIMUM_ROWS = {"train": 60, "heldout": 20}
MAX_OVERLAP = 0.1  # shared word 5-grams over those of the shorter row

Row = dict[str, Any]


def read_rows(split: str) -> list[Row]:
    lines = (FOLDER / f"text.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def word_5grams(row: Row) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", " ".join(m["content"] for m in row["messages"]).lower())
    return set(zip(*(words[i:] for i in range(5)), strict=False))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {split: read_rows(split) for split in MINIMUM_ROWS}


@pytest.mark.parametrize("split", MINIMUM_ROWS)
def test_every_conversation_alternates_and_ends_with_the_assistant(rows, split):
    for row in rows[split]:
        assert set(row) == {"form", "messages"}
        roles = [m["role"] for m in row["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns, row
        assert turns == ["user", "assistant"] * (len(turns) // 2), row


@pytest.mark.parametrize("split", MINIMUM_ROWS)
def test_messages_are_non_empty_prose(rows, split):
    for message in (m for row in rows[split] for m in row["messages"]):
        assert set(message) == {"role", "content"}
        assert message["content"] == message["content"].strip() != ""
        assert "```" not in message["content"]  # code belongs to another specialist's conversations


@pytest.mark.parametrize(("split", "least"), MINIMUM_ROWS.items())
def test_enough_rows_in_enough_forms(rows, split, least):
    assert len(rows[split]) >= least
    assert len({row["form"] for row in rows[split]}) >= 8


@pytest.mark.parametrize("split", MINIMUM_ROWS)
def test_some_conversations_have_a_second_turn_and_some_a_system_message(rows, split):
    roles = [[m["role"] for m in row["messages"]] for row in rows[split]]
    assert any(r.count("user") > 1 for r in roles)
    assert any(r[0] == "system" for r in roles)


def test_no_user_message_occurs_twice(rows):
    messages = [
        m["content"]
        for split in rows.values()
        for row in split
        for m in row["messages"]
        if m["role"] == "user"
    ]
    assert len(messages) == len({" ".join(m.lower().split()) for m in messages})


def test_no_two_conversations_are_nearly_the_same(rows):
    grams = [word_5grams(row) for split in rows.values() for row in split]
    overlaps = [len(a & b) / min(len(a), len(b)) for a, b in combinations(grams, 2)]
    assert max(overlaps) < MAX_OVERLAP
