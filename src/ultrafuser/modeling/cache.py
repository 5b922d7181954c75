"""Keys and values of all specialists of a fused model, behind the one interface that `generate` knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ultrafuser.errors import UltrafuserError

ROOM_POSITIONS = 64
"""Positions that a cache layer keeps free at least when it grows."""


class RoomyLayer(DynamicLayer):
    """A cache layer that keeps room for more positions: a decode step writes one instead of copying all."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append positions.

        Args:
            key_states: float, (B, heads, T, head size).
            value_states: float, (B, heads, T, head size).
            *args: not read.
            **kwargs: not read.

        Returns:
            All keys and all values; views of the room, valid until the next crop and update.
        """
        if torch.is_grad_enabled():  # what backward needs must not be written over
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, past: Tensor, new: Tensor) -> Tensor:
        length = past.shape[-2] if past.numel() else 0
        needed = length + new.shape[-2]
        room = self._rooms.get(name)
        if room is None or not _begins_with(room, past, needed):
            shape = (*new.shape[:-2], needed + max(ROOM_POSITIONS, needed // 4), new.shape[-1])
            room = self._rooms[name] = new.new_empty(shape)
            if length:
                room.narrow(-2, 0, length).copy_(past)
        room.narrow(-2, length, needed - length).copy_(new)
        return room.narrow(-2, 0, needed)


def _begins_with(room: Tensor, past: Tensor, needed: int) -> bool:
    """Whether `past` is the beginning of `room` (not a selection of its rows) and `room` has `needed` positions."""
    same = room.data_ptr() == past.data_ptr() and room.shape[0] == past.shape[0]
    return same and room.shape[-2] >= needed and room.is_inference() == torch.is_inference_mode_enabled()


class FusedCache(Cache):
    """One KV cache per model that runs, and what each specialist has read so far.

    Specialists may have read prompts of different lengths, so every specialist keeps its own attention mask and
    position counter; afterwards all read the same new tokens.

    Attributes:
        parts: caches of the bank: one per whole specialist, or a single one with N * B rows for adapters.
        num_specialists: N.
    """

    def __init__(self, parts: Sequence[DynamicCache], num_specialists: int) -> None:
        super().__init__(layers=[])
        self.parts = list(parts)
        for part in self.parts:
            part.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in part.layers]
        self.num_specialists = num_specialists
        self._mask_BNT: Tensor | None = None
        self._length = 0
        self._padded = False

    def extend(self, new_mask_BNT: Tensor) -> tuple[Tensor | None, Tensor]:
        """Account for new tokens before they are read.

        Args:
            new_mask_BNT: int64, (B, N, T), 1 where the new position holds a token, 0 where it is padding.

        Returns:
            The attention mask over everything read, (B, N, past + T), or None when nothing is padding; and the
            position of every new token, int64, (B, N, T), counting tokens only.
        """
        new_length = new_mask_BNT.shape[-1]
        self._padded = self._padded or not bool(new_mask_BNT.all())
        past = [] if self._mask_BNT is None else [self._mask_BNT]
        self._mask_BNT = torch.cat([*past, new_mask_BNT], dim=-1)
        self._length += new_length
        if not self._padded:
            positions = torch.arange(self._length - new_length, self._length, device=new_mask_BNT.device)
            return None, positions.expand(*new_mask_BNT.shape[:2], -1)
        positions = (self._mask_BNT.cumsum(-1) - 1).clamp(min=0)[..., -new_length:]
        return self._mask_BNT, positions

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far, padding included; the same for all specialists."""
        return self._length

    @property
    def is_compileable(self) -> bool:
        """False: the caches grow."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether the last positions can be taken back."""
        return all(part.is_croppable for part in self.parts)

    @property
    def is_initialized(self) -> bool:
        """Whether anything has been read."""
        return self._length > 0

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows that beam search chose. `beam_idx`: int64, (B,)."""
        self._select(beam_idx, lambda part, rows: part.reorder_cache(rows))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch. `indices`: int64, (B',)."""
        self._select(indices, lambda part, rows: part.batch_select_indices(rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        if self._mask_BNT is not None:
            indices = torch.arange(self._mask_BNT.shape[0], device=self._mask_BNT.device)
            self.batch_select_indices(indices.repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Prepare every part for taking positions back."""
        for part in self.parts:
            part.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last positions, as `DynamicCache.crop` does: a negative number is how many to remove.

        Raises:
            UltrafuserError: more to remove, or a positive number (a length to keep) above, what has been read.
        """
        keep = tokens_to_remove if tokens_to_remove > 0 else self._length + tokens_to_remove
        if not 0 <= keep <= self._length:
            raise UltrafuserError(f"cache: cannot crop to {keep} positions, only {self._length} were read.")
        for part in self.parts:
            part.crop(keep - self._length)
        if self._mask_BNT is not None:
            self._mask_BNT = self._mask_BNT[..., :keep]
        self._length = keep

    def reset(self) -> None:
        """Forget everything."""
        for part in self.parts:
            part.reset()
        self._mask_BNT, self._length, self._padded = None, 0, False

    def _select(self, indices: Tensor, apply: Callable[[DynamicCache, Tensor], None]) -> None:
        assert self._mask_BNT is not None
        batch_size = self._mask_BNT.shape[0]
        folded = self.num_specialists if len(self.parts) == 1 else 1
        offsets = torch.arange(folded, device=indices.device).unsqueeze(1) * batch_size
        rows = (offsets + indices).flatten()  # adapters keep the rows of all specialists in one cache
        for part in self.parts:
            apply(part, rows)
        self._mask_BNT = self._mask_BNT[indices]
