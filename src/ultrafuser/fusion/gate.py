"""The gate: last hidden states of the specialists -> how much each one's logits count, token by token.

Paper, section 3.1: two linear layers with a ReLU between them, hidden size 512, one score per specialist, softmax
over the specialists. The paper shares one gate among all specialists; the other two forms are ours.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ultrafuser.errors import UltrafuserError

GateForm = Literal["shared", "per_specialist", "joint"]
GATE_FORMS: tuple[GateForm, ...] = get_args(GateForm)


class Gate(nn.Module):
    """Scores every specialist from its hidden state and normalises over the specialists.

    Forms:
        shared: one network reads each specialist's hidden state and gives its score (the paper's). All hidden sizes
            must be equal.
        per_specialist: each specialist has a network of its own; hidden sizes may differ.
        joint: one network reads all hidden states side by side and gives all scores; hidden sizes may differ.

    The last layer starts at zero, so an untrained gate is exactly the uniform average.
    Parameters and arithmetic are float32 whatever the specialists use: the gate is tiny and its softmax decides.

    Args:
        hidden_sizes: H of each specialist, in order; its length is N.
        gate_size: width of the hidden layer (paper: 512).
        form: one of `GATE_FORMS`.
        dropout: probability, in [0, 1), that an entry of a hidden state is left out in training mode (paper: 0).

    Raises:
        UltrafuserError: unknown form, no specialist, a width below 1, a dropout out of range, or a shared gate over
            unequal hidden sizes.
    """

    def __init__(
        self,
        hidden_sizes: Sequence[int],
        gate_size: int = 512,
        form: GateForm = "shared",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(hidden_sizes, gate_size, form)
        if not 0 <= dropout < 1:
            raise UltrafuserError(f"gate.dropout must be at least 0 and below 1, got {dropout}.")
        self.hidden_sizes = tuple(hidden_sizes)
        self.gate_size = gate_size
        self.form = form
        num_specialists = len(hidden_sizes)
        if form == "shared":
            networks = [_network(hidden_sizes[0], gate_size, 1)]
        elif form == "per_specialist":
            networks = [_network(size, gate_size, 1) for size in hidden_sizes]
        else:
            networks = [_network(sum(hidden_sizes), gate_size, num_specialists)]
        self.networks = nn.ModuleList(networks)
        self.dropout = nn.Dropout(dropout)

    @property
    def num_specialists(self) -> int:
        """N."""
        return len(self.hidden_sizes)

    def scores(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Unnormalised scores of the specialists.

        Args:
            hidden_states: N tensors, float, (..., H_j), with the same leading shape.

        Returns:
            gate_scores, float32, (..., N).
        """
        states = [self.dropout(state.to(next(self.parameters()).dtype)) for state in hidden_states]
        with torch.autocast(states[0].device.type, enabled=False):
            if self.form == "joint":
                return self.networks[0](torch.cat(states, dim=-1)).float()
            if self.form == "shared":
                return self.networks[0](torch.stack(states, dim=-2)).squeeze(-1).float()
            pairs = zip(self.networks, states, strict=True)
            return torch.cat([network(state) for network, state in pairs], dim=-1).float()

    def forward(self, hidden_states: Sequence[Tensor]) -> Tensor:
        """Weights of the specialists.

        Args:
            hidden_states: N tensors, float, (..., H_j), with the same leading shape.

        Returns:
            gate_weights, float32, (..., N), non-negative, summing to 1 over the last dimension.

        Raises:
            UltrafuserError: another number of hidden states than N.
        """
        if len(hidden_states) != self.num_specialists:
            raise UltrafuserError(
                f"gate: expected hidden states of {self.num_specialists} specialists, got {len(hidden_states)}. "
                "Build the gate for the same specialists as the bank."
            )
        return self.scores(hidden_states).softmax(dim=-1)


def _network(in_size: int, gate_size: int, out_size: int) -> nn.Sequential:
    first, last = nn.Linear(in_size, gate_size), nn.Linear(gate_size, out_size)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(first, nn.ReLU(), last)


def _check(hidden_sizes: Sequence[int], gate_size: int, form: str) -> None:
    if form not in GATE_FORMS:
        raise UltrafuserError(f"gate.form must be one of {', '.join(GATE_FORMS)}, got {form!r}.")
    if not hidden_sizes:
        raise UltrafuserError("gate: at least one specialist is needed, got none.")
    if gate_size < 1:
        raise UltrafuserError(f"gate.size must be at least 1, got {gate_size}.")
    if form == "shared" and len(set(hidden_sizes)) > 1:
        raise UltrafuserError(
            f"gate.form shared needs equal hidden sizes, got {list(hidden_sizes)}. "
            "Use per_specialist or joint for specialists of different widths."
        )
