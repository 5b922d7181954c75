"""UltraFuser: several specialised language models, fused token by token by a small trained gate."""

__version__ = "0.1.0"

from ultrafuser.modeling.assembly import FusedModel, SpecialistSource, fuse
from ultrafuser.modeling.checkpoint import open_fused, save_fused
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.membership import add_specialist, drop_specialist
from ultrafuser.modeling.model import UltraFuserForCausalLM

__all__ = [
    "FusedModel",
    "SpecialistSource",
    "UltraFuserConfig",
    "UltraFuserForCausalLM",
    "add_specialist",
    "drop_specialist",
    "fuse",
    "open_fused",
    "save_fused",
]
