"""A bank's models over preallocated caches: every conversation has a slot, and reading is the only operation.

A slot's rows may be of different lengths, and what a row has read is only a number that the caller keeps: taking
positions back means reading again from an earlier one. `LlamaBackbone` computes the usual Llama block itself, with
few and large operations; `ModuleBackbone` runs Hugging Face's modules, for every other architecture.
"""

import copy
import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ultrafuser.decoding.projection import (
    Product,
    Projection,
    can_quantize,
    quantized_projection,
    working_dtype,
)
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.specialists import AdapterSpecialists, SpecialistBank, WholeSpecialists

_GROW_POSITIONS = 256
_LLAMA_BLOCKS = {"llama", "mistral", "qwen2"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_STATIC_ROPE = {"default", "linear", "llama3", "yarn"}


class Slots:
    """Which slots take part in a pass, as an index that is a view where it can be.

    Args:
        indices: of the slots, in the order of the rows.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        first = self.indices[0]
        self.contiguous = self.indices == list(range(first, first + len(self.indices)))
        self.index: slice | Tensor = slice(first, first + len(self.indices))
        if not self.contiguous:
            self.index = torch.tensor(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class _Plan:
    """Where the rows of one pass stand: positions, and what each may look at.

    Args:
        slots: that take part.
        starts: int64 on the CPU, (A, N): positions each row has read.
        new_length: T.
        device: of the model.
    """

    def __init__(self, slots: Slots, starts: Tensor, new_length: int, device: torch.device) -> None:
        self.slots = slots
        self.new_length = new_length
        self.start = int(starts[0, 0])
        self.uniform = bool((starts == self.start).all())
        self.length = int(starts.max()) + new_length
        self.positions = (starts.unsqueeze(-1) + torch.arange(new_length)).to(device)  # (A, N, T)
        self.is_causal = self.uniform and self.start == 0 and new_length > 1
        self.mask: Tensor | None = None
        if not self.uniform or (new_length > 1 and self.start > 0):
            keys = torch.arange(self.length, device=device)
            self.mask = (keys <= self.positions.unsqueeze(-1)).flatten(0, 1).unsqueeze(1)  # (A * N, 1, T, L)


class SlotCache:
    """Keys and values of all slots; grows when a slot or a position beyond its size is written.

    Args:
        num_tensors: kept apart, because their sizes differ or they are written at different times.
        rows_per_slot: N for folded adapters, 1 for a whole model.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(
        self, num_tensors: int, rows_per_slot: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._rows = rows_per_slot
        self._options: dict[str, Any] = {"dtype": dtype, "device": device}
        self._tensors: list[Tensor | None] = [None] * num_tensors

    def write(self, index: int, new: Tensor, plan: _Plan) -> Tensor:
        """Write new positions of a tensor; return all that the pass may look at.

        Args:
            index: of the tensor.
            new: (A, N, T, heads, head size).
            plan: of the pass.

        Returns:
            (A * N, heads, L, head size); a view where the slots are contiguous.
        """
        room = self.room(index, new.shape[3], new.shape[4], plan)
        if plan.slots.contiguous and plan.uniform:
            end = plan.start + plan.new_length
            room[plan.slots.index, :, :, plan.start : end] = new.transpose(2, 3)
        else:
            slots = torch.tensor(plan.slots.indices, device=new.device).view(-1, 1, 1)
            rows = torch.arange(self._rows, device=new.device).view(1, -1, 1)
            room[slots, rows, :, plan.positions] = new
        return room[plan.slots.index, :, :, : plan.length].flatten(0, 1)

    def room(self, index: int, num_heads: int, head_size: int, plan: _Plan) -> Tensor:
        """A tensor, (slots, N, heads, positions, head size), with room for all that the pass will write.

        Args:
            index: of the tensor.
            num_heads: always the same for it.
            head_size: the same.
            plan: of the pass.
        """
        room, num_slots = self._tensors[index], max(plan.slots.indices) + 1
        if room is not None and room.shape[0] >= num_slots and room.shape[3] >= plan.length:
            return room
        old_slots, old_length = (0, 0) if room is None else (room.shape[0], room.shape[3])
        if num_slots > old_slots > 0:
            num_slots = max(num_slots, 2 * old_slots)
        length = old_length
        if plan.length > old_length:
            length = -(-max(plan.length, old_length * 3 // 2) // _GROW_POSITIONS) * _GROW_POSITIONS
        shape = (max(num_slots, old_slots), self._rows, num_heads, length, head_size)
        grown = torch.zeros(shape, **self._options)  # zeros: what is masked out must still be finite
        if room is not None:
            grown[:old_slots, :, :, :old_length] = room
        self._tensors[index] = grown
        return grown

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot over another slot's; a slot without any may not exist yet."""
        for tensor in self._tensors:
            if tensor is not None and length > 0:
                tensor[target, :, :, :length] = tensor[source, :, :, :length]

    @property
    def num_bytes(self) -> int:
        """Allocated now."""
        return sum(tensor.nbytes for tensor in self._tensors if tensor is not None)


class _Window:
    """What one pass of a Llama-like model writes and looks at, layer by layer.

    Keys and values of all layers are one tensor, so that a usual pass takes its views of them once and not in every
    layer, and finds out once which of the heads' positions it writes: a small model spends as much time on handing
    tensors around as on computing.

    Args:
        room: (slots, N, layers * 2 * heads, positions, head size), the keys of a layer before its values.
        num_layers: of the model.
        plan: of the pass.
        rows: of each slot that the pass has.
    """

    def __init__(self, room: Tensor, num_layers: int, plan: _Plan, rows: slice) -> None:
        self._plan, self._rows = plan, rows
        self._layers = room.unflatten(2, (num_layers, -1))
        if plan.slots.contiguous:
            seen = self._layers[plan.slots.index, rows, ..., : plan.length, :].flatten(0, 1)
            self._keys, self._values = (part.unbind(1) for part in seen.chunk(2, dim=2))
        _, num_rows, _, num_heads, length, head_size = self._layers.shape
        self._flat, self._layer_size = room.view(-1, head_size), num_heads * length
        index = functools.partial(torch.arange, device=room.device)
        slots = torch.tensor(plan.slots.indices, device=room.device).view(-1, 1, 1, 1)
        places = slots * num_rows + index(rows.start, rows.stop).view(-1, 1, 1)
        places = places * num_layers * self._layer_size + index(num_heads) * length
        self._places = (places + plan.positions.unsqueeze(-1)).flatten()

    def write(self, layer: int, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return all that the pass may look at.

        Args:
            layer: index.
            new: (A, rows, T, 2 * heads, head size).

        Returns:
            Keys and values, (A * rows, heads, L, head size).
        """
        self._flat[layer * self._layer_size :].index_copy_(0, self._places, new.reshape(-1, new.shape[-1]))
        if self._plan.slots.contiguous:
            return self._keys[layer], self._values[layer]
        room = self._layers[:, :, layer]
        seen = room[self._plan.slots.index, self._rows, :, : self._plan.length].flatten(0, 1)
        keys, values = seen.chunk(2, dim=1)
        return keys, values


class Backbone(ABC):
    """One model (a whole specialist, or the base with all adapters folded) with a slot for every conversation.

    Attributes:
        rows_per_slot: N for folded adapters, 1 for a whole specialist.
        device: where the model is.
    """

    rows_per_slot: int
    device: torch.device

    @abstractmethod
    def read(self, input_ids: Tensor, slots: Slots, starts: Tensor) -> Tensor:
        """Read tokens, and remember them.

        Args:
            input_ids: int64, (A, N, T); a row with fewer than T tokens has any at its end: they are never looked at by
                the tokens before them, and overwritten by what is read next.
            slots: A slots.
            starts: int64 on the CPU, (A, N): how many positions of each row count as read.

        Returns:
            Last hidden states, (A, N, T, H).
        """

    @abstractmethod
    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot over another slot's."""

    def quantized(self, row: int) -> "Backbone | None":
        """A fast, inexact copy of what runs in one of a slot's rows, for drafting; None where it cannot be had.

        The copy shares this backbone's keys and values: it reads on from what was read exactly, and what it reads
        itself counts only until the same positions are read again here.

        Args:
            row: index of a specialist among folded adapters; 0 for a whole specialist.
        """
        return None


class LlamaBackbone(Backbone):
    """The Llama block (RMS norm, rotary positions, grouped attention, gated MLP) with joined projections.

    Args:
        model: of a type in which `supports` finds nothing unusual.
        rows_per_slot: N for folded adapters, 1 for a whole specialist.
    """

    def __init__(self, model: PreTrainedModel, rows_per_slot: int) -> None:
        decoder: Any = model.get_decoder()
        config = model.config
        self.rows_per_slot = rows_per_slot
        self._first_row = 0
        self._decoder = decoder
        weights = [
            projection.weight
            for layer in decoder.layers
            for part in (layer.self_attn, layer.mlp)
            for projection in part.children()
            if hasattr(projection, "weight")
        ]
        self._dtype = functools.reduce(torch.promote_types, map(working_dtype, weights))
        self.device = decoder.norm.weight.device
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_size = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._cache = SlotCache(1, rows_per_slot, self._dtype, self.device)
        self._cos = self._sin = torch.empty(0)
        self._layers = [_LlamaLayer(layer, Projection) for layer in decoder.layers]
        self._last_norm = _Norm(decoder.norm)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether the model is built of exactly these blocks."""
        config = model.config
        rope = getattr(config, "rope_parameters", None) or {}
        return (
            config.model_type in _LLAMA_BLOCKS
            and config.hidden_act == "silu"
            and rope.get("rope_type") in _STATIC_ROPE
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and _attention_kinds(model) == {_FULL}
        )

    def read(self, input_ids: Tensor, slots: Slots, starts: Tensor) -> Tensor:
        """See `Backbone.read`."""
        plan = _Plan(slots, starts, input_ids.shape[-1], self.device)
        num_heads = len(self._layers) * 2 * self._kv_heads
        room = self._cache.room(0, num_heads, self._head_size, plan)
        rows = slice(self._first_row, self._first_row + self.rows_per_slot)
        window = _Window(room, len(self._layers), plan, rows)
        cos, sin = self._rotation(plan)
        x = F.embedding(input_ids, self._decoder.embed_tokens.weight).to(self._dtype)
        for index, layer in enumerate(self._layers):
            turned = self._turned(layer.query_key_value(layer.first_norm(x)), cos, sin)
            x = x + layer.output(
                self._attend(turned, *window.write(index, turned[..., self._heads :, :]), plan)
            )
            gate, up = layer.gate_up(layer.second_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return self._last_norm(x)

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backbone.move`."""
        self._cache.move(source, target, length)

    def quantized(self, row: int) -> Backbone | None:
        """See `Backbone.quantized`."""
        if not can_quantize(self.device):
            return None
        draft = copy.copy(self)
        draft.rows_per_slot, draft._first_row = 1, row
        draft._layers = [
            _LlamaLayer(layer, lambda layers: quantized_projection(layers, row))
            for layer in self._decoder.layers
        ]
        return draft

    def _turned(self, joined: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys by their positions; values, which come along, as they are: (A, N, T, heads, head size)."""
        joined = joined.unflatten(-1, (-1, self._head_size))
        first, second = joined.chunk(2, dim=-1)
        return torch.addcmul(joined * cos, torch.cat((second, first), dim=-1), sin)

    def _attend(self, turned: Tensor, keys: Tensor, values: Tensor, plan: _Plan) -> Tensor:
        queries = turned[..., : self._heads, :].flatten(0, 1).transpose(1, 2)
        if plan.mask is not None and queries.is_cuda and self._heads > self._kv_heads:
            # With a mask, CUDA's fast kernels take no groups, and the slow one would repeat them in every operation.
            repeats = self._heads // self._kv_heads
            keys, values = (part.repeat_interleave(repeats, dim=1) for part in (keys, values))
        attended = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=plan.mask, is_causal=plan.is_causal, enable_gqa=True
        )
        return attended.transpose(1, 2).reshape(*turned.shape[:3], -1)

    def _rotation(self, plan: _Plan) -> tuple[Tensor, Tensor]:
        """Factors of queries, keys and values: (A, N, T, heads, head size), or without A and N where rows stand alike.

        The sines of the first half are negative, as its rotation is; values are turned by nothing.
        """
        if plan.length > self._cos.shape[0]:
            length = -(-plan.length // _GROW_POSITIONS) * _GROW_POSITIONS * 2
            positions = torch.arange(length, device=self.device).unsqueeze(0)
            probe = torch.empty(0, dtype=self._dtype, device=self.device)
            cos, sin = (
                part[0].unsqueeze(1) for part in self._decoder.rotary_emb(probe, position_ids=positions)
            )
            first, second = sin.chunk(2, dim=-1)
            self._cos, self._sin = cos, torch.cat((-first, second), dim=-1)
        where = slice(plan.start, plan.start + plan.new_length) if plan.uniform else plan.positions
        cos, sin = self._cos[where], self._sin[where]
        turned = [1] * (cos.dim() - 2) + [self._heads + self._kv_heads, 1]
        still = [1] * (cos.dim() - 2) + [self._kv_heads, 1]
        return (
            torch.cat((cos.repeat(turned), torch.ones_like(cos).repeat(still)), dim=-2),
            torch.cat((sin.repeat(turned), torch.zeros_like(sin).repeat(still)), dim=-2),
        )


class _LlamaLayer:
    """One block's projections, joined, and its norms.

    Args:
        layer: of the model.
        project: makes several of its linear layers one.
    """

    def __init__(self, layer: Any, project: Callable[[Sequence[nn.Module]], Product]) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.first_norm, self.second_norm = (
            _Norm(layer.input_layernorm),
            _Norm(layer.post_attention_layernorm),
        )
        self.query_key_value = project([attention.q_proj, attention.k_proj, attention.v_proj])
        self.output = project([attention.o_proj])
        self.gate_up = project([mlp.gate_proj, mlp.up_proj])
        self.down = project([mlp.down_proj])


class ModuleBackbone(Backbone):
    """Any causal language model of transformers whose layers keep keys and values, for all positions or a window.

    Args:
        model: a whole specialist, or the base with folded adapters.
        rows_per_slot: N for folded adapters, 1 for a whole specialist.

    Raises:
        UltrafuserError: layers of another kind, such as recurrent ones, or an attention that takes no such mask.
    """

    def __init__(self, model: PreTrainedModel, rows_per_slot: int) -> None:
        attention = model.config._attn_implementation
        if attention not in ("eager", "sdpa"):
            raise UltrafuserError(
                f"attn_implementation must be sdpa or eager for the decoding engine to run {type(model).__name__}, got "
                f"{attention!r}, which takes no mask of single positions. Open the model with one of them."
            )
        self._kinds = _attention_kinds(model)
        if unknown := self._kinds - {_FULL, _SLIDING}:
            raise UltrafuserError(
                f"{type(model).__name__} has layers of the kind {sorted(unknown)[0]!r}; the decoding engine runs those "
                "that attend to all earlier positions or to a window of them. Use the model's own `generate`."
            )
        self._window = (
            model.config.get_text_config(decoder=True).sliding_window if _SLIDING in self._kinds else None
        )
        self.rows_per_slot = rows_per_slot
        self._decoder = model.get_decoder()
        config = model.config.get_text_config(decoder=True)
        self._cache = SlotCache(2 * config.num_hidden_layers, rows_per_slot, model.dtype, model.device)
        self._dtype, self.device = model.dtype, model.device
        # Rows filled up beyond their tokens may go beyond what the model has positions for.
        limit = getattr(config, "max_position_embeddings", None)
        self._last_position = sys.maxsize if limit is None else limit - 1

    def read(self, input_ids: Tensor, slots: Slots, starts: Tensor) -> Tensor:
        """See `Backbone.read`."""
        plan = _Plan(slots, starts, input_ids.shape[-1], self.device)
        keys, positions = torch.arange(plan.length, device=self.device), plan.positions.unsqueeze(-1)
        masks = {_FULL: keys <= positions}
        if self._window is not None:
            masks[_SLIDING] = masks[_FULL] & (keys > positions - self._window)
        # Added to the scores, not boolean: eager attention takes nothing else.
        lowest = torch.finfo(self._dtype).min
        zeros = torch.zeros((), dtype=self._dtype, device=self.device)
        masks = {k: torch.where(_fold(masks[k]).unsqueeze(1), zeros, lowest) for k in self._kinds}
        output = self._decoder(
            input_ids=_fold(input_ids),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=_fold(plan.positions).clamp(max=self._last_position),
            past_key_values=_ModuleCache(self._cache, plan),
            use_cache=True,
        )
        return output.last_hidden_state.unflatten(0, (self.rows_per_slot, -1)).transpose(0, 1)

    def move(self, source: int, target: int, length: int) -> None:
        """See `Backbone.move`."""
        self._cache.move(source, target, length)


class _ModuleCache(Cache):
    """A `SlotCache` as Hugging Face's modules see it, during one pass; their rows are specialist-major."""

    def __init__(self, cache: SlotCache, plan: _Plan) -> None:
        super().__init__(layers=[])
        self._slot_cache, self._plan = cache, plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        num_slots = len(self._plan.slots)
        keys, values = (
            self._slot_cache.write(
                2 * layer_idx + place, _slot_major(states, num_slots).transpose(2, 3), self._plan
            )
            for place, states in enumerate((key_states, value_states))
        )
        return _fold(keys.unflatten(0, (num_slots, -1))), _fold(values.unflatten(0, (num_slots, -1)))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._plan.length - self._plan.new_length


def open_backbones(bank: SpecialistBank) -> list[Backbone]:
    """The bank's models, ready to read: one for all adapters, or one a whole specialist.

    Args:
        bank: in evaluation mode; its weights are used as they are now.
    """
    if isinstance(bank, AdapterSpecialists):
        return [open_backbone(bank.base, bank.num_specialists)]
    assert isinstance(bank, WholeSpecialists)
    return [open_backbone(model) for model in bank.models]


def open_backbone(model: Any, rows_per_slot: int = 1) -> Backbone:
    """A model, ready to read.

    Args:
        model: of transformers, in evaluation mode.
        rows_per_slot: N for folded adapters, 1 for a whole specialist.

    Raises:
        UltrafuserError: its layers are of a kind that cannot be decoded this way.
    """
    kind = LlamaBackbone if LlamaBackbone.supports(model) else ModuleBackbone
    return kind(model, rows_per_slot)


def _attention_kinds(model: PreTrainedModel) -> set[str]:
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds)
    return {_FULL if getattr(config, "sliding_window", None) is None else _SLIDING}


class _Norm:
    """Root mean square norm, in float32, in few operations."""

    def __init__(self, norm: Any) -> None:
        size = norm.weight.shape[0]
        self._weight = norm.weight.detach().float() * math.sqrt(size)
        self._epsilon = torch.tensor(norm.variance_epsilon * size, device=norm.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, length, length).rsqrt_()
        return (x * scale * self._weight).to(x.dtype)


def _fold(tensor: Tensor) -> Tensor:
    """(A, N, ...) -> (N * A, ...), specialist-major."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _slot_major(tensor: Tensor, num_slots: int) -> Tensor:
    """(N * A, ...) -> (A, N, ...)."""
    return tensor.unflatten(0, (-1, num_slots)).transpose(0, 1)
