"""A fused model inside vLLM.

Every specialist is the model that vLLM itself has for its architecture, so paged keys and values, continuous batches
and tensor parallelism are vLLM's. What is added: the hidden states of all specialists leave `forward` side by side,
and `compute_logits`, which vLLM calls for the positions that are sampled, weighs them by the gate.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion.gate import Gate
from ultrafuser.modeling.configuration import UltraFuserConfig
from ultrafuser.modeling.lora import FoldedLinear
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, SpecialistBank
from ultrafuser.serving.vllm_plugin import is_folded


class FusedForVllm(nn.Module):
    """N specialists and their gate, as vLLM runs a model.

    Args:
        vllm_config: whose `hf_config` is an `UltraFuserConfig`.
        prefix: of the names of its layers.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self._vllm_config = vllm_config
        config: UltraFuserConfig = vllm_config.model_config.hf_config
        self._vocab_size = vllm_config.model_config.get_vocab_size()
        self.bank = (_Folded if is_folded(config) else _Whole)(vllm_config, prefix)
        self.gate = Gate(self.bank.hidden_sizes, config.gate_size, config.gate_form).float()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Refused: each specialist has embeddings of its own.

        Raises:
            UltrafuserError: always.
        """
        raise UltrafuserError("a fused model reads token ids, not embeddings.")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run every specialist on the same tokens.

        Args:
            input_ids: int, (T,), the tokens of all requests of this step.
            positions: int, (T,).
            intermediate_tensors: must be None: there is no pipeline parallelism.
            inputs_embeds: must be None.

        Returns:
            Last hidden states side by side, (T, sum of H_j).
        """
        if input_ids is None or inputs_embeds is not None or intermediate_tensors is not None:
            raise UltrafuserError("a fused model reads token ids, on one pipeline stage.")
        return self.bank(input_ids, positions)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Fused logits.

        Args:
            hidden_states: (S, sum of H_j), what `forward` gave at the sampled positions.

        Returns:
            (S, V), or None on ranks that do not sample.

        Reference: paper, equation 1.
        """
        states = hidden_states.split(self.bank.hidden_sizes, dim=-1)
        logits = self.bank.logits(states, self.gate(states))
        return None if logits is None else logits[..., : self._vocab_size]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take over the tensors of a checkpoint, gate-only or self-contained, of whole specialists or adapters.

        Args:
            weights: of the checkpoint's safetensors, under their names.

        Returns:
            The names of the parameters that were set.
        """
        config = self._vllm_config.model_config
        stored = UltraFuserConfig.from_pretrained(config.model, revision=config.revision)
        loader, mapper = AutoWeightsLoader(self), self.bank.mapper
        if isinstance(self.bank, _Whole) and stored.bank == "whole" and not stored.gate_only:
            return loader.load_weights(weights, mapper=mapper)
        # The specialists are elsewhere, or in another form: this package knows how to open them.
        model = UltraFuserForCausalLM.from_pretrained(
            config.model, revision=config.revision, dtype=config.dtype
        )
        loaded = loader.load_weights(self._opened(model), mapper=mapper)
        if isinstance(self.bank, _Folded):
            self.bank.fold(model.bank)
        return loaded

    def _opened(self, model: UltraFuserForCausalLM) -> Iterator[tuple[str, Tensor]]:
        yield from ((f"gate.{key}", tensor) for key, tensor in model.gate.state_dict().items())
        yield from self.bank.tensors_of(model.bank)


class _Whole(nn.Module):
    """N whole models side by side.

    Attributes:
        hidden_sizes: H of each.
        mapper: names in checkpoints -> names here.
    """

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        members = vllm_config.model_config.hf_config.members
        architectures = [member.architecture() for member in members]
        # vLLM reads the number of a layer from its name, in which no other number may stand: hence names of
        # specialists. A list holds them all the same, since a module's children may not be called `train`.
        self.models = nn.ModuleList(
            _registered(vllm_config, architecture, maybe_prefix(prefix, f"specialists.{member.name}"))
            for member, architecture in zip(members, architectures, strict=True)
        )
        self.hidden_sizes = [a.get_text_config().hidden_size for a in architectures]
        self._names = [member.name for member in members]
        self.mapper = WeightsMapper(
            orig_to_new_prefix={
                f"specialists.{name}.": f"bank.models.{index}." for index, name in enumerate(self._names)
            }
        )
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self._states = torch.empty(rows, sum(self.hidden_sizes), device=vllm_config.device_config.device)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        # Copied out at once: where CUDA graphs share memory, the next specialist's may overwrite this one's result.
        states = self._states[: len(input_ids)]
        for model, part in zip(self.models, states.split(self.hidden_sizes, dim=-1), strict=True):
            part.copy_(model(input_ids, positions))
        return states

    def logits(self, states: Iterable[Tensor], gate_weights: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for model, state, weight in zip(self.models, states, gate_weights.split(1, dim=-1), strict=True):
            head: Any = model
            if getattr(head.lm_head, "bias", None) is None:
                part = head.compute_logits((state.float() * weight).to(state.dtype))
            else:
                part = head.compute_logits(state)
                part = None if part is None else part * weight
            if part is None:
                return None
            total = part.float() if total is None else total.add_(part[..., : total.shape[-1]])
        return total

    def tensors_of(self, bank: SpecialistBank) -> Iterator[tuple[str, Tensor]]:
        """The tensors of another bank of the same specialists, adapters merged, under the names of a checkpoint."""
        for name in self._names:
            for key, tensor in bank.merged_tensors(name).items():
                yield f"specialists.{name}.{key}", tensor


class _Folded(nn.Module):
    """N adapters over one base: row t * N + n is specialist n's token t.

    All layers of the base but attention treat rows alone, so the base is vLLM's own model. Its attention layers give
    way to wider ones, in which the specialists' heads stand side by side: heads never mix, so one call and one cache
    serve all N. The linear layers get their low-rank parts in `fold`.

    Attributes:
        hidden_sizes: H, N times.
        mapper: names in checkpoints -> names here.
    """

    mapper = WeightsMapper(orig_to_new_prefix={"base.": "bank.base."})

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        members = vllm_config.model_config.hf_config.members
        self._num = len(members)
        architecture = members[0].architecture()
        self.hidden_sizes = [architecture.hidden_size] * self._num
        self.base = _registered(vllm_config, architecture, maybe_prefix(prefix, "base"))
        for module in list(self.base.modules()):
            if isinstance(getattr(module, "attn", None), Attention):
                module.attn = _FoldedAttention(module.attn, self._num, vllm_config)
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        device = vllm_config.device_config.device
        # Always at one address, as CUDA graphs want their inputs.
        self._ids = torch.zeros(rows, self._num, dtype=torch.int32, device=device)
        self._positions = torch.zeros(rows, self._num, dtype=torch.int64, device=device)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        ids, places = self._ids[: len(input_ids)], self._positions[: len(input_ids)]
        ids.copy_(input_ids.unsqueeze(-1))
        places.copy_(positions.unsqueeze(-1))
        states = self.base(ids.flatten(), places.flatten())
        return states.view(len(input_ids), -1)

    def logits(self, states: Iterable[Tensor], gate_weights: Tensor) -> Tensor | None:
        stacked = torch.stack(tuple(states), dim=-1)
        mixed = (stacked.float() @ gate_weights.unsqueeze(-1)).squeeze(-1)
        base: Any = self.base
        return base.compute_logits(mixed.to(stacked.dtype))

    def tensors_of(self, bank: SpecialistBank) -> Iterator[tuple[str, Tensor]]:
        """The base's tensors under the names of a checkpoint."""
        assert isinstance(bank, AdapterSpecialists)
        for key, tensor in bank.base_tensors().items():
            yield f"base.{key}", tensor

    def fold(self, bank: SpecialistBank) -> None:
        """Give the linear layers their low-rank parts, once the base's own weights are there."""
        assert isinstance(bank, AdapterSpecialists)
        base: Any = self.base
        packed: dict[str, list[str]] = base.packed_modules_mapping
        for layer in bank.folded_layers:
            names = [path.rpartition(".")[2] for path in layer.paths]
            name = next((name for name, parts in packed.items() if parts == names), names[0])
            parent = base.get_submodule(layer.paths[0].rpartition(".")[0])
            setattr(parent, name, _LowRankLinear(getattr(parent, name), layer))


class _FoldedAttention(nn.Module):
    """Attention of N specialists at once.

    Args:
        one: one specialist's, whose place this takes.
        num: N.
        vllm_config: knows the attention layers by name.
    """

    def __init__(self, one: Attention, num: int, vllm_config: VllmConfig) -> None:
        super().__init__()
        self._num = num
        del vllm_config.compilation_config.static_forward_context[one.layer_name]
        self.all = Attention(
            one.num_heads * num,
            one.head_size,
            one.impl.scale,
            num_kv_heads=one.num_kv_heads * num,
            cache_config=vllm_config.cache_config,
            quant_config=one.quant_config,
            per_layer_sliding_window=one.sliding_window,
            prefix=one.layer_name,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = query.shape[0] // self._num
        out = self.all(query.reshape(rows, -1), key.reshape(rows, -1), value.reshape(rows, -1))
        return out.view(query.shape[0], -1)


class _LowRankLinear(nn.Module):
    """A linear layer of the base with N low-rank parts.

    Under tensor parallelism a layer that is split by columns of its output has its share of each `up`, one that is
    split by its input its share of each `down`; that one's partial sums are added before they are reduced.

    Args:
        linear: of vLLM.
        folded: the same layer, or joined layers, in our own bank.
    """

    def __init__(self, linear: Any, folded: FoldedLinear) -> None:
        super().__init__()
        self.linear = linear
        self._num = folded.num_specialists
        down, up = folded.low_rank(linear.params_dtype)
        if isinstance(linear, RowParallelLinear):
            down = down.chunk(linear.tp_size, dim=1)[linear.tp_rank]
        elif isinstance(linear, ColumnParallelLinear):
            up = up[:, :, own_columns(linear, folded.out_sizes)]
        else:
            raise UltrafuserError(f"layer {folded.paths[0]}: {type(linear).__name__} carries no adapters.")
        self._reduces = getattr(linear, "reduce_results", False) and linear.tp_size > 1
        if self._reduces:
            linear.reduce_results = False
        device = linear.weight.device
        self.down: Tensor
        self.up: Tensor
        self.register_buffer("down", down.contiguous().to(device), persistent=False)
        self.register_buffer("up", up.contiguous().to(device), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        out, bias = self.linear(x)
        rows = x.view(-1, self._num, x.shape[-1]).transpose(0, 1)
        update = torch.bmm(torch.bmm(rows, self.down), self.up)
        out = out + update.transpose(0, 1).reshape(out.shape)
        return (tensor_model_parallel_all_reduce(out) if self._reduces else out), bias


def own_columns(linear: Any, sizes: list[int]) -> Tensor:
    """Which outputs of joined layers this rank computes.

    Args:
        linear: of vLLM, split by columns.
        sizes: outputs of each joined layer on all ranks together.

    Returns:
        int64, their indices in the joined outputs, in the order in which the rank has them.
    """
    ranges, start = [], 0
    for index, size in enumerate(sizes):
        shares, rank = linear.tp_size, linear.tp_rank
        if isinstance(linear, QKVParallelLinear) and index > 0:  # keys and values may be on several ranks
            rank //= linear.num_kv_head_replicas
            shares //= linear.num_kv_head_replicas
        share = size // shares
        ranges.append(torch.arange(start + rank * share, start + (rank + 1) * share))
        start += size
    return torch.cat(ranges)


def _registered(vllm_config: VllmConfig, architecture: PretrainedConfig, prefix: str) -> nn.Module:
    """The model that vLLM has for an architecture."""
    config = vllm_config.with_hf_config(architecture)
    config.model_config.hf_text_config = architecture.get_text_config()
    config.model_config.model_arch_config = config.model_config.get_model_arch_config()
    return initialize_model(vllm_config=config, prefix=prefix)
