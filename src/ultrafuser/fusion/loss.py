"""Cross-entropy of the fused distribution that never holds (tokens x vocabulary).

The loss of a chunk of tokens needs the chunk's logits only, and its gradient is known in closed form:
d loss / d logits = softmax(logits) - onehot(label). So each chunk's gradients are formed while its logits are at hand
and the logits are dropped: memory is (chunk x V), for any number of tokens and specialists.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ultrafuser.errors import ShapeError
from ultrafuser.fusion.mix import Head, fused_logits, scale_hidden_states

IGNORE_INDEX = -100
"""Label of positions that carry no loss, as everywhere in Hugging Face."""

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time. Measured in benchmarks/loss.py: larger is no faster, smaller is slower."""


def fused_cross_entropy(
    hidden_states: Sequence[Tensor],
    gate_weights: Tensor,
    heads: Sequence[Head],
    labels: Tensor,
    num_items: int | Tensor | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Mean cross-entropy of the fused distribution on the labelled tokens.

    Args:
        hidden_states: N tensors, float, (..., H_j).
        gate_weights: float32, (..., N).
        heads: N heads, or one head that all specialists share.
        labels: int64, (...), in [0, V) or -100 where there is no loss; aligned with the states that predict them.
        num_items: what the summed loss is divided by; the number of labelled tokens when None. A trainer that
            accumulates gradients passes the count of the whole batch.
        chunk_tokens: tokens whose logits are formed at one time; memory grows with it, the result does not change.

    Returns:
        Scalar, float32, in nats; zero where no token is labelled. Its backward may run once; gradients reach
        hidden_states, gate_weights and the heads' weights and biases.

    Raises:
        ShapeError: labels do not have the leading shape of the states, or are no tokens.

    Reference: paper, algorithm 1 and appendix B.
    """
    if labels.shape != gate_weights.shape[:-1]:
        raise ShapeError(
            f"labels {tuple(labels.shape)} must have the leading shape of gate_weights {tuple(gate_weights.shape)}."
        )
    keep = labels != IGNORE_INDEX
    labels_R = labels[keep]
    _check_labels(labels_R, heads[0].weight.shape[0])
    states = [state[keep] for state in hidden_states]
    inputs, head_weights = scale_hidden_states(states, gate_weights[keep], heads)
    total = _summed_cross_entropy(labels_R, chunk_tokens, inputs, head_weights)
    return total / (max(labels_R.numel(), 1) if num_items is None else num_items)


def _check_labels(labels_R: Tensor, vocab_size: int) -> None:
    if labels_R.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(labels_R))
    if low < 0 or high >= vocab_size:  # a negative one would otherwise count from the end
        raise ShapeError(
            f"labels must lie in [0, {vocab_size}) or be {IGNORE_INDEX}, got values from {low} to {high}. "
            "Encode them with the specialists' tokenizer."
        )


def _summed_cross_entropy(
    labels_R: Tensor, chunk_tokens: int, inputs: Sequence[Tensor], weights: Sequence[Tensor]
) -> Tensor:
    factors = [*inputs, *weights]
    device = labels_R.device.type
    if not torch.is_grad_enabled():
        factors = [factor.detach() for factor in factors]  # so that no gradients are formed
    if torch.is_autocast_enabled(device):
        factors = [factor.to(torch.get_autocast_dtype(device)) for factor in factors]
    with torch.autocast(device, enabled=False):
        return _ChunkedCrossEntropy.apply(labels_R, chunk_tokens, len(inputs), *factors)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits = sum_m inputs[m] @ weights[m].T; forward already forms the gradients."""

    @staticmethod
    def forward(ctx: Any, labels: Tensor, chunk_tokens: int, num_factors: int, *factors: Tensor) -> Tensor:
        inputs, weights = factors[:num_factors], factors[num_factors:]
        wanted = ctx.needs_input_grad[3:]
        input_grads = [torch.empty_like(x) if want else None for x, want in zip(inputs, wanted, strict=False)]
        weight_grads = [
            torch.zeros_like(w, dtype=torch.float32) if want else None
            for w, want in zip(weights, wanted[num_factors:], strict=True)
        ]
        total = torch.zeros((), dtype=torch.float32, device=labels.device)
        for rows, logits, gradient in _chunks(labels.numel(), chunk_tokens, inputs[0], weights[0].shape[0]):
            _logits_into(logits, [x[rows] for x in inputs], weights)
            total += _loss_and_gradient(logits, labels[rows], gradient, any(wanted))
            residual = gradient if gradient.dtype == logits.dtype else logits.copy_(gradient)
            for x, w, x_grad, w_grad in zip(inputs, weights, input_grads, weight_grads, strict=True):
                if x_grad is not None:
                    torch.mm(residual, w, out=x_grad[rows])
                if w_grad is not None:
                    _add_product(w_grad, residual.t(), x[rows])
        grads = [*input_grads, *weight_grads]
        ctx.present = [grad is not None for grad in grads]
        ctx.dtypes = [tensor.dtype for tensor in factors]
        ctx.save_for_backward(*(grad for grad in grads if grad is not None))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        grads = [
            next(saved).mul_(grad_output).to(dtype) if present else None  # in place: heads are large
            for present, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return None, None, None, *grads


def _chunks(
    num_tokens: int, chunk_tokens: int, like: Tensor, vocab_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of every chunk, room for their logits in the dtype of `like` and for the gradient in float32, (C, V).

    All chunks share the room: fresh memory for each would be mapped and cleared anew.
    """
    size = min(chunk_tokens, num_tokens)
    logits = like.new_empty(size, vocab_size)
    gradient = torch.empty_like(logits, dtype=torch.float32)
    for start in range(0, num_tokens, chunk_tokens):
        count = min(size, num_tokens - start)
        yield slice(start, start + count), logits[:count], gradient[:count]


def _logits_into(logits: Tensor, inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    torch.mm(inputs[0], weights[0].t(), out=logits)
    for x, w in zip(inputs[1:], weights[1:], strict=True):
        torch.addmm(logits, x, w.t(), out=logits)


def _loss_and_gradient(logits: Tensor, labels: Tensor, gradient: Tensor, wanted: bool) -> Tensor:
    """The summed loss of logits (C, V); if wanted, d(summed loss)/d(logits) is left in `gradient`, float32."""
    rows = torch.arange(labels.numel(), device=labels.device)
    log_probs = torch.log_softmax(logits, -1, dtype=torch.float32, out=gradient)
    loss = -log_probs[rows, labels].sum()
    if wanted:
        log_probs.exp_()[rows, labels] -= 1.0
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to total, without a temporary where the dtypes agree."""
    if total.dtype == right.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        total += left @ right


@torch.no_grad()
def token_losses(
    hidden_states: Sequence[Tensor],
    gate_weights: Tensor,
    heads: Sequence[Head],
    labels: Tensor,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Negative log-probability of every label under the fused distribution, without gradients.

    A one-hot `gate_weights` gives one specialist's own losses, 1/N everywhere the uniform average's.

    Args:
        hidden_states: N tensors, float, (R, H_j).
        gate_weights: float32, (R, N).
        heads: N heads, or one shared head.
        labels: int64, (R,), in [0, V).
        chunk_tokens: tokens whose logits are formed at one time.

    Returns:
        float32, (R,), nats.
    """
    losses = []
    for start in range(0, labels.numel(), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = fused_logits([state[rows] for state in hidden_states], gate_weights[rows], heads).float()
        chosen = logits.gather(-1, labels[rows].unsqueeze(-1)).squeeze(-1)
        losses.append(logits.logsumexp(-1) - chosen)
    return torch.cat(losses) if losses else labels.new_zeros(0, dtype=torch.float32)
