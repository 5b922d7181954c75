"""What is to be answered, read from the same forms as what is trained on."""

import json

import pytest

from ultrafuser.errors import DataError
from ultrafuser.training.data import read_prompts

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [QUESTION]}, [QUESTION]),
        ({"messages": [QUESTION, ANSWER]}, [QUESTION]),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, [QUESTION, ANSWER, QUESTION]),
        ({"conversations": [{"from": "human", "value": "1+1?"}]}, [QUESTION]),
        ({"instruction": "Add.", "input": "1 1"}, [{"role": "user", "content": "Add.\n\n1 1"}]),
        ({"instruction": "1+1?", "output": "2"}, [QUESTION]),
        ({"prompt": "1+1?"}, [QUESTION]),
        ({"prompt": "1+1?", "completion": ""}, [QUESTION]),
    ],
)
def test_the_answer_is_left_out_where_there_is_one(tmp_path, row, messages):
    (prompt,) = read_prompts(write(tmp_path / "a.jsonl", row))
    assert prompt.messages == messages


def test_rows_keep_their_ids_and_their_place(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "Hi", "id": i} for i in ("x", 0, None, 1.5, True)))
    prompts = read_prompts(path)
    assert [prompt.id for prompt in prompts] == ["x", 0, None, None, None]
    assert [prompt.where for prompt in prompts] == [f"{path}:{line}" for line in range(1, 6)]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [ANSWER]}, "a conversation must be a list"),
        ({"messages": [QUESTION, QUESTION]}, "must have the role 'assistant'"),
        ({"messages": []}, "at least one message"),
        ({"prompt": " "}, "the user message must not be empty"),
        ({"prompt": 3}, "prompt must be text, got int"),
        ({"question": "1+1?"}, "expected messages, conversations"),
    ],
)
def test_malformed_rows_are_named(tmp_path, row, problem):
    path = write(tmp_path / "a.jsonl", {"prompt": "Hi"}, row)
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{problem}"):
        read_prompts(path)
