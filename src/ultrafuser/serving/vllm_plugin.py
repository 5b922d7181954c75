"""What vLLM has to know of fused models before it loads one; vLLM calls `register` in each of its processes.

The entry point is `vllm.general_plugins` in pyproject.toml. The model itself is in `vllm_model.py`.
"""

from typing import Any

from transformers import PretrainedConfig
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)

from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling import sources
from ultrafuser.modeling.configuration import UltraFuserConfig, shared_template
from ultrafuser.modeling.model import UltraFuserForCausalLM

FOLDABLE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types over which vLLM runs adapters folded into the batch; over others they are merged into whole models."""


def register() -> None:
    """Make fused models known to vLLM; as often as it likes."""
    architecture = UltraFuserForCausalLM.__name__
    if architecture in ModelRegistry.models:
        return
    ModelRegistry.register_model(architecture, "ultrafuser.serving.vllm_model:FusedForVllm")
    MODEL_ARCH_CONFIG_CONVERTORS[UltraFuserConfig.model_type] = _Dimensions
    MODELS_CONFIG_MAP[architecture] = _Requirements


def is_folded(config: UltraFuserConfig) -> bool:
    """Whether vLLM runs the specialists as adapters over one base: `bank` says so, and the base's type allows it."""
    return config.bank == "adapters" and config.members[0].architecture().model_type in FOLDABLE


class _Requirements(VerifyAndUpdateConfig):
    """What a fused model must be like to be served by vLLM, which sends one prompt to all specialists."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what cannot be served, before anything is loaded.

        Raises:
            UltrafuserError: the specialists read different templates, or another one than the tokenizer's.
        """
        shared = shared_template(model_config.hf_config)
        if shared is None or model_config.skip_tokenizer_init:
            return
        tokenizer = sources.load_tokenizer(model_config.tokenizer, model_config.tokenizer_revision)
        if tokenizer is not None and tokenizer.chat_template != shared:
            raise UltrafuserError(
                f"the chat template of the tokenizer in {model_config.tokenizer} is not the one that the specialists "
                "read. Write the model anew, with `ultrafuser export MODEL -o DIR`: that puts theirs beside it."
            )


class _Dimensions(ModelArchConfigConvertorBase):
    """The sizes by which vLLM plans: of one model that holds all specialists."""

    def __init__(
        self, hf_config: UltraFuserConfig, hf_text_config: PretrainedConfig, revision: str | None = None
    ) -> None:
        super().__init__(hf_config, hf_text_config, revision)
        self._members = [_of(member.architecture()) for member in hf_config.members]
        self._folds = len(self._members) if is_folded(hf_config) else 1

    def get_num_hidden_layers(self) -> int:
        """Of the deepest specialist."""
        return max(member.get_num_hidden_layers() for member in self._members)

    def get_total_num_attention_heads(self) -> int:
        """Of one attention layer: all adapters' heads side by side, or one whole specialist's."""
        return self._members[0].get_total_num_attention_heads() * self._folds

    def get_total_num_kv_heads(self) -> int:
        """Likewise."""
        return self._members[0].get_total_num_kv_heads() * self._folds

    def get_head_size(self) -> int:
        """Of the first specialist."""
        return self._members[0].get_head_size()

    def get_hidden_size(self) -> int:
        """What the model hands from its layers to the gate: all hidden states side by side."""
        return sum(member.get_hidden_size() for member in self._members)

    def get_vocab_size(self) -> int:
        """Rows that every head has."""
        return min(member.get_vocab_size() for member in self._members)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        """The shortest context among the specialists."""
        return min(member.derive_max_model_len_and_key() for member in self._members)


def _of(architecture: PretrainedConfig) -> ModelArchConfigConvertorBase:
    kind = MODEL_ARCH_CONFIG_CONVERTORS.get(architecture.model_type, ModelArchConfigConvertorBase)
    return kind(architecture, architecture.get_text_config())
