"""Banks: all specialists run together, behind one interface.

`WholeSpecialists` runs N models side by side. `AdapterSpecialists` runs N LoRA adapters over one base, folded into
the batch (see `lora.py`). Both turn token ids into the last hidden states that gate and heads work on; neither knows
of gates, losses or templates.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache

from ultrafuser.errors import CheckpointError, UltrafuserError
from ultrafuser.fusion.mix import Head, fused_logits
from ultrafuser.modeling.configuration import SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.lora import Adapter, FoldedLinear, fold_adapters, is_target, unfold


class SpecialistBank(nn.Module, ABC):
    """N specialists with one vocabulary.

    Attributes:
        names: of the specialists, in order.
    """

    names: tuple[str, ...]

    @abstractmethod
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: Sequence[DynamicCache] | None = None,
    ) -> list[Tensor]:
        """Run every specialist on its own tokens.

        Args:
            input_ids: int64, (B, N, T).
            attention_mask: int64, (B, N, past + T), or None when nothing is padding.
            position_ids: int64, (B, N, T); None counts from 0.
            caches: what `new_caches` gave, to read from and append to; None runs without.

        Returns:
            Last hidden states, N tensors, (B, T, H_j).
        """

    @abstractmethod
    def new_caches(self) -> list[DynamicCache]:
        """Empty KV caches for one batch."""

    @abstractmethod
    def heads(self) -> list[Head]:
        """The output heads: N, or one that all specialists share."""

    @abstractmethod
    def embeddings(self) -> nn.Module:
        """The first specialist's input embeddings."""

    @abstractmethod
    def state_tensors(self) -> dict[str, Tensor]:
        """Everything the bank owns, under checkpoint names (`specialists.<name>.*`, and `base.*` for adapters)."""

    @abstractmethod
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors under checkpoint names.

        Raises:
            CheckpointError: a tensor is missing, unexpected, or of another shape.
        """

    @abstractmethod
    def merged_tensors(self, name: str) -> dict[str, Tensor]:
        """One specialist as a plain model: tensors under the names of its own architecture."""

    @abstractmethod
    def architectures(self) -> list[PretrainedConfig]:
        """Model configuration of every specialist, in order."""

    @property
    def hidden_sizes(self) -> list[int]:
        """H of every specialist: what its head reads."""
        sizes = [head.weight.shape[1] for head in self.heads()]
        return sizes if len(sizes) == self.num_specialists else sizes * self.num_specialists

    @property
    def context_lengths(self) -> list[int | None]:
        """Tokens every specialist can read at most; None where its configuration names no limit."""
        return [getattr(_text(config), "max_position_embeddings", None) for config in self.architectures()]

    @property
    def num_specialists(self) -> int:
        """N."""
        return len(self.names)

    @property
    def vocab_size(self) -> int:
        """V: rows that every head has."""
        return min(head.weight.shape[0] for head in self.heads())


class WholeSpecialists(SpecialistBank):
    """N whole models, of any architectures, over one vocabulary.

    Args:
        models: name -> model, in the order of the specialists.

    Raises:
        UltrafuserError: a model's logits are not a linear map of its hidden states (soft-capped logits), or the
            models' dtypes differ.
    """

    def __init__(self, models: Mapping[str, PreTrainedModel]) -> None:
        super().__init__()
        self.names = tuple(models)
        for name, model in models.items():
            _check_linear_head(name, model)
        dtypes = {name: str(model.get_output_embeddings().weight.dtype) for name, model in models.items()}
        if len(set(dtypes.values())) > 1:
            raise UltrafuserError(
                f"specialists must have one dtype, got {dtypes}. Set dtype to open them all in one."
            )
        self.models = nn.ModuleList(models.values())
        self._adopted: list[list[FoldedLinear]] = []

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: Sequence[DynamicCache] | None = None,
    ) -> list[Tensor]:
        """See `SpecialistBank.forward`."""
        states = []
        for index, model in enumerate(self.models):
            states.append(
                _run(
                    model,
                    input_ids[:, index],
                    None if attention_mask is None else attention_mask[:, index],
                    None if position_ids is None else position_ids[:, index],
                    None if caches is None else caches[index],
                )
            )
        return states

    def adopt_adapters(
        self, rank: int, alpha: float, target_modules: str | Sequence[str], seed: int = 0
    ) -> None:
        """Give every model a fresh LoRA adapter to train instead of its weights; `merge_adopted` ends that.

        Args:
            rank: of the updates.
            alpha: scaling is alpha / rank.
            target_modules: names of linear layers, or "all-linear".
            seed: of the adapters' random start.
        """
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": target_modules}
        self.requires_grad_(False)
        self._adopted = [
            fold_adapters(model, [Adapter.initial(model, config, seed + index)])
            for index, model in enumerate(self.models)
        ]

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """Low-rank parameters of adopted adapters."""
        for layers in self._adopted:
            for layer in layers:
                yield from (*layer.lora_A, *layer.lora_B)

    def merge_adopted(self) -> None:
        """Merge adopted adapters into their models; nothing where there are none."""
        for model, layers in zip(self.models, self._adopted, strict=False):
            unfold(model, layers)
        self._adopted = []

    def new_caches(self) -> list[DynamicCache]:
        """One cache per model."""
        return [DynamicCache(config=model.config) for model in self.models]

    def heads(self) -> list[Head]:
        """One head per model; rows beyond the smallest vocabulary (padding of the matrix) are left out."""
        heads = [head_of(model) for model in self.models]
        rows = min(head.weight.shape[0] for head in heads)
        return [
            Head(head.weight[:rows], None if head.bias is None else head.bias[:rows], head.scale)
            for head in heads
        ]

    def embeddings(self) -> nn.Module:
        """The first specialist's input embeddings."""
        first: Any = self.models[0]
        return first.get_input_embeddings()

    def state_tensors(self) -> dict[str, Tensor]:
        """`specialists.<name>.<tensor of the model>`; tied tensors stand once."""
        return {
            f"specialists.{name}.{key}": tensor
            for name, model in zip(self.names, self.models, strict=True)
            for key, tensor in _untied_state(model).items()
        }

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `SpecialistBank.load_tensors`."""
        own = self.state_tensors()  # not copies; tied tensors follow
        _check_names(own.keys(), tensors.keys())
        _copy(own, tensors)

    def merged_tensors(self, name: str) -> dict[str, Tensor]:
        """The model's own tensors."""
        return _untied_state(self.models[self.names.index(name)])

    def architectures(self) -> list[PretrainedConfig]:
        """Configuration of every model."""
        return [model.config for model in self.models]


class AdapterSpecialists(SpecialistBank):
    """N LoRA adapters over one base; all rows run through the base together.

    Args:
        base: the model they share; its targeted linear layers are replaced in place.
        adapters: name -> adapter, in the order of the specialists. An adapter without tensors is the bare base.

    Raises:
        CheckpointError: an adapter does not fit the base.
        UltrafuserError: the base's logits are not a linear map of its hidden states.
    """

    def __init__(self, base: PreTrainedModel, adapters: Mapping[str, Adapter]) -> None:
        super().__init__()
        _check_linear_head("base", base)
        self.names = tuple(adapters)
        self.adapter_configs = {name: adapter.explicit_config(base) for name, adapter in adapters.items()}
        self.base = base.requires_grad_(False)
        self._layers = fold_adapters(base, list(adapters.values()))

    @property
    def folded_layers(self) -> list[FoldedLinear]:
        """The layers that carry adapters."""
        return self._layers

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: Sequence[DynamicCache] | None = None,
    ) -> list[Tensor]:
        """See `SpecialistBank.forward`."""
        states = _run(
            self.base,
            _fold(input_ids),
            None if attention_mask is None else _fold(attention_mask),
            None if position_ids is None else _fold(position_ids),
            None if caches is None else caches[0],
        )
        return list(states.unflatten(0, (self.num_specialists, -1)).unbind(0))

    def new_caches(self) -> list[DynamicCache]:
        """One cache with N * B rows."""
        return [DynamicCache(config=self.base.config)]

    def heads(self) -> list[Head]:
        """The base's head, shared by all."""
        return [head_of(self.base)]

    def embeddings(self) -> nn.Module:
        """The base's input embeddings."""
        return self.base.get_input_embeddings()

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's tensors under the names of its own architecture, as if it had no adapters."""
        folded = {id(layer.weight) for layer in self._layers} | {id(layer.bias) for layer in self._layers}
        folded |= {id(p) for layer in self._layers for p in (*layer.lora_A, *layer.lora_B)}
        tensors = {k: t for k, t in _untied_state(self.base, keep_vars=True).items() if id(t) not in folded}
        for layer in self._layers:
            tensors.update(layer.base_tensors())
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """One specialist's adapter, not copied: PEFT names without the `base_model.model.` prefix."""
        index, config = self.names.index(name), self.adapter_configs[name]
        if config is None:
            return {}
        tensors = {}
        for layer in self._layers:
            for path, down, up in layer.lora_tensors():
                if is_target(path, config["target_modules"]):
                    tensors[f"{path}.lora_A.weight"] = down.detach()[index, : config["r"]]
                    tensors[f"{path}.lora_B.weight"] = up.detach()[index, :, : config["r"]]
        return tensors

    def lora_parameters(self) -> Iterator[nn.Parameter]:
        """All low-rank parameters, for stage 2."""
        for layer in self._layers:
            yield from layer.lora_A
            yield from layer.lora_B

    def state_tensors(self) -> dict[str, Tensor]:
        """`base.<tensor>` and `specialists.<name>.<PEFT tensor>`."""
        tensors = {f"base.{key}": tensor for key, tensor in self.base_tensors().items()}
        for name in self.names:
            tensors.update({f"specialists.{name}.{key}": t for key, t in self.adapter_tensors(name).items()})
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """See `SpecialistBank.load_tensors`."""
        own = self.state_tensors()  # views of the joined layers and the stacks
        _check_names(own.keys(), tensors.keys())
        _copy(own, tensors)

    def merged_tensors(self, name: str) -> dict[str, Tensor]:
        """The base with one adapter added to its weights."""
        tensors = self.base_tensors()
        for layer in self._layers:
            tensors.update(layer.merged_weight(self.names.index(name)))
        return tensors

    def architectures(self) -> list[PretrainedConfig]:
        """The base's configuration, N times."""
        return [self.base.config] * len(self.names)


def build_bank(config: UltraFuserConfig, dtype: torch.dtype | None = None) -> SpecialistBank:
    """A bank of the configured shape with unset weights, ready for `load_tensors`.

    Args:
        config: of the fused model; every specialist's architecture must be in it.
        dtype: of the weights; torch's default when None.

    Raises:
        UltrafuserError: an architecture is missing or unknown.
    """
    members = config.members
    if not members:
        raise UltrafuserError("specialists: at least one is needed, got none.")
    if config.bank == "whole":
        return WholeSpecialists({m.name: _empty_model(m, dtype) for m in members})
    base = _empty_model(members[0], dtype)
    return AdapterSpecialists(base, {m.name: _empty_adapter(m, base) for m in members})


def _empty_model(member: SpecialistConfig, dtype: torch.dtype | None) -> PreTrainedModel:
    architecture = member.architecture()
    model = AutoModelForCausalLM.from_config(
        architecture, dtype=torch.get_default_dtype() if dtype is None else dtype
    )
    model.tie_weights()  # not done by construction when initialisation is skipped
    return model


def _empty_adapter(member: SpecialistConfig, base: PreTrainedModel) -> Adapter:
    return Adapter.bare() if member.adapter_config is None else Adapter.initial(base, member.adapter_config)


def _run(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: DynamicCache | None,
) -> Tensor:
    output = model.get_decoder()(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.last_hidden_state


def _fold(tensor: Tensor) -> Tensor:
    """(B, N, T) -> (N * B, T), specialist-major."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _text(config: PretrainedConfig) -> PretrainedConfig:
    return config.get_text_config(decoder=True)


def head_of(model: PreTrainedModel) -> Head:
    """The output head of a causal language model, with its factor on the logits."""
    layer, config = model.get_output_embeddings(), _text(model.config)
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = (1.0 if scale is None else float(scale)) / (1.0 if divisor is None else float(divisor))
    return Head(layer.weight, layer.bias, factor)


def _check_linear_head(name: str, model: PreTrainedModel) -> None:
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise UltrafuserError(
            f"specialist {name}: {type(model).__name__} has no linear output head, so it cannot be a specialist. "
            "Use a causal language model."
        )
    for setting in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        cap = getattr(_text(model.config), setting, None)
        if cap is not None:
            raise UltrafuserError(
                f"specialist {name}: its logits are soft-capped ({setting}={cap}), so they are no linear map of its "
                "hidden states and cannot be fused exactly. Use a model without soft-capped logits."
            )


@torch.no_grad()
def check_exact(name: str, model: PreTrainedModel) -> None:
    """Run a few tokens to see that hidden states, head and cache give the model's own logits.

    Architectures may do more between hidden states and logits than their head says (another factor, one more layer),
    or keep their past elsewhere than in a KV cache. Found out here, such a model is refused rather than fused wrongly.

    Args:
        name: of the specialist, for the error.
        model: a loaded model, in evaluation mode.

    Raises:
        UltrafuserError: the model cannot run as a specialist, or gives other logits than by itself.
    """
    _check_linear_head(name, model)
    ids = torch.arange(1, 5, device=model.device).unsqueeze(0)
    positions, head = torch.arange(4, device=model.device).unsqueeze(0), head_of(model)
    try:
        own = model(input_ids=ids).logits.float()
        cache = DynamicCache(config=model.config)
        once = _run(model, ids, None, positions, None)
        steps = [
            _run(model, ids[:, part], None, positions[:, part], cache) for part in (slice(0, 3), slice(3, 4))
        ]
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UltrafuserError(
            f"specialist {name}: {type(model).__name__} cannot run as a specialist ({error}). Use another architecture."
        ) from error
    for states, tolerance, part in ((once, 0.01, "head"), (torch.cat(steps, dim=1), 0.1, "cache")):
        logits = fused_logits([states], torch.ones_like(ids, dtype=torch.float32).unsqueeze(-1), [head])
        if not torch.allclose(logits.float(), own, rtol=0, atol=tolerance * float(own.abs().max())):
            raise UltrafuserError(
                f"specialist {name}: the {part} of {type(model).__name__} does not work as this package expects (other "
                "logits than the model's own), so it cannot be fused exactly. Use another architecture."
            )


def _untied_state(model: PreTrainedModel, keep_vars: bool = False) -> dict[str, Tensor]:
    """The model's state without second names of tied tensors."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    tied = set(model.all_tied_weights_keys) if getattr(model, "all_tied_weights_keys", None) else set()
    return {k: t if keep_vars else t.detach() for k, t in state.items() if k not in tied}


def _check_names(expected: Any, given: Any) -> None:
    missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing:
        owners = sorted({".".join(name.split(".")[:2]) for name in missing})
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of {', '.join(owners[:4])} (first: {missing[0]}). "
            "It is incomplete, or its config.json names specialists that it does not hold."
        )
    if unexpected:
        raise CheckpointError(
            f"the checkpoint holds {len(unexpected)} tensors that its config.json does not name "
            f"(first: {unexpected[0]}). config.json and weights do not belong together."
        )


def _copy(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for key, target in targets.items():
        if sources[key].shape != target.shape:
            raise CheckpointError(
                f"{key} has shape {tuple(sources[key].shape)}, expected {tuple(target.shape)}. "
                "config.json and weights do not belong together."
            )
        target.copy_(sources[key])
