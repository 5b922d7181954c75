"""Generation: a slow loop that defines what is right, and an engine that gives the same faster."""

from ultrafuser.decoding.conversation import DecodingStats
from ultrafuser.decoding.engine import FusedDecoder, TokenStep
from ultrafuser.decoding.reference import reference_tokens
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.decoding.speculation import SpeculationParams

__all__ = [
    "DecodingStats",
    "FusedDecoder",
    "SamplingParams",
    "SpeculationParams",
    "TokenStep",
    "reference_tokens",
]
