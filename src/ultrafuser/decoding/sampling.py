"""How a token is chosen from logits: settings, the distribution they make, and seeded draws.

Everything that decodes (the reference, the engine, speculation) asks a `Sampler`, one per response, so that there is
one definition of what a setting means. Settings have the meaning and the order that Hugging Face's `generate` gives
them: repetition penalty, temperature, top-k, top-p, min-p.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ultrafuser.errors import UltrafuserError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one response is made.

    Attributes:
        max_new_tokens: tokens at most, the end token included; 0 gives none.
        temperature: divides the logits; 0 takes the likeliest token (greedy).
        top_p: sample among the likeliest tokens that together reach this probability; 1 among all.
        top_k: sample among this many of the likeliest tokens; 0 among all.
        min_p: leave out tokens less likely than this share of the likeliest one's probability; 0 leaves out none.
        repetition_penalty: divides (or, below zero, multiplies) the logits of tokens that the first specialist's prompt
            or the response already holds; 1 changes nothing. Greedy decoding heeds it, too.
        seed: of the draws: the same seed gives the same response, unless the engine speculates: then it depends on how
            much was drafted, too, which follows the clock.
        stop: texts that end the response when they appear in it; they and what follows are not part of it.
        logprobs: None, or the number of likeliest alternatives whose log-probabilities come with every token (0: only
            the token's own). They are the fused model's own, before any setting here.

    Raises:
        UltrafuserError: a setting is out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 0, "at least 0"),
            "temperature": (
                self.temperature == 0 or 1e-5 <= self.temperature < float("inf"),
                "0, or at least 1e-5 and finite",
            ),
            "top_p": (0 <= self.top_p <= 1, "within 0 to 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "min_p": (0 <= self.min_p <= 1, "within 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0 and finite"),
            "seed": (-(2**63) <= self.seed < 2**64, "within -2**63 to 2**64 - 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "texts that are not empty"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None or at least 0"),
        }
        for name, (holds, expected) in rules.items():
            if not holds:
                raise UltrafuserError(f"{name} must be {expected}, got {getattr(self, name)!r}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0


class Sampler:
    """Chooses the tokens of one response.

    Args:
        params: the settings.
        prompt_ids: what the repetition penalty counts as already said.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)
        self._penalty = None
        if params.repetition_penalty != 1:
            self._penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
            self._said = list(prompt_ids)
        self._warpers = [] if params.greedy else _warpers(params)

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is simply the one with the largest logit."""
        return self.params.greedy and self._penalty is None

    def probabilities(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """The distributions that the next tokens are drawn from.

        Args:
            logits: float, (T, V): logits of the next tokens. The last row is that of the token behind all drafted ones.
            drafted: at least T - 1 tokens that are supposed to be said before that.

        Returns:
            float32, (T, V), on the device of the logits; one-hot when decoding greedily.
        """
        scores = logits.float()
        if self._penalty is not None:
            scores = self._penalised(scores, drafted)
        if self.params.greedy:
            return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)
        for warp in self._warpers:
            scores = warp(None, scores)
        return scores.softmax(dim=-1)

    def greedy_tokens(self, logits: Tensor, drafted: Sequence[int] = ()) -> Tensor:
        """The likeliest tokens: int64, (T,), for the same arguments as `probabilities`."""
        if self._penalty is not None:
            logits = self._penalised(logits.float(), drafted)
        return logits.argmax(dim=-1)

    def next_token(self, logits: Tensor) -> int:
        """Choose the next token from its fused logits, float, (1, V)."""
        if self.params.greedy:
            return int(self.greedy_tokens(logits))
        return self.draw(self.probabilities(logits)[0])

    def draw(self, probabilities: Tensor) -> int:
        """One token from a distribution, float32, (V,), which need not be normalised."""
        # By the inverse of the distribution function: one number a token, whatever the device and batch.
        cumulative = probabilities.cpu().cumsum(-1, dtype=torch.float64)  # some devices lack this type
        point = self.uniform() * float(cumulative[-1])
        index = int(torch.searchsorted(cumulative, point, right=True))
        return min(index, int(probabilities.nonzero()[-1]))

    def uniform(self) -> float:
        """The response's next random number, in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))

    def said(self, token_ids: Sequence[int]) -> None:
        """Tell which tokens have become part of the response."""
        if self._penalty is not None:
            self._said.extend(token_ids)

    def _penalised(self, scores: Tensor, drafted: Sequence[int]) -> Tensor:
        assert self._penalty is not None
        said = torch.tensor([[*self._said, *drafted]], device=scores.device)
        rows = []
        for index, row in enumerate(scores, start=1 - len(scores)):
            before = said[:, : said.shape[1] + index]
            rows.append(self._penalty(before, row.unsqueeze(0)) if before.numel() else row.unsqueeze(0))
        return torch.cat(rows)


def _warpers(params: SamplingParams) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(params.min_p))
    return warpers
