"""Per-specialist chat templates with aligned responses.

Each specialist reads a conversation in its own Jinja chat template (paper, section 3.1). Response tokens are
tokenised once, apart from any template, and appended to every specialist's prompt, so that the R response
tokens are the same for all specialists although the prompts differ in text and length. For each specialist
the positions whose outputs predict response tokens are known; the model gathers hidden states there. Every
response ends with one agreed end token. Training (`encode`, `collate`) and generation (`prompt`,
`batch_prompts`) share one way of reading a conversation.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ultrafuser.errors import ConversationTooLongError, TemplateError

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Conversation = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`: an optional system message, then user and assistant in turn."""

# Each writes a response directly behind its generation prompt: no space stands between, because the response
# is tokenised apart and has to be the same token ids for every specialist.
BUILTIN_TEMPLATES: dict[str, str] = {
    "ultralm": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n' }}"
        "{% else %}{{ 'Assistant:' + message['content'] }}{{ eos_token }}{{ '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    "llama-instruct": (
        "{% set state = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set state.system = '<<SYS>>\n' + message['content'] + '\n<</SYS>>\n\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ bos_token }}{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}"
        "{% set state.system = '' %}"
        "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
        "{{ 'Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n' }}{% endif %}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
        "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ '### Response:' + message['content'] }}{{ eos_token }}{{ '\n\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
    ),
}
"""Jinja chat templates by name: the three of the paper, for any number of turns and an optional system
message.

All begin with `bos_token` where the tokenizer has one and close a response with `eos_token`. In "alpaca" a
system message takes the place of the standard first sentence.
"""


def resolve_template(name_or_jinja: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Turn a recipe's `template` setting into Jinja text.

    Args:
        name_or_jinja: A name in `BUILTIN_TEMPLATES`, "tokenizer" for the tokenizer's own chat template, or
            Jinja itself (anything that contains "{{" or "{%").
        tokenizer: The tokenizer whose own template "tokenizer" stands for.

    Returns:
        The Jinja text of the template.

    Raises:
        TemplateError: If the name is unknown, or the tokenizer has no chat template of its own.
    """
    if "{{" in name_or_jinja or "{%" in name_or_jinja:
        return name_or_jinja
    if name_or_jinja in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[name_or_jinja]
    known = ["tokenizer", *BUILTIN_TEMPLATES]
    if name_or_jinja == "tokenizer":
        try:
            return tokenizer.get_chat_template()
        except ValueError as error:
            raise TemplateError(
                'template "tokenizer" stands for the chat template of the tokenizer, but this tokenizer has '
                f"none to use by default. Name one of {', '.join(BUILTIN_TEMPLATES)}, or give Jinja text."
            ) from error
    nearest = difflib.get_close_matches(name_or_jinja, known, n=1, cutoff=0.0)[0]
    raise TemplateError(
        f"template must be one of {', '.join(known)}, or Jinja text, got {name_or_jinja!r}. "
        f"Did you mean {nearest!r}?"
    )


def vocabulary_difference(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """Compare the token-to-id maps of two tokenizers.

    Fused logits are a sum over one vocabulary, so every token has to have the same id for every specialist.

    Returns:
        None if the maps agree, else a sentence that names up to 5 differing tokens with both ids.
    """
    ids, other_ids = first.get_vocab(), second.get_vocab()
    differing = [token for token in ids.keys() | other_ids.keys() if ids.get(token) != other_ids.get(token)]
    if not differing:
        return None
    differing.sort(key=lambda token: (ids.get(token, len(ids)), other_ids.get(token, -1), token))
    named = ", ".join(
        f"{token!r} ({ids.get(token, 'absent')} against {other_ids.get(token, 'absent')})"
        for token in differing[:5]
    )
    rest = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    noun = "token differs" if len(differing) == 1 else "tokens differ"
    return f"{len(differing)} {noun} in id: {named}{rest}."


def conversation_problem(messages: Any, *, last_role: Literal["user", "assistant"]) -> str | None:
    """Say what keeps `messages` from being a conversation, if anything does.

    Args:
        messages: What should be a sequence of `{"role": ..., "content": ...}`: an optional system message,
            then user and assistant in turn, beginning with the user.
        last_role: The role the last message must have: "assistant" for training, "user" for generation.

    Returns:
        None for a valid conversation, else the problem as a clause without a full stop.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        return "a conversation must be a list of at least one message"
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            return f"message {index} must be an object with role and content"
        if not isinstance(message["content"], str):
            return f"message {index} must have text as its content, got {type(message['content']).__name__}"
        if _LONE_SURROGATE.search(message["content"]):
            return f"message {index} holds half of a surrogate pair, which is not valid Unicode"
    has_system = messages[0]["role"] == "system"
    for index, message in enumerate(messages[has_system:], start=int(has_system)):
        expected = "user" if (index - has_system) % 2 == 0 else "assistant"
        if message["role"] != expected:
            return (
                f"message {index} must have the role {expected!r}, got {message['role']!r}: after an "
                "optional system message, user and assistant take turns and the user begins"
            )
    if messages[-1]["role"] != last_role:
        return f"the last message must have the role {last_role!r}, got {messages[-1]['role']!r}"
    return None


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """One conversation as every specialist reads it.

    Attributes:
        input_ids: For each specialist the token ids of its whole reading, the last response token included.
        response_positions: For each specialist R indices into its `input_ids`: the position whose output
            predicts response token r, one before that token itself.
        labels: The R response token ids, end tokens included, shared by all specialists.
    """

    input_ids: tuple[list[int], ...]
    response_positions: tuple[list[int], ...]
    labels: list[int]


class ConversationEncoder:
    """Turns conversations into token ids for every specialist, with responses aligned.

    BOS comes from the templates; no special tokens are added otherwise. A string such as "</s>" inside a
    response is read as plain text. Inside system and user messages it is parsed as the special token, because
    a rendered prompt is tokenised as one string, exactly as Hugging Face's `apply_chat_template` does.

    What a template writes directly behind its generation prompt and in front of a response may only be white
    space; it is left out, so that training sees what generation begins with.

    Attributes:
        names: Names of the specialists, in the order of all per-specialist results.
        end_token_id: Token id that ends every response.
        pad_token_id: Token id written where nothing is read.
        max_length: Tokens each specialist can read, by name.

    Args:
        tokenizer: The tokenizer all specialists share.
        templates: Specialist name to Jinja text (see `resolve_template`).
        end_token_id: The agreed token that ends every response.
        max_length: Tokens each specialist can read: by name, or one number for all.

    Raises:
        TemplateError: If a template cannot be aligned or ends responses with another special token,
            `max_length` does not cover every specialist, or `end_token_id` is not in the vocabulary.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        templates: Mapping[str, str],
        *,
        end_token_id: int,
        max_length: Mapping[str, int] | int,
    ) -> None:
        if not templates:
            raise TemplateError("templates must name at least one specialist, got none.")
        if not 0 <= end_token_id < len(tokenizer):
            raise TemplateError(
                f"end_token_id must be a token of the vocabulary, 0 to {len(tokenizer) - 1}, "
                f"got {end_token_id}."
            )
        limits = dict.fromkeys(templates, max_length) if isinstance(max_length, int) else dict(max_length)
        if limits.keys() != templates.keys():
            raise TemplateError(
                f"max_length must name the same specialists as templates ({', '.join(templates)}), "
                f"got {', '.join(limits)}."
            )
        self.names = tuple(templates)
        self.end_token_id = end_token_id
        self.pad_token_id: int = end_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.max_length = limits
        self._tokenizer = tokenizer
        self._templates = dict(templates)
        self._end_text: str = self._decode([end_token_id], skip_special_tokens=False)
        probe = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
        for name in self.names:
            self._glue(name, probe)
            self._require_end(name, probe)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer all specialists share."""
        return self._tokenizer

    def encode(
        self, messages: Conversation, *, too_long: Literal["truncate", "error"] = "error"
    ) -> EncodedConversation:
        """Encode a conversation for training; every assistant message carries loss.

        Args:
            messages: A conversation that ends with an assistant message.
            too_long: What to do when a specialist cannot read it all: "error", or "truncate", which cuts
                response tokens from the end of the conversation, at the same count for every specialist,
                until all fit.

        Returns:
            The token ids, response positions and labels.

        Raises:
            TemplateError: If `messages` is not such a conversation, a template cannot be aligned with it, it
                is too long, or not one response token is left after the cut.
        """
        problem = conversation_problem(messages, last_role="assistant")
        if problem is not None:
            raise TemplateError(f"Cannot encode for training: {problem}.")
        responses = self._responses(messages)
        readings = [self._read(name, messages, responses) for name in self.names]
        labels = [token for response in responses for token in response]
        keep = len(labels)
        for name, (ids, positions) in zip(self.names, readings, strict=True):
            limit = self.max_length[name]
            if len(ids) <= limit:
                continue
            keep = min(keep, sum(position + 2 <= limit for position in positions))
            if too_long == "error" or keep == 0:
                raise ConversationTooLongError(
                    f"Specialist {name!r} reads at most {limit} tokens, but the conversation has {len(ids)} "
                    f"in its template, {positions[0] + 1} of them before the first response. "
                    "Shorten the conversation" + (" or allow it to be truncated." if keep else ".")
                )
        return EncodedConversation(
            input_ids=tuple(ids[: positions[keep - 1] + 2] for ids, positions in readings),
            response_positions=tuple(positions[:keep] for _, positions in readings),
            labels=labels[:keep],
        )

    def prompt(self, messages: Conversation, *, max_new_tokens: int = 1) -> list[list[int]]:
        """Encode a conversation for generating its next assistant message.

        Earlier responses are read exactly as in `encode`: the prompt of `messages` is the beginning of what
        `encode` gives for `messages` with the response added.

        Args:
            messages: A conversation that ends with a user message.
            max_new_tokens: Tokens that must still fit behind the prompt.

        Returns:
            Token ids for each specialist, in the order of `names`.

        Raises:
            TemplateError: If `messages` is not such a conversation, a template cannot be aligned with it, or
                a prompt is longer than the specialist's limit minus `max_new_tokens`.
        """
        problem = conversation_problem(messages, last_role="user")
        if problem is not None:
            raise TemplateError(f"Cannot write a prompt: {problem}.")
        responses = self._responses(messages)
        prompts = [self._read(name, messages, responses)[0] for name in self.names]
        for name, ids in zip(self.names, prompts, strict=True):
            if len(ids) + max_new_tokens > self.max_length[name]:
                raise ConversationTooLongError(
                    f"Specialist {name!r} reads at most {self.max_length[name]} tokens, but the prompt has "
                    f"{len(ids)} in its template and max_new_tokens is {max_new_tokens}. Shorten the "
                    "conversation or lower max_new_tokens."
                )
        return prompts

    def batch_prompts(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int = 1
    ) -> dict[str, Tensor]:
        """Encode several conversations for generation, padded on the left.

        Args:
            conversations: B conversations, each ending with a user message.
            max_new_tokens: Tokens that must still fit behind each prompt.

        Returns:
            int64 tensors: `specialist_input_ids` and `specialist_attention_mask` (B, N, P); `input_ids` and
            `attention_mask` (B, P0), the first specialist's prompts, which `generate` puts before its output.

        Raises:
            TemplateError: As `prompt` does, for any of the conversations.
        """
        prompts = [self.prompt(messages, max_new_tokens=max_new_tokens) for messages in conversations]
        padded, mask = _pad([ids for row in prompts for ids in row], self.pad_token_id, side="left")
        first, first_mask = _pad([row[0] for row in prompts], self.pad_token_id, side="left")
        shape = (len(prompts), len(self.names), -1)
        return {
            "specialist_input_ids": padded.view(shape),
            "specialist_attention_mask": mask.view(shape),
            "input_ids": first,
            "attention_mask": first_mask,
        }

    def collate(self, conversations: Sequence[EncodedConversation]) -> dict[str, Tensor]:
        """Join encoded conversations into a training batch, padded on the right.

        Args:
            conversations: B results of `encode`.

        Returns:
            int64 tensors: `specialist_input_ids` and `specialist_attention_mask` (B, N, T),
            `response_positions` (B, N, R) padded with 0, `labels` (B, R) padded with -100.
        """
        ids, mask = _pad([ids for item in conversations for ids in item.input_ids], self.pad_token_id)
        positions, _ = _pad([row for item in conversations for row in item.response_positions], 0)
        labels, _ = _pad([item.labels for item in conversations], -100)
        shape = (len(conversations), len(self.names), -1)
        return {
            "specialist_input_ids": ids.view(shape),
            "specialist_attention_mask": mask.view(shape),
            "response_positions": positions.view(shape),
            "labels": labels,
        }

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of one response, up to its end token if it has one."""
        ids = list(token_ids)
        if self.end_token_id in ids:
            ids = ids[: ids.index(self.end_token_id)]
        return self._decode(ids, skip_special_tokens=True)

    def _decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _tokenize(self, text: str, *, split_special_tokens: bool) -> list[int]:
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens, verbose=False
        )["input_ids"]

    def _responses(self, messages: Conversation) -> list[list[int]]:
        """Tokenise each assistant message apart from any template and end it with the end token."""
        return [
            [*self._tokenize(message["content"], split_special_tokens=True), self.end_token_id]
            for message in messages
            if message["role"] == "assistant"
        ]

    def _read(
        self, name: str, messages: Conversation, responses: list[list[int]]
    ) -> tuple[list[int], list[int]]:
        """Return one specialist's token ids and the positions that predict response tokens."""
        ids: list[int] = []
        positions: list[int] = []
        for turn, glue in enumerate(self._glue(name, messages)):
            ids += self._tokenize(glue, split_special_tokens=False)
            if not ids:
                raise self._cannot_align(name, "it writes nothing before the first response")
            if turn < len(responses):
                positions += range(len(ids) - 1, len(ids) - 1 + len(responses[turn]))
                ids += responses[turn]
        return ids, positions

    def _glue(self, name: str, messages: Conversation) -> list[str]:
        """Return the text before each response, and before the next one if a user message comes last.

        Responses are replaced by sentinels before rendering. The text before each sentinel must be what
        rendering the messages so far with a generation prompt gives, or training would not show what
        generation begins with.
        """
        marked, sentinels = _mark_responses(messages)
        ends_with_user = messages[-1]["role"] == "user"
        full = self._render(name, marked, add_generation_prompt=ends_with_user)
        glue, cursor = [], 0
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for turn, (index, sentinel) in enumerate(zip(turns, sentinels, strict=True)):
            if full.count(sentinel) != 1:
                how = "repeats" if sentinel in full else "drops or rewrites"
                raise self._cannot_align(name, f"it {how} response {turn}")
            start = full.index(sentinel)
            prompt = self._render(name, marked[:index], add_generation_prompt=True)
            if start < cursor or len(prompt) < cursor:
                raise self._cannot_align(name, f"response {turn} does not follow the response before it")
            before = full[:start]
            if not before.startswith(prompt) or before[len(prompt) :].strip():
                raise self._cannot_align(
                    name,
                    f"before response {turn} it writes {before[cursor:][-60:]!r}, but as a generation prompt "
                    f"{prompt[cursor:][-60:]!r}",
                )
            glue.append(prompt[cursor:])
            cursor = start + len(sentinel)
        if ends_with_user:
            glue.append(full[cursor:])
        return [glue[0], *map(self._without_end_text, glue[1:])]

    def _require_end(self, name: str, messages: Conversation) -> None:
        """Refuse a template that closes a response by another special token than the agreed one.

        A frozen specialist would never say the agreed end, and would say its own where nobody stops.
        """
        marked, sentinels = _mark_responses(messages)
        behind = self._render(name, marked, add_generation_prompt=False).partition(sentinels[-1])[2].lstrip()
        if behind.startswith(self._end_text):
            return
        for token in self._tokenizer.all_special_tokens:
            if behind.startswith(token):
                raise TemplateError(
                    f"The template of specialist {name!r} ends a response with {token!r}, but the agreed end token is "
                    f"{self._end_text!r}. Set end_token: {token!r}, or give the specialist a template that ends with "
                    f"{self._end_text!r}."
                )

    def _without_end_text(self, glue: str) -> str:
        """Drop the end token's text behind a response: its id is already there."""
        stripped = glue.lstrip()
        return stripped.removeprefix(self._end_text) if stripped.startswith(self._end_text) else glue

    def _render(self, name: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._templates[name],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program: it can fail in any way
            raise TemplateError(
                f"The template of specialist {name!r} cannot render the roles "
                f"{', '.join(message['role'] for message in messages)}: {error}"
            ) from error

    def _cannot_align(self, name: str, reason: str) -> TemplateError:
        return TemplateError(
            f"The template of specialist {name!r} cannot be aligned with the responses: {reason}. "
            "Choose or write a template that puts each response once, unchanged, directly behind its "
            "generation prompt."
        )


def _mark_responses(messages: Conversation) -> tuple[list[dict[str, str]], list[str]]:
    """Replace each response by a sentinel: in no message, and broken by any change of case."""
    stem = "uLtRaFuSeR"
    while any(stem in message["content"] for message in messages):
        stem += "xQ"
    marked: list[dict[str, str]] = []
    sentinels: list[str] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            content = (
                f"{stem}{len(sentinels)}e"  # the last letter keeps number 1 from being part of number 11
            )
            sentinels.append(content)
        marked.append({"role": message["role"], "content": content})
    return marked, sentinels


def _pad(
    rows: Sequence[list[int]], value: int, *, side: Literal["left", "right"] = "right"
) -> tuple[Tensor, Tensor]:
    """Pad rows to one length; returns int64 (rows, length) and the mask of what is not padding."""
    length = max(map(len, rows))
    padded = torch.full((len(rows), length), value, dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for index, row in enumerate(rows):
        where = slice(length - len(row), None) if side == "left" else slice(len(row))
        padded[index, where] = torch.tensor(row, dtype=torch.int64)
        mask[index, where] = 1
    return padded, mask
