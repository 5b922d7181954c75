"""Measuring a fused model on conversations: the losses of every row and the gate weights, token by token.

The specialists read every conversation once. From their hidden states come the loss of each specialist alone,
of the uniform average and of the fused model, and the gate weights. Sums are kept, and a few responses whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ultrafuser.analysis.traces import FUSED, UNIFORM, Measurement, TokenTrace, loss_rows
from ultrafuser.decoding.text import token_texts
from ultrafuser.errors import UltrafuserError, located
from ultrafuser.fusion import token_losses
from ultrafuser.fusion.loss import IGNORE_INDEX
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.templates import Conversation, ConversationEncoder, EncodedConversation

MAX_SAMPLES = 100
"""Samples of a domain whose mean weights are kept: the columns of the paper's heat map."""


def measure(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    conversations: Mapping[str, Sequence[Conversation]],
    *,
    batch_tokens: int = 4096,
    keep_traces: int = 20,
    too_long: Literal["truncate", "error"] = "error",
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Measure losses and gate weights on conversations of several domains.

    Every response token of a domain counts the same in the means, whichever conversation it is in.

    Args:
        model: the fused model; it is left in the mode (training or evaluation) it came in.
        encoder: for the model's specialists, in their order.
        conversations: domain -> conversations, each ending with an assistant message.
        batch_tokens: tokens that all specialists together read at once, padding included, as long as that
            allows one conversation.
        keep_traces: conversations of each domain, from its first on, that are kept token by token.
        too_long: what to do with a conversation that a specialist cannot read whole: see
            `ConversationEncoder.encode`.
        progress: called with the response tokens done and their total after every batch.

    Returns:
        The measurement, with `sample_weights` of the first 100 conversations of every domain.

    Raises:
        UltrafuserError: there is no domain or an empty one, the encoder is for other specialists, or a loss
            is not finite.
        TemplateError: a conversation cannot be encoded or, with "error", is too long.
    """
    _check(model, encoder, conversations)
    samples = [
        _Sample(
            domain,
            index,
            _encoded(encoder, messages, too_long, f"data.{domain}, conversation {index + 1}"),
            messages,
        )
        for domain, rows in conversations.items()
        for index, messages in enumerate(rows)
    ]
    total = sum(len(sample.encoded.labels) for sample in samples)
    sums = {domain: _DomainSums() for domain in conversations}
    done = 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(samples, batch_tokens):
            measured = _measure_batch(model, encoder, [sample.encoded for sample in batch])
            for sample, (weights, losses) in zip(batch, measured, strict=True):
                trace = None
                if sample.index < keep_traces:
                    trace = _trace(sample, encoder, weights, losses)
                sums[sample.domain].add(sample.index, weights, losses, trace)
            done += sum(len(sample.encoded.labels) for sample in batch)
            if progress is not None:
                progress(done, total)
    finally:
        model.train(was_training)
    return _summed_up(model.specialist_names, sums)


def _encoded(
    encoder: ConversationEncoder, messages: Conversation, too_long: Literal["truncate", "error"], where: str
) -> EncodedConversation:
    with located(where):
        return encoder.encode(messages, too_long=too_long)


@dataclass(frozen=True, slots=True)
class _Sample:
    domain: str
    index: int
    encoded: EncodedConversation
    messages: Conversation


@dataclass(slots=True)
class _DomainSums:
    """What is kept of one domain while it is measured."""

    num_tokens: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    weights: NDArray[np.float64] | float = 0.0
    sample_weights: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    traces: dict[int, TokenTrace] = field(default_factory=dict)

    def add(
        self,
        index: int,
        weights: NDArray[np.float32],
        losses: dict[str, NDArray[np.float32]],
        trace: TokenTrace | None,
    ) -> None:
        self.num_tokens += len(weights)
        self.weights = self.weights + weights.sum(axis=0, dtype=np.float64)
        for row, values in losses.items():
            self.losses[row] = self.losses.get(row, 0.0) + float(values.sum(dtype=np.float64))
        if index < MAX_SAMPLES:
            self.sample_weights[index] = weights.mean(axis=0, dtype=np.float64)
        if trace is not None:
            self.traces[index] = trace


def _check(
    model: UltraFuserForCausalLM,
    encoder: ConversationEncoder,
    conversations: Mapping[str, Sequence[Conversation]],
) -> None:
    if encoder.names != tuple(model.specialist_names):
        raise UltrafuserError(
            f"the encoder is for the specialists {', '.join(encoder.names)}, but the model has "
            f"{', '.join(model.specialist_names)}. Build it from the model's own configuration."
        )
    loss_rows(model.specialist_names)  # refuses names that clash with the other rows
    if not conversations:
        raise UltrafuserError("a measurement needs at least 1 domain, got none. Give data with responses.")
    for domain, rows in conversations.items():
        if not rows:
            raise UltrafuserError(f"data.{domain} must hold at least 1 conversation, got none.")


def _batches(samples: Sequence[_Sample], batch_tokens: int) -> Iterator[list[_Sample]]:
    """Samples of like length together, the longest first: what does not fit into memory fails at once."""
    longest_first = sorted(samples, key=lambda sample: -_length(sample))
    batch: list[_Sample] = []
    for sample in longest_first:
        if batch and (len(batch) + 1) * _length(batch[0]) * len(sample.encoded.input_ids) > batch_tokens:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def _length(sample: _Sample) -> int:
    return max(map(len, sample.encoded.input_ids))


@torch.no_grad()
def _measure_batch(
    model: UltraFuserForCausalLM, encoder: ConversationEncoder, batch: Sequence[EncodedConversation]
) -> list[tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]]:
    """For every conversation its gate weights (R, N) and, by row, its losses (R,)."""
    inputs = {name: tensor.to(model.device) for name, tensor in encoder.collate(batch).items()}
    labels = inputs.pop("labels")
    keep = labels != IGNORE_INDEX  # rows keep their order, so conversations follow one another
    states = [state[keep] for state in model.hidden_states(**inputs)]
    weights = model.gate(states)
    losses = _row_losses(model, states, weights, labels[keep])
    lengths = [len(conversation.labels) for conversation in batch]
    weights_of = [part.cpu().numpy() for part in weights.split(lengths)]
    losses_of: list[dict[str, NDArray[np.float32]]] = [{} for _ in batch]
    for row, values in losses.items():
        for mine, part in zip(losses_of, values.split(lengths), strict=True):
            mine[row] = part.cpu().numpy()
    return list(zip(weights_of, losses_of, strict=True))


def _row_losses(
    model: UltraFuserForCausalLM, states: Sequence[Tensor], weights: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Loss of every label, (R,), under each row of the loss table."""
    heads, names = model.bank.heads(), model.specialist_names
    alone = weights.new_ones(len(labels), 1)
    losses = {
        # A one-hot gate gives the same; this spares the heads that it would multiply by zero.
        name: token_losses([state], alone, [heads[index if len(heads) > 1 else 0]], labels)
        for index, (name, state) in enumerate(zip(names, states, strict=True))
    }
    uniform = torch.full_like(weights, 1 / len(names))
    losses[UNIFORM] = token_losses(states, uniform, heads, labels)
    losses[FUSED] = token_losses(states, weights, heads, labels)
    for row, values in losses.items():
        if not bool(values.isfinite().all()):
            raise UltrafuserError(f"the losses of {row} are not finite. Load the model in float32 (dtype).")
    return losses


def _trace(
    sample: _Sample,
    encoder: ConversationEncoder,
    weights: NDArray[np.float32],
    losses: dict[str, NDArray[np.float32]],
) -> TokenTrace:
    asked = [message["content"] for message in sample.messages if message["role"] != "assistant"]
    return TokenTrace(
        domain=sample.domain,
        prompt="\n\n".join(asked),
        tokens=tuple(token_texts(encoder.tokenizer, sample.encoded.labels)),
        gate_weights=weights,
        losses=losses,
    )


def _summed_up(specialists: Sequence[str], sums: Mapping[str, _DomainSums]) -> Measurement:
    return Measurement(
        specialists=tuple(specialists),
        domains=tuple(sums),
        losses={
            row: {domain: mine.losses[row] / mine.num_tokens for domain, mine in sums.items()}
            for row in loss_rows(specialists)
        },
        weights={
            domain: dict(zip(specialists, np.divide(mine.weights, mine.num_tokens).tolist(), strict=True))
            for domain, mine in sums.items()
        },
        sample_weights={
            domain: np.stack([mine.sample_weights[index] for index in sorted(mine.sample_weights)])
            for domain, mine in sums.items()
        },
        traces=tuple(mine.traces[index] for mine in sums.values() for index in sorted(mine.traces)),
        num_tokens={domain: mine.num_tokens for domain, mine in sums.items()},
    )
