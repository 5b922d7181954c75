import gzip
import json
from collections import Counter
from itertools import islice

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ultrafuser.errors import DataError
from ultrafuser.modeling.templates import EncodedConversation
from ultrafuser.training.data import (
    BalancedBatchSampler,
    ConversationDataset,
    load_domain_conversations,
    read_conversations,
)

QUESTION = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(path, *rows):
    path.write_text("".join(row + "\n" if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [QUESTION, ANSWER], "id": 7}, [QUESTION, ANSWER]),
        ({"messages": [SYSTEM, QUESTION, ANSWER | {"extra": 1}]}, [SYSTEM, QUESTION, ANSWER]),
        (
            {"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
            [QUESTION, ANSWER],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "user", "value": "1+1?"},
                    {"from": "assistant", "value": "2"},
                ]
            },
            [SYSTEM, QUESTION, ANSWER],
        ),
        ({"conversations": [QUESTION, ANSWER]}, [QUESTION, ANSWER]),
        ({"instruction": "1+1?", "output": "2", "source": "x"}, [QUESTION, ANSWER]),
        ({"instruction": "1+1?", "input": "", "output": "2"}, [QUESTION, ANSWER]),
        ({"instruction": "1+1?", "input": None, "output": "2"}, [QUESTION, ANSWER]),
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            [{"role": "user", "content": "Add.\n\n1 1"}, ANSWER],
        ),
        ({"instruction": "1+1?", "response": "2"}, [QUESTION, ANSWER]),
        ({"prompt": "1+1?", "completion": "2"}, [QUESTION, ANSWER]),
        ({"prompt": "1+1?", "response": "2", "input": "not part of this form"}, [QUESTION, ANSWER]),
    ],
)
def test_every_form_is_read(tmp_path, row, messages):
    assert read_conversations(write(tmp_path / "a.jsonl", row)) == [messages]


def test_gzip_and_blank_lines(tmp_path):
    row = json.dumps({"prompt": "größer?\u2028", "completion": "ja"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(f"\ufeff{row}\n\n  \n{row}".encode()))
    assert [chat[0]["content"] for chat in read_conversations(path)] == ["größer?\u2028"] * 2


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('{"prompt": ', "expected one JSON object in UTF-8"),
        ("[1]", "expected a JSON object, got list"),
        ({}, "got the fields (none)"),
        ({"text": "x"}, "got the fields text"),
        ({"output": "x"}, "got the fields output"),
        ({"instruction": "x"}, "a row with instruction must also have output or response"),
        ({"prompt": "x"}, "a row with prompt must also have completion or response"),
        ({"prompt": "x", "completion": ""}, "the assistant message must not be empty"),
        ({"prompt": "x", "completion": " \n"}, "the assistant message must not be empty"),
        ({"prompt": "", "completion": "x"}, "the user message must not be empty"),
        ({"prompt": "x", "completion": None}, "completion must be text, got NoneType"),
        ({"prompt": [QUESTION], "completion": "x"}, "prompt must be text, got list"),
        ({"instruction": "x", "input": 3, "output": "x"}, "input must be text, got int"),
        ({"prompt": "x", "completion": "\ud800"}, "surrogate"),
        ({"messages": "x"}, "messages must be a list of messages, got str"),
        ({"messages": []}, "at least one message"),
        ({"messages": ["x"]}, "messages[0] must be an object"),
        ({"messages": [QUESTION, {"role": "assistant"}]}, "messages[1] must be an object"),
        (
            {"messages": [QUESTION, ANSWER | {"content": 2}]},
            "message 1 must have text as its content, got int",
        ),
        ({"messages": [QUESTION]}, "the last message must have the role 'assistant'"),
        ({"messages": [QUESTION, ANSWER, QUESTION]}, "the last message must have the role 'assistant'"),
        ({"messages": [ANSWER, QUESTION]}, "message 0 must have the role 'user', got 'assistant'"),
        ({"messages": [QUESTION, ANSWER | {"role": "tool"}]}, "message 1 must have the role 'assistant'"),
        ({"messages": [QUESTION, ANSWER | {"role": []}]}, "message 1 must have the role 'assistant', got []"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0]: from must be one of human"),
    ],
)
def test_every_malformed_row_is_named(tmp_path, row, problem):
    path = write(tmp_path / "a.jsonl", {"prompt": "x", "completion": "y"}, "", row)
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert problem in str(caught.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"prompt": "größer"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.jsonl:1: expected one JSON object in UTF-8"):
        read_conversations(path)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"expected a \.jsonl"):
        read_conversations(write(tmp_path / "a.csv", "x"))
    with pytest.raises(DataError, match="empty file"):
        read_conversations(write(tmp_path / "a.jsonl", "", ""))
    (tmp_path / "a.jsonl.gz").write_text("not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "a.jsonl.gz")
    whole = gzip.compress(b'{"prompt": "x", "completion": "y"}\n' * 9)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "cut.jsonl.gz")
    (tmp_path / "bad.jsonl.gz").write_bytes(whole[:10] + b"\xff" * 20)
    with pytest.raises(DataError, match="cannot be read"):
        read_conversations(tmp_path / "bad.jsonl.gz")


def test_domains_join_their_files(tmp_path):
    rows = [{"prompt": str(i), "completion": "x"} for i in range(3)]
    one, two = write(tmp_path / "1.jsonl", *rows[:2]), write(tmp_path / "2.jsonl", rows[2])
    domains = load_domain_conversations({"text": [one, two], "code": [two]})
    assert [chat[0]["content"] for chat in domains["text"]] == ["0", "1", "2"]
    assert len(domains["code"]) == 1
    with pytest.raises(DataError, match=r"data\.math must name at least one file"):
        load_domain_conversations({"text": [one], "math": []})


def test_dataset():
    rows = [EncodedConversation(([i],), ([0],), [i]) for i in range(3)]
    dataset = ConversationDataset(rows, {"text": 2, "code": 1})
    assert len(dataset) == 3
    assert dataset[2] is rows[2]
    sampler = BalancedBatchSampler(dataset.domain_sizes, examples_per_domain=1, num_batches=4)
    batches = list(DataLoader(dataset, batch_sampler=sampler, collate_fn=list))
    assert [[row.labels[0] for row in batch] for batch in batches] == list(sampler)
    with pytest.raises(DataError, match="add up"):
        ConversationDataset(rows, {"text": 2})


def domain_of(index, sizes):
    """The domain's number and the row within it."""
    for number, size in enumerate(sizes):
        if index < size:
            return number, index
        index -= size
    raise AssertionError("index beyond all domains")


sizes_lists = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(sizes=sizes_lists, examples=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_batches_are_balanced_and_no_row_repeats_within_a_pass(sizes, examples, seed):
    named = {f"d{i}": size for i, size in enumerate(sizes)}
    sampler = BalancedBatchSampler(named, examples_per_domain=examples, num_batches=20, seed=seed)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 20
    streams = [[] for _ in sizes]
    for batch in batches:
        located = [domain_of(index, sizes) for index in batch]
        assert Counter(number for number, _ in located) == dict.fromkeys(range(len(sizes)), examples)
        for number, row in located:
            streams[number].append(row)
    for size, stream in zip(sizes, streams, strict=True):
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))
        assert len(set(stream[len(stream) // size * size :])) == len(stream) % size


def make_sampler(**settings):
    defaults = {"examples_per_domain": 3, "num_batches": 24, "seed": 5}
    return BalancedBatchSampler({"text": 40, "code": 7, "math": 2}, **(defaults | settings))


def test_a_batch_depends_on_the_seed_and_its_number_alone():
    batches = list(make_sampler())
    assert list(make_sampler()) == batches
    assert list(make_sampler(seed=6)) != batches
    assert [make_sampler().batch(k) for k in (23, 0, 11)] == [batches[k] for k in (23, 0, 11)]
    assert list(islice(make_sampler(num_batches=100), 24)) == batches


def test_passes_and_domains_of_one_size_are_shuffled_apart():
    sampler = BalancedBatchSampler({"a": 30, "b": 30}, examples_per_domain=30, num_batches=2)
    first, second = sampler
    assert first[0::2] != second[0::2]
    assert first[0::2] != [index - 30 for index in first[1::2]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("balanced", [True, False])
def test_processes_together_see_the_single_process_stream(world, balanced):
    single = list(make_sampler(balanced=balanced))
    shards = [
        list(BatchSamplerShard(make_sampler(balanced=balanced), num_processes=world, process_index=rank))
        for rank in range(world)
    ]
    assert [batch for step in zip(*shards, strict=True) for batch in step] == single


def test_splitting_a_batch_over_processes_keeps_it_balanced():
    shards = [
        list(BatchSamplerShard(make_sampler(), num_processes=3, process_index=rank, split_batches=True))
        for rank in range(3)
    ]
    for step in zip(*shards, strict=True):
        for part in step:
            assert Counter(domain_of(index, [40, 7, 2])[0] for index in part) == {0: 1, 1: 1, 2: 1}


def test_not_balanced_draws_from_all_rows_alike():
    batches = list(make_sampler(balanced=False, num_batches=49))
    assert {len(batch) for batch in batches} == {9}
    drawn = Counter(index for batch in batches for index in batch)
    assert drawn == dict.fromkeys(range(49), 9)  # 49 batches of 9 are 9 passes over 49 rows


@pytest.mark.parametrize(
    ("sizes", "settings", "problem"),
    [
        ({}, {}, "at least one domain"),
        ({"text": 3, "code": 0}, {}, r"data\.code must hold at least one example"),
        ({"text": 3}, {"examples_per_domain": 0}, "examples_per_domain must be at least 1, got 0"),
        ({"text": 3}, {"num_batches": -1}, "num_batches must be at least 0, got -1"),
        ({"text": 3}, {"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_sampler_settings_are_checked(sizes, settings, problem):
    with pytest.raises(DataError, match=problem):
        BalancedBatchSampler(sizes, **({"examples_per_domain": 1, "num_batches": 1} | settings))
