"""Who drafts: a model that says a few tokens ahead of the fused one, or the conversation's own past.

A drafting model costs a pass a token, or less where the context foretells tokens for it. Whatever it says is verified,
so it need not be exact: on a CPU, copies of the specialists with 8-bit weights read a quarter of the bytes.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ultrafuser.decoding.backbones import Backbone, Slots, open_backbone
from ultrafuser.decoding.conversation import Conversation, DecodingStats, Draft
from ultrafuser.decoding.projection import PackedLinear, Product, QuantizedLinear
from ultrafuser.decoding.speculation import DrafterKind, DraftLength, SpeculationParams
from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion.mix import Head
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import head_of

_LEAST_CONFIDENCE = 0.3
"""A draft ends with a token that its model, if it is not a specialist itself, finds less probable than this."""


class Drafter:
    """Models that draft, each for the conversations that are its own.

    Args:
        backbones: a model for each specialist, which drafts where the gate favours that specialist and shares its
            cache; or a single one with a cache of its own, which drafts for all.
        logits: of each of them: states (R, H) -> (R, V).
        end_token_id: behind which nothing is drafted.
        params: of the look-ups that guess tokens for them.
        own_cache: whether it is a single one with a cache of its own.
        least_confidence: probability of a token, below which nothing is drafted behind it.
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        logits: Sequence[Product],
        end_token_id: int,
        params: SpeculationParams,
        own_cache: bool = False,
        least_confidence: float = _LEAST_CONFIDENCE,
    ) -> None:
        self._backbones, self._logits = list(backbones), list(logits)
        self._end_token_id, self._max_draft, self._own_cache = end_token_id, params.max_draft, own_cache
        self._least_confidence = least_confidence
        self._guess_lengths = [
            DraftLength(lambda length: 1 + 0.05 * length, True, params.max_draft) for _ in self._backbones
        ]

    def draft(
        self, conversations: Sequence[Conversation], lengths: Sequence[int], stats: DecodingStats
    ) -> list[Draft]:
        """Draft for all conversations, which are in the slots from the first on.

        Args:
            conversations: A of them.
            lengths: tokens for each at most.
            stats: the passes are counted in.
        """
        drafts = [Draft() for _ in conversations]
        for index in range(len(self._backbones)):
            rows = [row for row, c in enumerate(conversations) if self._index(c) == index]
            while rows := [row for row in rows if self._goes_on(drafts[row], lengths[row])]:
                self._pass(
                    index,
                    rows,
                    [conversations[row] for row in rows],
                    [drafts[row] for row in rows],
                    [lengths[row] for row in rows],
                )
                stats.draft_passes += 1
        return drafts

    def reads_prompts(self, conversations: Sequence[Conversation]) -> bool:
        """Whether drafting for these begins with the prompt of one of them, which nobody has read for drafts yet."""
        return self._own_cache and any(conversation.read_by_drafter == 0 for conversation in conversations)

    def settle(self, conversation: Conversation, draft: Draft, num_said: int) -> None:
        """Note what counts as read after a step: the drafted tokens that were said. It is before they are appended.

        Args:
            conversation: that the draft was for.
            draft: all of it.
            num_said: tokens that the step gave.
        """
        if self._own_cache and draft.tokens:
            context = len(conversation.prompts[0]) + len(conversation.response)
            conversation.read_by_drafter = context + min(num_said, len(draft.tokens)) - 1

    def move(self, conversation: Conversation, source: int, target: int) -> None:
        """Follow a conversation into another slot, where the cache is not a specialist's."""
        if self._own_cache:
            self._backbones[0].move(source, target, conversation.read_by_drafter)

    def _index(self, conversation: Conversation) -> int:
        return 0 if self._own_cache else conversation.favourite

    def _goes_on(self, draft: Draft, length: int) -> bool:
        ended = draft.tokens[-1:] == [self._end_token_id] or draft.confidence < self._least_confidence
        return len(draft.tokens) < length and not ended

    def _unread(self, conversation: Conversation) -> tuple[list[int], int]:
        """Tokens of the context that the drafting model has yet to read, and the position of the first."""
        if not self._own_cache:
            return conversation.response[-1:], conversation.read[conversation.favourite]
        first, prompt = conversation.read_by_drafter, conversation.prompts[0]
        return [*prompt[first:], *conversation.response[max(first - len(prompt), 0) :]], first

    def _pass(
        self,
        index: int,
        rows: list[int],
        conversations: list[Conversation],
        drafts: list[Draft],
        lengths: list[int],
    ) -> None:
        """One pass of one model: a token more for each of its drafts, several where a look-up was right."""
        begin = time.perf_counter()
        room = [length - len(draft.tokens) - 1 for draft, length in zip(drafts, lengths, strict=True)]
        ahead = [draft.tokens for draft in drafts]
        guesses = looked_up(conversations, ahead, room, self._guess_lengths[index], self._max_draft)
        texts, starts, skipped = [], [], []
        for conversation, draft, guess in zip(conversations, drafts, guesses, strict=True):
            unread, position = self._unread(conversation)
            if draft.tokens:
                position += len(unread) - 1 + len(draft.tokens)
                unread = draft.tokens[-1:]
            texts.append(torch.tensor(unread + guess.tokens))
            starts.append([position])
            skipped.append(len(unread) - 1)
        ids = pad_sequence(texts, batch_first=True).unsqueeze(1)
        backbone = self._backbones[index]
        found = backbone.read(ids.to(backbone.device), Slots(rows), torch.tensor(starts))[:, 0]
        wanted = [states[skip : len(text)] for states, skip, text in zip(found, skipped, texts, strict=True)]
        logits = self._logits[index](torch.cat(wanted)).split([len(states) for states in wanted])
        num_tokens = 0
        for conversation, draft, guess, length, states, scores in zip(
            conversations, drafts, guesses, lengths, wanted, logits, strict=True
        ):
            said = self._say(conversation, draft, guess, length, scores)
            draft.states.append(states[:said])
            num_tokens += said
        if not any(skipped):
            seconds = time.perf_counter() - begin
            self._guess_lengths[index].observe(len(rows), ids.shape[-1] - 1, num_tokens, seconds)

    def _say(
        self, conversation: Conversation, draft: Draft, guess: Draft, length: int, logits: Tensor
    ) -> int:
        """Add tokens to a draft as long as the guess was right; the number of them."""
        first = len(draft.tokens)
        for place, row in enumerate(logits.float()):
            token, probabilities = _drawn(conversation, draft, row)
            draft.tokens.append(token)
            draft.confidence = float((row[token] - row.logsumexp(dim=-1)).exp())
            draft.distributions += [] if probabilities is None else [probabilities]
            right = place < len(guess.tokens) and token == guess.tokens[place]
            if not right or not self._goes_on(draft, length):
                break
        if guess.tokens:
            num_right = sum(a == b for a, b in zip(draft.tokens[first:], guess.tokens, strict=False))
            conversation.acceptance_of(guess.kind).observe(len(guess.tokens), num_right)
        return len(draft.tokens) - first


def open_drafter(
    model: UltraFuserForCausalLM,
    backbones: Sequence[Backbone],
    heads: Sequence[PackedLinear],
    params: SpeculationParams,
    draft_model: PreTrainedModel | None = None,
) -> tuple[Drafter | None, DrafterKind]:
    """The drafter that is asked for, or the best that can be had.

    Args:
        model: the fused model.
        backbones: its own.
        heads: its heads' weights, packed.
        params: who is to draft.
        draft_model: drafts instead of the specialists.

    Returns:
        The drafter, None for look-ups alone; and what it is ("int8" for a given model, too).

    Raises:
        UltrafuserError: it cannot be had, or the draft model has a smaller vocabulary or is elsewhere.
    """
    end = model.config.end_token_id
    own = model.bank.heads()
    if draft_model is not None:
        if params.drafter != "auto":
            raise UltrafuserError(
                f'speculation: drafter "{params.drafter}" and draft_model name two that draft. Give one of them.'
            )
        if draft_model.device != model.device:
            raise UltrafuserError(
                f"draft_model is on {draft_model.device}, the fused model on {model.device}. Move one to the other."
            )
        return _given(draft_model, own[0].weight.shape[0], end, params), "int8"
    per_specialist = own if len(own) > 1 else own * model.num_specialists
    folded = len(backbones) < model.num_specialists
    # A copy of 16-bit weights is read hardly faster than they are (`docs/log.md`).
    worthwhile = own[0].weight.dtype == torch.float32
    if params.drafter == "int8" or (params.drafter == "auto" and worthwhile):
        drafting: list[Backbone] = []
        for j in range(model.num_specialists):
            copy = backbones[0 if folded else j].quantized(j if folded else 0)
            if copy is None:
                break  # some without a copy would wait for those with one
            drafting.append(copy)
        if len(drafting) == model.num_specialists:
            products = [_logits_product(QuantizedLinear(head.weight), head) for head in own]
            shared = products if len(products) > 1 else products * model.num_specialists
            return Drafter(drafting, shared, end, params), "int8"
        if params.drafter == "int8":
            raise UltrafuserError(
                'speculation: drafter "int8" needs an x86 CPU and specialists of the Llama kind. Choose "auto".'
            )
    if params.drafter == "lookup" or (params.drafter == "auto" and folded):
        return None, "lookup"
    if folded:
        raise UltrafuserError(
            'speculation: drafter "specialist" needs whole specialists; adapters run in one pass. Choose "auto".'
        )
    packed = heads[: len(own)] if len(own) > 1 else [heads[0]] * model.num_specialists
    products = [_logits_product(weight, head) for weight, head in zip(packed, per_specialist, strict=True)]
    # The gate favours it, so that its likeliest token is nearly always the fused model's, however unlikely itself.
    return Drafter(backbones, products, end, params, least_confidence=0.0), "specialist"


def looked_up(
    conversations: Sequence[Conversation],
    ahead: Sequence[Sequence[int]],
    room: Sequence[int],
    chooser: DraftLength,
    max_draft: int,
) -> list[Draft]:
    """A draft from the context for every conversation that has one, if drafting pays.

    Args:
        conversations: A of them.
        ahead: tokens of each that are drafted already.
        room: tokens for each at most.
        chooser: of the length, by what such passes cost.
        max_draft: tokens at most.
    """
    drafts = [
        Draft(*c.lookup.draft(min(max_draft, most), tokens))
        for c, tokens, most in zip(conversations, ahead, room, strict=True)
    ]
    pairs = [(c, draft) for c, draft in zip(conversations, drafts, strict=True) if draft.tokens]
    rates = [c.acceptance_of(draft.kind).rate for c, draft in pairs]
    length = chooser.best(len(conversations), rates) if rates else 0
    for conversation, draft in pairs:
        draft.tokens = draft.tokens[:length]
        if not length:
            conversation.acceptance_of(draft.kind).fade()
    return drafts


def _given(model: PreTrainedModel, vocab_size: int, end_token_id: int, params: SpeculationParams) -> Drafter:
    head = head_of(model)
    if head.weight.shape[0] < vocab_size:
        raise UltrafuserError(
            f"draft_model has a vocabulary of {head.weight.shape[0]} tokens, the fused model one of {vocab_size}. "
            "Give a model of the same vocabulary."
        )
    bias = None if head.bias is None else head.bias[:vocab_size]
    cut = Head(head.weight[:vocab_size], bias, head.scale)
    backbone = open_backbone(model)
    return Drafter(
        [backbone], [_logits_product(PackedLinear(cut.weight), cut)], end_token_id, params, own_cache=True
    )


def _logits_product(weight: Product, head: Head) -> Callable[[Tensor], Tensor]:
    """States (R, H) -> logits (R, V) of one specialist alone."""
    if head.bias is None and head.scale == 1:
        return weight
    return lambda x: (weight(x) if head.bias is None else weight(x) + head.bias) * head.scale


def _drawn(conversation: Conversation, draft: Draft, logits: Tensor) -> tuple[int, Tensor | None]:
    """A token from a model's logits (V,), and the distribution it was drawn from unless it was certain."""
    sampler = conversation.sampler
    if sampler.takes_likeliest:
        return int(logits.argmax()), None
    row = sampler.probabilities(logits.unsqueeze(0), draft.tokens)[0]
    return (int(row.argmax()), None) if sampler.params.greedy else (sampler.draw(row), row)
