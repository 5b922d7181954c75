"""Stage 1 without running the specialists again: their hidden states, kept on disk.

Frozen specialists give the same states every time, and stage 1 looks at every conversation many times. So
they run once over the data; afterwards a step is gate, head and loss only.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ultrafuser.files import atomic_write
from ultrafuser.fusion.loss import IGNORE_INDEX
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.templates import ConversationEncoder, EncodedConversation
from ultrafuser.training.inputs import describe_specialists, describe_tokens

_ROWS_PER_FILE = 128
_TOKENS_PER_PASS = 2048


@dataclass(frozen=True)
class StateCache:
    """Where cached states are, and what they cost.

    Attributes:
        folder: that `StateDataset` reads.
        seconds: spent now on making them; 0 when states of the same specialists and conversations were found.
        num_bytes: on disk.
    """

    folder: Path
    seconds: float
    num_bytes: int


class StateDataset(Dataset[dict[str, Any]]):
    """Hidden states and labels of encoded conversations, read from a folder that `cache_states` wrote.

    A row is `{"states": [N tensors (R, H_j)], "labels": (R,)}`.
    """

    def __init__(self, folder: Path, conversations: Sequence[EncodedConversation]) -> None:
        self._conversations = conversations
        files = sorted(folder.glob("states-*.safetensors"))
        self._files = [safe_open(path, framework="pt") for path in files]
        self._num_specialists = len(conversations[0].input_ids)

    def __len__(self) -> int:
        return len(self._conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file = self._files[index // _ROWS_PER_FILE]
        states = [file.get_tensor(f"{index}.{specialist}") for specialist in range(self._num_specialists)]
        return {"states": states, "labels": torch.tensor(self._conversations[index].labels)}


def collate_states(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pad rows of a `StateDataset` into a batch.

    Returns:
        `specialist_hidden_states`: N tensors (B, R, H_j); `labels`: int64 (B, R), padded with -100.
    """
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
    per_specialist = zip(*(row["states"] for row in rows), strict=True)
    states = [pad_sequence(list(column), batch_first=True) for column in per_specialist]
    return {"specialist_hidden_states": states, "labels": labels}


def cache_states(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    conversations: Sequence[EncodedConversation],
    folder: Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> StateCache:
    """Run the specialists over all conversations and keep their states at the response positions.

    Args:
        model: with the specialists to run; nothing is trained.
        encoder: that encoded the conversations.
        conversations: in the order of the dataset.
        folder: where the states go, in a folder of their own; states of the same specialists and conversations
            that lie there are used again.
        on_progress: called with (conversations done, all).

    Returns:
        Where they are, and what it cost.
    """
    folder = folder / _fingerprint(model, conversations)
    if folder.is_dir():  # it appears when it is complete
        return StateCache(folder, 0.0, _size(folder))
    start = time.perf_counter()
    model.bank.eval()
    with atomic_write(folder) as scratch:
        scratch.mkdir()
        for number, first in enumerate(range(0, len(conversations), _ROWS_PER_FILE)):
            rows = range(first, min(first + _ROWS_PER_FILE, len(conversations)))
            tensors: dict[str, Tensor] = {}
            for batch in _by_length(conversations, rows):
                tensors.update(_states_of(model, encoder, conversations, batch))
                if on_progress is not None:
                    on_progress(first + len(tensors) // model.num_specialists, len(conversations))
            save_file(tensors, scratch / f"states-{number:05d}.safetensors")
    return StateCache(folder, time.perf_counter() - start, _size(folder))


@torch.no_grad()
def _states_of(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    conversations: Sequence[EncodedConversation],
    rows: Sequence[int],
) -> dict[str, Tensor]:
    batch = encoder.collate([conversations[row] for row in rows])
    batch = {key: tensor.to(model.device) for key, tensor in batch.items() if key != "labels"}
    states = model.hidden_states(**batch)
    return {
        f"{row}.{specialist}": state[index, : len(conversations[row].labels)].cpu().clone()
        for index, row in enumerate(rows)
        for specialist, state in enumerate(states)
    }


def _by_length(conversations: Sequence[EncodedConversation], rows: Sequence[int]) -> list[list[int]]:
    """Rows of like length together: at most `_TOKENS_PER_PASS` tokens a specialist, padding included."""

    def length(row: int) -> int:
        return max(len(ids) for ids in conversations[row].input_ids)

    batches: list[list[int]] = []
    for row in sorted(rows, key=length):
        if batches and (len(batches[-1]) + 1) * length(row) <= _TOKENS_PER_PASS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _fingerprint(model: UltraFuserForCausalLM, conversations: Sequence[EncodedConversation]) -> str:
    """A digest of what the states depend on, and of how they are laid out: by the specialists' order, too."""
    layout = {"order": list(model.specialist_names), "rows": _ROWS_PER_FILE}
    inputs = {**describe_specialists(model), **describe_tokens(conversations), **layout}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
