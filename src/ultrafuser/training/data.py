"""Conversations from files, and class-balanced batches of them.

The path: `load_domain_conversations` reads each domain's JSON lines, a `ConversationEncoder` encodes them, a
`ConversationDataset` holds them domain after domain, and a `BalancedBatchSampler` draws batches with the same
number of examples of each domain (paper, section 3.1 and algorithm 1).
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, Sampler

from ultrafuser.errors import DataError
from ultrafuser.modeling.templates import EncodedConversation, conversation_problem

Messages = list[dict[str, str]]

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# Question field -> the fields its answer may be in, first found first served.
_ANSWER_FIELDS = {"instruction": ("output", "response"), "prompt": ("completion", "response")}


def read_conversations(path: str | Path) -> list[Messages]:
    """Read conversations from a JSON lines file, one a line, blank lines left out.

    A row has one of these forms; other fields are ignored:
    `{"messages": [{"role", "content"}, ...]}`; `{"conversations": [{"from", "value"}, ...]}` (or role and
    content); `{"instruction", "input" (optional), "output"}`; `{"prompt", "completion"}`. In the last two the
    answer may also be in `response`. A non-empty `input` follows the instruction after a blank line.

    Args:
        path: A .jsonl or .jsonl.gz file in UTF-8.

    Returns:
        The messages of each row, with the keys role and content; each ends with an assistant message.

    Raises:
        DataError: If the file cannot be read or is empty, or a row is malformed; the message begins with
            file:line.
    """
    return [_checked(_row_messages(row, where), where) for row, where in _rows(Path(path))]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation whose next response is wanted.

    Attributes:
        messages: An optional system message, then user and assistant in turn; the last is the user's.
        id: What the row calls itself in its field `id`, if it does.
        where: Its file:line.
    """

    messages: Messages
    id: str | int | None
    where: str


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read what is to be answered from a JSON lines file, one a line, blank lines left out.

    A row has one of the forms of `read_conversations`. Its answer may be missing; where there is one (the
    last message, when it is the assistant's) it is left out.

    Args:
        path: A .jsonl or .jsonl.gz file in UTF-8.

    Returns:
        The prompts, in the order of the file.

    Raises:
        DataError: As `read_conversations`.
    """
    return [_prompt(row, where) for row, where in _rows(Path(path))]


def load_domain_conversations(
    files: Mapping[str, Sequence[str | Path]], rows: int | None = None, section: str = "data"
) -> dict[str, list[Messages]]:
    """Read every domain's files.

    Args:
        files: Domain name to its files, in a form `read_conversations` reads.
        rows: Keep the first so many conversations of every file; all when None.
        section: Of the recipe that names the files, for messages.

    Returns:
        Domain name to its conversations, files in the order given.

    Raises:
        DataError: If a domain has no files, or a file is malformed.
    """
    for domain, paths in files.items():
        if not paths:
            raise DataError(
                f"{section}.{domain} must name at least one file, got none. Add one or remove the domain."
            )
    return {
        domain: [messages for path in paths for messages in read_conversations(path)[:rows]]
        for domain, paths in files.items()
    }


class ConversationDataset(Dataset[EncodedConversation]):
    """Encoded conversations of all domains, domain after domain.

    Args:
        conversations: The rows, all of the first domain before all of the second, and so on.
        domain_sizes: Domain name to its number of rows, in the same order.

    Raises:
        DataError: If the sizes do not add up to the number of rows.
    """

    def __init__(self, conversations: Sequence[EncodedConversation], domain_sizes: Mapping[str, int]) -> None:
        if sum(domain_sizes.values()) != len(conversations):
            raise DataError(
                f"domain_sizes must add up to the number of conversations, {len(conversations)}, "
                f"got {sum(domain_sizes.values())}."
            )
        self.conversations = conversations
        self.domain_sizes = dict(domain_sizes)

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> EncodedConversation:
        return self.conversations[index]


class BalancedBatchSampler(Sampler[list[int]]):
    """Yields batches of row indices that hold the same number of examples of every domain.

    Each domain is an endless stream of seeded permutations of its rows: a small domain begins anew while a
    large one goes on, and no row comes twice within one pass over its domain. Batch k depends on the seed and
    k alone, so resuming is skipping batches, and processes that take every W-th batch together see the
    single-process stream. Iterating again yields the same batches: one iteration is meant to be one whole
    run.

    Within a batch the domains alternate, so that micro-batches cut from it are as balanced as their size
    allows.

    Args:
        domain_sizes: Domain name to its number of rows, in the order of the rows in the dataset.
        examples_per_domain: Examples of each domain in a batch (paper: 64 in stage 1, 32 in stage 2).
        num_batches: Number of batches to yield.
        seed: Non-negative seed of the permutations.
        balanced: If False, draw the same total number from one stream over all rows (the paper's ablation).

    Raises:
        DataError: If there is no domain, a domain is empty, or a number is out of range.
    """

    def __init__(
        self,
        domain_sizes: Mapping[str, int],
        *,
        examples_per_domain: int,
        num_batches: int,
        seed: int = 0,
        balanced: bool = True,
    ) -> None:
        if not domain_sizes:
            raise DataError("data must have at least one domain, got none.")
        for domain, size in domain_sizes.items():
            if size < 1:
                raise DataError(
                    f"data.{domain} must hold at least one example, got {size}. Add rows or drop it."
                )
        for name, value, least in (
            ("examples_per_domain", examples_per_domain, 1),
            ("num_batches", num_batches, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise DataError(f"{name} must be at least {least}, got {value}.")
        self.num_batches = num_batches
        self.seed = seed
        # accelerate reads these two when it shards a batch sampler over processes.
        self.batch_size = examples_per_domain * len(domain_sizes)
        self.drop_last = False
        sizes = list(domain_sizes.values())
        self.examples_per_domain = examples_per_domain
        self._streams = sizes if balanced else [sum(sizes)]
        self._take = examples_per_domain if balanced else self.batch_size
        # Batches go forward, so a stream needs its current permutation, and its next one where a pass ends.
        self._permutation = lru_cache(maxsize=2 * len(self._streams))(self._draw_permutation)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, range(self.num_batches))

    @property
    def num_streams(self) -> int:
        """Streams that alternate in a batch: the domains, or one when not balanced."""
        return len(self._streams)

    def batch(self, k: int) -> list[int]:
        """Return the row indices of batch k (from 0), without drawing the batches before it."""
        return [
            self._row(stream, position)
            for position in range(k * self._take, (k + 1) * self._take)
            for stream in range(len(self._streams))
        ]

    def _row(self, stream: int, position: int) -> int:
        epoch, offset = divmod(position, self._streams[stream])
        return sum(self._streams[:stream]) + int(self._permutation(stream, epoch)[offset])

    def _draw_permutation(self, stream: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, stream, epoch]).permutation(self._streams[stream])


class MicroBatchSampler(Sampler[list[int]]):
    """Cuts every batch of a `BalancedBatchSampler` for gradient accumulation and processes.

    Each micro-batch holds the same number of examples of every domain, and examples of like length stand
    together, so that little is padding. The loss of the whole batch does not depend on the cut.

    Args:
        batches: The balanced batches.
        num_parts: Micro-batches per batch: accumulation steps times processes.
        lengths: Tokens of every row of the dataset.

    Raises:
        DataError: If the batches cannot be cut evenly.
    """

    def __init__(self, batches: BalancedBatchSampler, num_parts: int, lengths: Sequence[int]) -> None:
        if num_parts < 1 or batches.examples_per_domain % num_parts:
            raise DataError(
                f"examples_per_domain ({batches.examples_per_domain}) must be a multiple of the number of "
                f"micro-batches in a step ({num_parts}: accumulation times processes)."
            )
        self.batches = batches
        self.num_parts = num_parts
        self.batch_size = batches.batch_size // num_parts
        self.drop_last = False
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self.batches) * self.num_parts

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            num_streams = self.batches.num_streams
            streams = [
                sorted(batch[stream::num_streams], key=self._lengths.__getitem__)
                for stream in range(num_streams)
            ]
            size = len(streams[0]) // self.num_parts
            for part in range(self.num_parts):
                yield [row for stream in streams for row in stream[part * size : (part + 1) * size]]


def _rows(path: Path) -> list[tuple[dict[str, Any], str]]:
    """The JSON objects of a file, each with its file:line."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{path}: expected a .jsonl or .jsonl.gz file, got {path.name!r}.")
    opener = gzip.open if path.name.endswith(".gz") else open
    rows = []
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    rows.append((_json_object(line, where), where))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read after line {number}: {error}.") from error
    if not rows:
        raise DataError(f"{path}: expected at least one conversation, got an empty file.")
    return rows


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # also what a decoding error is
        raise DataError(f"{where}: expected one JSON object in UTF-8, got invalid text ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row


def _prompt(row: dict[str, Any], where: str) -> Prompt:
    messages = _row_messages(row, where, answered=False)
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    name = row.get("id")
    usable = isinstance(name, (str, int)) and not isinstance(name, bool)
    return Prompt(_checked(messages, where, last_role="user"), name if usable else None, where)


def _checked(
    messages: Messages, where: str, last_role: Literal["user", "assistant"] = "assistant"
) -> Messages:
    problem = conversation_problem(messages, last_role=last_role)
    if problem is None:
        empty = [m["role"] for m in messages if m["role"] != "system" and not m["content"].strip()]
        problem = f"the {empty[0]} message must not be empty" if empty else None
    if problem is not None:
        raise DataError(f"{where}: {problem}.")
    return messages


def _row_messages(row: dict[str, Any], where: str, answered: bool = True) -> Messages:
    """Bring a row of any known form into messages, to be checked; `answered`: it must have an answer."""
    for field in ("messages", "conversations"):
        if field in row:
            if not isinstance(row[field], list):
                raise DataError(
                    f"{where}: {field} must be a list of messages, got {type(row[field]).__name__}."
                )
            return [_message(item, f"{where}: {field}[{index}]") for index, item in enumerate(row[field])]
    for question, answers in _ANSWER_FIELDS.items():
        if question in row:
            answer = next((field for field in answers if field in row), None)
            if answer is None and answered:
                raise DataError(f"{where}: a row with {question} must also have {' or '.join(answers)}.")
            return _pair(row, question, answer, where)
    raise DataError(
        f"{where}: expected messages, conversations, instruction and output, or prompt and completion, "
        f"got the fields {', '.join(row) if row else '(none)'}."
    )


def _message(item: Any, where: str) -> dict[str, str]:
    """Read a message with role and content, or ShareGPT's from and value."""
    if isinstance(item, dict):
        if {"role", "content"} <= item.keys():
            return {"role": item["role"], "content": item["content"]}
        if {"from", "value"} <= item.keys():
            speaker = item["from"]
            if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
                raise DataError(
                    f"{where}: from must be one of {', '.join(_SHAREGPT_ROLES)}, got {speaker!r}."
                )
            return {"role": _SHAREGPT_ROLES[speaker], "content": item["value"]}
    raise DataError(f"{where} must be an object with role and content, or with from and value.")


def _pair(row: dict[str, Any], question: str, answer: str | None, where: str) -> Messages:
    """Make a one-turn conversation of a question field, its optional `input`, and an answer field, if any."""
    fields = [
        question,
        *([] if answer is None else [answer]),
        *(["input"] if question == "instruction" and row.get("input") is not None else []),
    ]
    for field in fields:
        if not isinstance(row[field], str):
            raise DataError(f"{where}: {field} must be text, got {type(row[field]).__name__}.")
    text = row[question]
    if "input" in fields and row["input"].strip():
        text = f"{text}\n\n{row['input']}"
    asked = {"role": "user", "content": text}
    return [asked] if answer is None else [asked, {"role": "assistant", "content": row[answer]}]
