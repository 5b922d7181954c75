"""Texts as a language model sees them: the mean of its last hidden states, and its count of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrafuser.errors import UltrafuserError
from ultrafuser.progress import ProgressBar

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BATCH = 16
_MOST_TOKENS = 256


class Embedder:
    """A model that places texts (paper, appendix F).

    Args:
        model: folder or hub id of a decoder or encoder, in safetensors.

    Raises:
        UltrafuserError: it cannot be opened.
    """

    def __init__(self, model: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
            self._model = AutoModel.from_pretrained(model, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise UltrafuserError(
                f"embedding: {model} cannot be opened as one plain model: {str(error)[:300]}"
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def embed(self, texts: Sequence[str]) -> "NDArray[np.float32]":
        """Vectors (len(texts), H), float32: means over the first 256 tokens."""
        import torch

        found = []
        with ProgressBar("embedding instructions") as bar, torch.inference_mode():
            for first in range(0, len(texts), _BATCH):
                batch = self._tokenizer(
                    list(texts[first : first + _BATCH]),
                    return_tensors="pt", padding=True, truncation=True, max_length=_MOST_TOKENS,
                )  # fmt: skip
                states = self._model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"].unsqueeze(-1)
                found.append(((states * mask).sum(1) / mask.sum(1)).numpy())
                bar.update(min(first + _BATCH, len(texts)), len(texts))
        return np.concatenate(found)

    def num_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of all texts together, special ones left out."""
        return (
            sum(map(len, self._tokenizer(list(texts), add_special_tokens=False)["input_ids"])) if texts else 0
        )
