"""The decoding engine: many conversations at once, each token fused, nothing computed twice.

A conversation is a request until it gets a slot; then its prompts are read (one for each specialist), and every step
gives each conversation in a slot at least one token. Conversations join and leave between steps. What is right is
defined by `reference.py`; speculation (`speculation.py`) makes steps longer without changing what comes out.
"""

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultrafuser.decoding.backbones import Slots, open_backbones
from ultrafuser.decoding.conversation import Conversation, DecodingStats, Draft
from ultrafuser.decoding.drafting import looked_up, open_drafter
from ultrafuser.decoding.projection import PackedLinear
from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.decoding.speculation import (
    DraftLength,
    Lookup,
    SpeculationParams,
    accept,
    accept_greedy,
)
from ultrafuser.decoding.text import StoppedText
from ultrafuser.errors import ConversationTooLongError, UltrafuserError
from ultrafuser.fusion.mix import scale_hidden_states
from ultrafuser.modeling.model import UltraFuserForCausalLM

FinishReason = Literal["end", "length", "stop"]


@dataclass(frozen=True, slots=True)
class TokenStep:
    """One generated token.

    Attributes:
        token_id: the token; the end token, too, is a step, and the last one.
        gate_weights: N numbers that sum to 1: how much each specialist counted for this token.
        text: what the response's text has become longer by, the end token's left out; empty while a character is
            incomplete, or what is there may be the beginning of a stop text.
        logprob: of the token under the fused model, nats; with `SamplingParams.logprobs`.
        alternatives: (token id, log-probability) of the likeliest tokens, in order; with `SamplingParams.logprobs`.
        finish: why this token is the last one: end token, length, or a stop text; None for all others.
    """

    token_id: int
    gate_weights: tuple[float, ...]
    text: str = ""
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None


class _Chosen(NamedTuple):
    """What a step found for one conversation: tokens in order, and each one's weights (K', N) and logits (K', V)."""

    conversation: Conversation
    tokens: list[int]
    weights: Tensor
    logits: Tensor


class FusedDecoder:
    """Decodes with a fused model, several conversations at a time.

    The model's weights are used as they are when the decoder is made; make another after training.

    Requests are handed in and driven by `submit` and `step`, or by `stream` and `respond`, which do both and may be
    used by several at once, in turns; tokens of requests that were submitted by hand are then nobody's.

    Args:
        model: in evaluation mode.
        tokenizer: that the specialists share.
        max_batch: conversations that have a slot at the same time; others wait.
        speculation: who drafts, and how far ahead; None decodes one token a step. Greedy responses are the same with
            and without, where the arithmetic tells apart tokens that are nearly equally likely: in float32 as good as
            always, in 16 bits with few exceptions. Sampled ones have the same distribution, but which samples they are
            depends on how much was drafted when, and so on the time that it took.
        draft_model: a small model of the same vocabulary that drafts instead; it reads the first specialist's prompts.

    Attributes:
        max_batch: as given.
        stats: what was done so far.

    Raises:
        UltrafuserError: max_batch below 1, a model in training mode, an architecture that cannot be decoded this way, a
            drafter that cannot be had here, or a draft model of a smaller vocabulary or on another device.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 8,
        speculation: SpeculationParams | None = None,
        draft_model: PreTrainedModel | None = None,
    ) -> None:
        if max_batch < 1:
            raise UltrafuserError(f"max_batch must be at least 1, got {max_batch}.")
        if model.training:
            raise UltrafuserError(
                "the model is in training mode, in which it leaves out at random. Call model.eval()."
            )
        self._model, self._tokenizer, self.max_batch = model, tokenizer, max_batch
        self._heads = model.bank.heads()
        _, weights = scale_hidden_states(
            [torch.zeros(1, size, device=model.device) for size in model.bank.hidden_sizes],
            torch.zeros(1, model.num_specialists, device=model.device),
            self._heads,
        )
        self._head_weights = [PackedLinear(weight) for weight in weights]
        self._backbones = open_backbones(model.bank)
        self._waiting: deque[Conversation] = deque()
        self._active: list[Conversation] = []  # its place is its slot
        self._ids = itertools.count()
        # Of requests that `stream` and `respond` have handed in: tokens that are not read yet.
        self._queues: dict[int, deque[TokenStep]] = {}
        self.stats = DecodingStats()
        self._num = model.num_specialists
        self._folded = self._backbones[0].rows_per_slot == self._num
        self._speculates = speculation is not None or draft_model is not None
        self._params = SpeculationParams() if speculation is None else speculation
        self._drafter, kind = None, "lookup"
        if self._speculates:
            self._drafter, kind = open_drafter(
                model, self._backbones, self._head_weights, self._params, draft_model
            )
        self._reuses_states = kind == "specialist"
        # Not a method of this object: a decoder in a cycle would keep its packed weights until Python looks for cycles.
        guess = partial(
            _guessed_cost,
            1 if self._folded else self._num,
            self._reuses_states,
            self._drafter is not None,
        )
        self._draft_length = DraftLength(guess, not self._reuses_states, self._params.max_draft)

    @property
    def num_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def waiting_ids(self) -> tuple[int, ...]:
        """Ids of requests without a slot, in the order in which they came."""
        return tuple(conversation.request_id for conversation in self._waiting)

    @property
    def num_active(self) -> int:
        """Conversations in slots."""
        return len(self._active)

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, only: str | None = None
    ) -> int:
        """Hand in a request.

        Args:
            prompts: token ids for each of the N specialists, as `ConversationEncoder.prompt` gives.
            params: how the response is made.
            only: name of a specialist that answers alone, as under a gate that gives it the whole weight.

        Returns:
            The id under which `step` reports its tokens.

        Raises:
            UltrafuserError: another number of prompts than N, an empty one, an id that is no token, or no such
                specialist.
            ConversationTooLongError: a prompt and max_new_tokens are more than its specialist can read.
        """
        conversation = self._conversation(prompts, params, only)
        if params.max_new_tokens > 0:
            self._waiting.append(conversation)
        return conversation.request_id

    def _conversation(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, only: str | None
    ) -> Conversation:
        model = self._model
        if len(prompts) != model.num_specialists or not all(prompts):
            raise UltrafuserError(
                f"expected {model.num_specialists} prompts, one for each specialist and none of them empty, got "
                f"prompts of {[len(prompt) for prompt in prompts]} tokens."
            )
        if only is not None and only not in model.specialist_names:
            raise UltrafuserError(
                f"there is no specialist {only!r}; there are {', '.join(model.specialist_names)}."
            )
        limits = model.bank.context_lengths
        for name, prompt, limit in zip(model.specialist_names, prompts, limits, strict=True):
            if not 0 <= min(prompt) <= max(prompt) < model.bank.vocab_size:
                raise UltrafuserError(
                    f"the prompt for specialist {name} must hold token ids from 0 to {model.bank.vocab_size - 1}, got "
                    f"{min(prompt)} to {max(prompt)}. Encode it with the model's own tokenizer."
                )
            if limit is not None and len(prompt) + params.max_new_tokens > limit:
                raise ConversationTooLongError(
                    f"specialist {name} reads at most {limit} tokens, but the prompt has {len(prompt)} and "
                    f"max_new_tokens is {params.max_new_tokens}. Shorten the conversation or lower max_new_tokens."
                )
        return Conversation(
            next(self._ids),
            [list(prompt) for prompt in prompts],
            Sampler(params, prompts[0]),
            StoppedText(self._tokenizer, params.stop),
            None if only is None else model.specialist_names.index(only),
            Lookup(prompts[0] if self._speculates else (), self._params),
        )

    @torch.inference_mode()
    def cancel(self, request_id: int) -> None:
        """Forget a request; nothing if it is done."""
        self._queues.pop(request_id, None)
        self._waiting = deque(c for c in self._waiting if c.request_id != request_id)
        for conversation in self._active:
            if conversation.request_id == request_id:
                self._leave(conversation)
                return

    @torch.inference_mode()
    def step(self) -> list[tuple[int, TokenStep]]:
        """Give every conversation in a slot its next token, after letting waiting ones into free slots.

        If it fails (for want of memory, say), the conversations in slots are forgotten, since what their caches hold is
        not known; those that wait go on waiting.

        Returns:
            (request id, token) in the order of the responses; empty when there is nothing to do.
        """
        known = self._active.copy()
        newcomers = [
            self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch - len(known)))
        ]
        self._active += sorted(newcomers, key=_longest_prompt)  # prompts that are read together are in a row
        chosen: list[_Chosen] = []
        try:
            if known:
                chosen += self._advance(known)
            first = len(known)
            while first < len(self._active):
                read = self._read_prompts(first)
                chosen += read
                first += len(read)
            return [emitted for found in chosen for emitted in self._say(found)]
        except BaseException:
            for conversation in self._active:
                self._queues.pop(conversation.request_id, None)
            self._active.clear()
            raise

    def stream(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, only: str | None = None
    ) -> Iterator[TokenStep]:
        """One response, token by token; see `submit` and `respond`. Leaving the iterator early cancels it."""
        return self._stream(self._conversation(prompts, params, only))

    def respond(
        self, requests: Iterable[tuple[Sequence[Sequence[int]], SamplingParams]]
    ) -> Iterator[tuple[int, list[TokenStep]]]:
        """Answer many requests; see `submit`. Leaving the iterator early cancels those that are not done.

        Args:
            requests: (prompts, params) each; read as slots become free.

        Yields:
            (index of the request, its response), in the order in which they are done.

        Raises:
            UltrafuserError: as `submit`; or a request was dropped because a step failed while another reader waited.
        """
        source = enumerate(requests)
        responses: dict[int, tuple[int, list[TokenStep]]] = {}
        try:
            while True:
                while len(responses) < self.max_batch:
                    index, request = next(source, (None, None))
                    if index is None or request is None:
                        break
                    if request[1].max_new_tokens == 0:
                        self._conversation(*request, None)  # refused like any other
                        yield index, []
                        continue
                    responses[self._hand_in(self._conversation(*request, None))] = (index, [])
                if not responses:
                    return
                self._step_for_queues(responses)
                for request_id, (index, tokens) in list(responses.items()):
                    queue = self._queues.get(request_id)
                    if queue is None:
                        continue  # dropped while a response was taken: the next step says so
                    tokens += queue
                    queue.clear()
                    if tokens and tokens[-1].finish is not None:
                        del responses[request_id], self._queues[request_id]
                        yield index, tokens
        finally:
            for request_id in responses:
                self.cancel(request_id)

    def _stream(self, conversation: Conversation) -> Iterator[TokenStep]:
        if conversation.params.max_new_tokens == 0:
            return
        request_id = self._hand_in(conversation)  # now, not before the first token is asked for
        queue = self._queues[request_id]
        try:
            while True:
                while not queue:
                    self._step_for_queues([request_id])
                token = queue.popleft()
                yield token
                if token.finish is not None:
                    return
        finally:
            self.cancel(request_id)

    def _hand_in(self, conversation: Conversation) -> int:
        """Let a conversation wait for a slot, and its tokens for `stream` or `respond`."""
        self._waiting.append(conversation)
        self._queues[conversation.request_id] = deque()
        return conversation.request_id

    def _step_for_queues(self, waited_for: Iterable[int]) -> None:
        """Step, and put tokens where their readers look; those waited for must still be there."""
        if any(request_id not in self._queues for request_id in waited_for):
            raise UltrafuserError("a request was dropped when a step failed for another reader. Ask again.")
        for request_id, token in self.step():
            if request_id in self._queues:
                self._queues[request_id].append(token)

    def _read_prompts(self, first: int) -> list[_Chosen]:
        """Read prompts of conversations from slot `first` on, and choose their first tokens.

        Those whose prompts are up to twice as long take part: reading them together fills shorter ones up.
        """
        most = 2 * _longest_prompt(self._active[first])
        newcomers = list(itertools.takewhile(lambda c: _longest_prompt(c) <= most, self._active[first:]))
        rows = [torch.tensor(prompt) for c in newcomers for prompt in c.prompts]
        ids = pad_sequence(rows, batch_first=True).view(len(newcomers), self._model.num_specialists, -1)
        lengths = torch.tensor([[len(prompt) for prompt in c.prompts] for c in newcomers])
        states = self._read(ids, Slots(range(first, first + len(newcomers))), torch.zeros_like(lengths))
        for conversation, read in zip(newcomers, lengths.tolist(), strict=True):
            conversation.read = read
        places = torch.arange(len(newcomers))
        last = [state[places, lengths[:, index] - 1].unsqueeze(1) for index, state in enumerate(states)]
        return self._choose(newcomers, [Draft() for _ in newcomers], last, [1] * len(newcomers))

    def _advance(self, conversations: list[Conversation]) -> list[_Chosen]:
        """Read every conversation's last token, and a draft of what follows where that pays."""
        start = time.perf_counter()
        reads_prompts = self._drafter is not None and self._drafter.reads_prompts(conversations)
        drafts = self._drafts(conversations)
        reused = self._reuses_states and any(draft.tokens for draft in drafts)
        chosen = (self._read_others if reused else self._read_on)(conversations, drafts)
        for found, draft in zip(chosen, drafts, strict=True):
            if self._drafter is not None:
                self._drafter.settle(found.conversation, draft, len(found.tokens))
            found.conversation.read = [read + len(found.tokens) for read in found.conversation.read]
        if self._speculates:
            longest = max(len(draft.tokens) for draft in drafts)
            num_tokens = sum(len(found.tokens) for found in chosen)
            if not (longest and reads_prompts):  # what is read once says nothing of further steps
                seconds = time.perf_counter() - start
                self._draft_length.observe(len(conversations), longest, num_tokens, seconds)
        self.stats.steps += 1
        return chosen

    def _drafts(self, conversations: list[Conversation]) -> list[Draft]:
        """A draft for every conversation; an empty one where drafting does not pay."""
        # The pass that verifies K tokens also gives the one after them, unless the drafter's states are reused.
        room = [c.tokens_left - (not self._reuses_states) for c in conversations]
        if not self._speculates:
            return [Draft() for _ in conversations]
        if self._drafter is None:
            ahead: list[list[int]] = [[] for _ in conversations]
            return looked_up(conversations, ahead, room, self._draft_length, self._params.max_draft)
        length = self._draft_length.best(len(conversations), [c.acceptance_of(0).rate for c in conversations])
        if not length:
            for conversation in conversations:
                conversation.acceptance_of(0).fade()
            return [Draft() for _ in conversations]
        return self._drafter.draft(conversations, [min(length, most) for most in room], self.stats)

    def _read_on(self, conversations: list[Conversation], drafts: list[Draft]) -> list[_Chosen]:
        """One pass of all specialists over last tokens and drafts; it also gives the token after a whole draft."""
        rows = [[c.response[-1], *draft.tokens] for c, draft in zip(conversations, drafts, strict=True)]
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).unsqueeze(1)
        starts = torch.tensor([c.read for c in conversations])
        self.stats.passes += len(self._backbones)
        states = self._read(ids.expand(-1, self._num, -1), Slots(range(len(conversations))), starts)
        return self._choose(conversations, drafts, states, [len(row) for row in rows])

    def _read_others(self, conversations: list[Conversation], drafts: list[Draft]) -> list[_Chosen]:
        """One pass of the specialists that did not draft over drafts, whose own states are there already."""
        read = [[c.response[-1], *draft.tokens[:-1]] for c, draft in zip(conversations, drafts, strict=True)]
        starts = torch.tensor([c.read for c in conversations])
        states = []
        for j, backbone in enumerate(self._backbones):
            parts: dict[int, Tensor] = {
                row: torch.cat(drafts[row].states) for row, c in enumerate(conversations) if c.favourite == j
            }
            if rows := [row for row, c in enumerate(conversations) if c.favourite != j]:
                ids = pad_sequence([torch.tensor(read[row]) for row in rows], batch_first=True)
                self.stats.passes += 1
                found = backbone.read(
                    ids.unsqueeze(1).to(self._model.device), Slots(rows), starts[rows, j : j + 1]
                )
                parts |= dict(zip(rows, found[:, 0], strict=True))
            states.append(pad_sequence([parts[row] for row in range(len(conversations))], batch_first=True))
        return self._choose(conversations, drafts, states, [len(draft.tokens) for draft in drafts])

    def _read(self, ids: Tensor, slots: Slots, starts: Tensor) -> list[Tensor]:
        """Run all specialists over ids (A, N, T): N tensors (A, T, H_j)."""
        ids = ids.to(self._model.device)
        if self._folded:
            return list(self._backbones[0].read(ids, slots, starts).unbind(1))
        return [
            backbone.read(ids[:, j : j + 1], slots, starts[:, j : j + 1])[:, 0]
            for j, backbone in enumerate(self._backbones)
        ]

    def _choose(
        self,
        conversations: Sequence[Conversation],
        drafts: Sequence[Draft],
        states: Sequence[Tensor],
        counts: Sequence[int],
    ) -> list[_Chosen]:
        """Fuse, and take the tokens that stand.

        Args:
            conversations: A of them.
            drafts: of each.
            states: N tensors (A, T, H_j).
            counts: how many of the T positions of each conversation predict a token.
        """
        rows = torch.tensor([a for a, count in enumerate(counts) for _ in range(count)])
        columns = torch.tensor([t for count in counts for t in range(count)])
        owners = [conversations[a] for a in rows.tolist()]
        logits, weights = self._fuse([state[rows, columns] for state in states], owners)
        best = logits.max(dim=-1)
        if not bool(best.values.isfinite().all()):
            raise UltrafuserError(
                "the fused logits are not finite: a weight of a specialist or of the gate is not, or numbers are too "
                "large for the dtype. Open the model in float32; if that does not help, its files are damaged."
            )
        likeliest = best.indices.tolist()
        chosen, first = [], 0
        for conversation, draft, count in zip(conversations, drafts, counts, strict=True):
            part = slice(first, first + count)
            num_accepted, following = _standing(conversation, draft, logits[part], likeliest[part])
            tokens = [*draft.tokens[:num_accepted], *following]
            chosen.append(_Chosen(conversation, tokens, weights[part], logits[part]))
            if draft.tokens:
                conversation.acceptance_of(draft.kind).observe(len(draft.tokens), num_accepted)
                self.stats.drafts += 1
                self.stats.drafted += len(draft.tokens)
                self.stats.accepted += num_accepted
            first += count
        return chosen

    def _fuse(self, states: Sequence[Tensor], owners: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
        """Logits (R, V) and weights (R, N) for states N x (R, H_j); each row belongs to a conversation."""
        weights = self._model.gate(states)
        for row, conversation in enumerate(owners):
            if conversation.only is not None:
                weights[row] = 0
                weights[row, conversation.only] = 1
        inputs, _ = scale_hidden_states(states, weights, self._heads)
        parts = [head(x) for head, x in zip(self._head_weights, inputs, strict=True)]
        return sum(parts[1:], parts[0]), weights

    def _say(self, chosen: _Chosen) -> Iterator[tuple[int, TokenStep]]:
        """Make chosen tokens part of the response, up to the one that ends it."""
        conversation, tokens, weights, logits = chosen
        params = conversation.params
        for token, weight, row in zip(tokens, weights.tolist(), logits, strict=False):
            conversation.response.append(token)
            conversation.sampler.said([token])
            if self._speculates:
                conversation.lookup.extend([token])
            conversation.favourite = max(range(self._num), key=weight.__getitem__)
            self.stats.tokens += 1
            text = "" if token == self._model.config.end_token_id else conversation.text.push(token)
            finish = self._finish(conversation)
            if finish is not None:
                text += conversation.text.flush()
                finish = self._finish(conversation)  # what was held back may be the rest of a stop text
                self._leave(conversation)
            logprob, alternatives = _log_probabilities(row, token, params.logprobs)
            yield (
                conversation.request_id,
                TokenStep(token, tuple(weight), text, logprob, alternatives, finish),
            )
            if finish is not None:
                return

    def _finish(self, conversation: Conversation) -> FinishReason | None:
        if conversation.text.stopped:
            return "stop"
        if conversation.response[-1] == self._model.config.end_token_id:
            return "end"
        return "length" if conversation.tokens_left == 0 else None

    def _leave(self, conversation: Conversation) -> None:
        """Free a slot; the last conversation moves into it, so that slots stay without gaps."""
        slot, last = self._active.index(conversation), self._active[-1]
        if last is not conversation:
            for index, backbone in enumerate(self._backbones):
                length = max(last.read) if self._folded else last.read[index]
                backbone.move(len(self._active) - 1, slot, length)
            if self._drafter is not None:
                self._drafter.move(last, len(self._active) - 1, slot)
            self._active[slot] = last
        self._active.pop()


def _longest_prompt(conversation: Conversation) -> int:
    return max(map(len, conversation.prompts))


def _guessed_cost(models: int, reuses_states: bool, has_drafter: bool, num_drafted: int) -> float:
    """Time of a step that drafts over a plain one's, until it is known: a token more costs a pass little."""
    if reuses_states:
        return (num_drafted + (models - 1) * (1 + 0.05 * (num_drafted - 1))) / models
    drafting = 0.4 * num_drafted / models if has_drafter else 0.0
    return 1 + 0.05 * num_drafted + drafting


def _standing(
    conversation: Conversation, draft: Draft, logits: Tensor, likeliest: Sequence[int]
) -> tuple[int, list[int]]:
    """How many drafted tokens the fused model accepts, and its own token behind them, if there is one."""
    sampler = conversation.sampler
    between = draft.tokens[: len(logits) - 1]
    if sampler.params.greedy:
        if not sampler.takes_likeliest:
            likeliest = sampler.greedy_tokens(logits, between).tolist()
        num_accepted, following = accept_greedy(draft.tokens, likeliest)
    else:
        probabilities = sampler.probabilities(logits, between)
        num_accepted, following = accept(
            draft.tokens,
            torch.stack(draft.distributions) if draft.distributions else None,
            probabilities,
            sampler,
        )
    return num_accepted, [] if following is None else [following]


def _log_probabilities(
    logits: Tensor, token: int, num_alternatives: int | None
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if num_alternatives is None:
        return None, ()
    scores = logits.float().log_softmax(dim=-1)
    best = scores.topk(min(num_alternatives, len(scores)))
    return float(scores[token]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
