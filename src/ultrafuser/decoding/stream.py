"""One response, token by token, each with the gate weights that chose it; and its text as it grows.

`generate` of the model gives whole batches; the chat wants every token at once, with its weights, and now and
then from one specialist alone. The tokens are those that `generate` gives for the same settings.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion import fused_logits
from ultrafuser.modeling.cache import FusedCache
from ultrafuser.modeling.model import UltraFuserForCausalLM


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token.

    Attributes:
        token_id: the token; the end token, too, is a step, and the last one.
        gate_weights: N numbers that sum to 1: how much each specialist counted for this token.
    """

    token_id: int
    gate_weights: tuple[float, ...]


def stream_tokens(
    model: UltraFuserForCausalLM,
    prompt: Mapping[str, Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    only: str | None = None,
) -> Iterator[TokenStep]:
    """Generate one response and hand out every token as soon as it is chosen.

    Args:
        model: the fused model.
        prompt: `specialist_input_ids` (and `specialist_attention_mask`), int64, (1, N, P), such as
            `ConversationEncoder.batch_prompts` gives.
        max_new_tokens: tokens at most; 0 gives none.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample among the likeliest tokens that together reach this probability; 1 among all.
        top_k: sample among this many of the likeliest tokens; 0 among all.
        seed: of the samples: the same seed gives the same response.
        only: name of a specialist that answers alone, as under a gate that gives it the whole weight.

    Yields:
        One step a token, until the end token (included) or `max_new_tokens`.

    Raises:
        UltrafuserError: a setting is out of range, there is no such specialist, or not one prompt is given.
    """
    choose = _chooser(temperature, top_p, top_k, seed, model.device)
    fixed = _one_hot(model, only)
    input_ids = prompt["specialist_input_ids"].to(model.device)
    if input_ids.shape[0] != 1:
        raise UltrafuserError(f"stream_tokens reads 1 prompt at a time, got {len(input_ids)}. Use generate.")
    mask = prompt.get("specialist_attention_mask")
    new_mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
    return _stream(model, input_ids, new_mask, max_new_tokens, choose, fixed)


def _stream(
    model: UltraFuserForCausalLM,
    input_ids: Tensor,
    new_mask: Tensor,
    max_new_tokens: int,
    choose: Callable[[Tensor], Tensor],
    fixed_weights: Tensor | None,
) -> Iterator[TokenStep]:
    cache = model.new_cache()
    for _ in range(max_new_tokens):
        # Entered for each step alone: a generator must not leave its caller in inference mode between two.
        with torch.inference_mode():
            logits, weights = _step(model, input_ids, new_mask, cache, fixed_weights)
            token = choose(logits)
            step = TokenStep(int(token), tuple(weights[0].tolist()))
            input_ids = token.view(1, 1, 1).expand(1, model.num_specialists, 1)
            new_mask = torch.ones_like(input_ids)
        yield step
        if step.token_id == model.config.end_token_id:
            return


def _step(
    model: UltraFuserForCausalLM,
    input_ids: Tensor,
    new_mask: Tensor,
    cache: FusedCache,
    fixed_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Read new tokens; return the logits (1, V), float32, of the next one and its weights (1, N)."""
    # The model's parts instead of its forward, which leaves no way to put the gate aside.
    full_mask, positions = cache.extend(new_mask)
    states = [state[:, -1] for state in model.bank(input_ids, full_mask, positions, cache.parts)]
    weights = model.gate(states) if fixed_weights is None else fixed_weights
    return fused_logits(states, weights, model.bank.heads()).float(), weights


def _one_hot(model: UltraFuserForCausalLM, only: str | None) -> Tensor | None:
    if only is None:
        return None
    if only not in model.specialist_names:
        known = ", ".join(model.specialist_names)
        raise UltrafuserError(f"there is no specialist {only!r}; there are {known}.")
    index = torch.tensor([model.specialist_names.index(only)], device=model.device)
    return F.one_hot(index, model.num_specialists).float()


def _chooser(
    temperature: float, top_p: float, top_k: int, seed: int, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """How the next token, int64, (1,), is taken from logits, float32, (1, V)."""
    if temperature < 0 or not 0 <= top_p <= 1 or top_k < 0:
        raise UltrafuserError(
            "temperature and top_k must be at least 0 and top_p within 0 to 1, "
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}."
        )
    if temperature == 0:
        return lambda logits: logits.argmax(dim=-1)
    warpers = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k > 0 else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    generator = torch.Generator(device).manual_seed(seed)

    def sample(logits: Tensor) -> Tensor:
        for warp in warpers:
            logits = warp(None, logits)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(-1)

    return sample


class TextStream:
    """Text of a growing response.

    A token may end in the middle of a character (tokens are bytes), and the text of a token may depend on
    those before it (a leading space). So the text handed out is what the last tokens together have more than
    before, and it is held back while its last character is incomplete.

    Args:
        tokenizer: that the specialists share.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded: tokens before it no longer matter
        self._done = 0  # tokens whose text was handed out

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now complete, often one token's, sometimes empty."""
        self._ids.append(token_id)
        text = self._new_text()
        return "" if text.endswith("\ufffd") else self._hand_out(text)

    def flush(self) -> str:
        """The text that was held back, at the end of the response; broken characters read U+FFFD."""
        return self._hand_out(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _hand_out(self, text: str) -> str:
        self._start, self._done = self._done, len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of every token, special ones included, such that joining gives the text of the response.

    Args:
        tokenizer: that the specialists share.
        token_ids: of one response.

    Returns:
        As many texts; of the tokens that make up one character all but the last are empty.
    """
    stream = TextStream(tokenizer, skip_special_tokens=False)
    texts = [stream.push(token_id) for token_id in token_ids]
    if texts:
        texts[-1] += stream.flush()
    return texts
