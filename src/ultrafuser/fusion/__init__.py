"""The idea itself, in plain torch: a gate weighs specialists per token, and their logits are summed.

`gate.py` turns hidden states into gate weights, `mix.py` turns hidden states and weights into fused logits with one
linear map, `loss.py` trains through that map without ever holding (tokens x vocabulary).
"""

from ultrafuser.fusion.gate import GATE_FORMS, Gate
from ultrafuser.fusion.loss import fused_cross_entropy, token_losses
from ultrafuser.fusion.mix import Head, fuse_logits, fused_logits, scale_hidden_states

__all__ = [
    "GATE_FORMS",
    "Gate",
    "Head",
    "fuse_logits",
    "fused_cross_entropy",
    "fused_logits",
    "scale_hidden_states",
    "token_losses",
]
