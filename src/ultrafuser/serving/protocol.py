"""What clients say and hear: OpenAI's requests and responses, with one field more.

A setting that would change a response and is not known here is refused, not passed over. Every choice (of a chunk, too)
carries `fusion`: the names of the specialists, and for each token its text and how much each specialist counted.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from transformers import PreTrainedTokenizerBase

from ultrafuser.decoding.engine import TokenStep
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.decoding.text import TextStream, TokenBytes

FINISH_REASONS = {"end": "stop", "stop": "stop", "length": "length"}
"""The engine's words -> OpenAI's."""

Zero = Annotated[float, Field(ge=0, le=0)]
Text = Annotated[str, AfterValidator(lambda text: _whole(text))]
"""A text in which no half of a character stands alone: JSON can write one, but no tokenizer reads it."""
StopText = Annotated[Text, Field(max_length=256)]


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (a surrogate) at place {error.start}") from error
    return text


class _Strict(BaseModel):
    """Takes what it knows and nothing else, and is soon done with what is wrong: only the first mistake is told.

    Half a million of them fit into a request, and while they are counted nobody else is served. Hence `fail_fast` for
    all lists, too.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_is_enough(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unknown = [key for key in values if key not in cls.model_fields]
        return {key: values[key] for key in values if key in cls.model_fields or key == unknown[0]}


class TextPart(_Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(default=None, description="not read")
    # A message as it came from an endpoint; what is in these, if anything, could not be read here.
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    parsed: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(default=None, description="not done")


class TextFormat(_Strict):
    """The only form of a response that there is here."""

    type: Literal["text"]


def _nullable(schema: dict[str, Any]) -> None:
    """Say so in the API's description, too."""
    for name, described in schema["properties"].items():
        if name not in schema["required"]:
            schema["properties"][name] = {"anyOf": [described, {"type": "null"}]}


class _Request(_Strict):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(json_schema_extra=_nullable)

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, ge=0, le=1)
    n: int = Field(default=1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16, fail_fast=True)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = Field(default=None, description="not read")
    metadata: dict[str, Any] | None = Field(default=None, description="not read")
    store: bool | None = Field(default=None, description="nothing is kept")
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    top_k: int = Field(default=0, ge=0, description="not OpenAI's: sample among so many; 0 among all")
    min_p: float = Field(default=0.0, ge=0, le=1, description="not OpenAI's: see `SamplingParams`")
    repetition_penalty: float = Field(default=1.0, gt=0, description="not OpenAI's: see `SamplingParams`")
    specialist: str | None = Field(
        default=None, description="not OpenAI's: the specialist that answers alone"
    )

    @model_validator(mode="before")
    @classmethod
    def _null_is_default(cls, values: Any) -> Any:
        """Clients send null for what is not set."""
        return (
            {key: value for key, value in values.items() if value is not None}
            if isinstance(values, dict)
            else values
        )

    def params(self, max_new_tokens: int, seed: int, number: int, logprobs: int | None) -> SamplingParams:
        """How the response of one of the n choices is made.

        Args:
            max_new_tokens: at most.
            seed: where the request has none.
            number: of the choice.
            logprobs: see `SamplingParams`.

        Raises:
            UltrafuserError: a setting is out of range.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        first = seed if self.seed is None else self.seed
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=(first + number) % 2**63,
            stop=() if stop is None else tuple(stop),
            logprobs=logprobs,
        )


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    default_limit: ClassVar[int | None] = None
    """Tokens at most if the request does not say; None for as many as there is room for."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=0)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None

    @property
    def limit(self) -> int | None:
        """Tokens at most, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.logprobs`."""
        return None if not self.logprobs else 0 if self.top_logprobs is None else self.top_logprobs


class CompletionRequest(_Request):
    """`POST /v1/completions`; all specialists read the prompt as it is, without their templates."""

    default_limit: ClassVar[int | None] = 16
    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[int], Field(min_length=1, fail_fast=True)]
        | Annotated[
            list[Annotated[list[int], Field(fail_fast=True)]],
            Field(min_length=1, max_length=128, fail_fast=True),
        ]
    )
    max_tokens: int | None = Field(
        default=None, ge=0, description="16, or what there is room for, if not given"
    )
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens at most, if the request says so."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """See `SamplingParams.logprobs`."""
        return self.logprobs

    def prompts(self) -> Sequence[str | list[int]]:
        """One prompt or several, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class Fusion(BaseModel):
    """Who said what: the field that every choice, and every choice of a chunk, has beyond OpenAI's."""

    specialists: list[str]
    tokens: list[str] = Field(
        description="texts, the end token's, too; of the tokens that make up one character all but the last are empty"
    )
    gate_weights: list[list[float]] = Field(
        description="for each token how much each specialist counted; sums to 1"
    )


class _ResponseChoice(BaseModel):
    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: dict[str, Any] | None
    fusion: Fusion


class _ChatChoice(_ResponseChoice):
    message: Message


class _TextChoice(_ResponseChoice):
    text: str


class _Usage(BaseModel):
    prompt_tokens: int = Field(description="as the first specialist reads them")
    completion_tokens: int
    total_tokens: int


class _Response(BaseModel):
    id: str
    created: int = Field(description="seconds since 1970")
    model: str
    usage: _Usage


class ChatResponse(_Response):
    """Of `POST /v1/chat/completions`."""

    object: Literal["chat.completion"]
    choices: list[_ChatChoice]


class CompletionResponse(_Response):
    """Of `POST /v1/completions`."""

    object: Literal["text_completion"]
    choices: list[_TextChoice]


class _Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None = Field(description="model_not_found, invalid_api_key, context_length_exceeded or null")


class ErrorResponse(BaseModel):
    """Whatever went wrong."""

    error: _Error


class _Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    specialists: list[str]
    colours: list[str] | None = Field(default=None, description="of the specialists, on the page")


class ModelsResponse(BaseModel):
    """Of `GET /v1/models`."""

    object: Literal["list"]
    data: list[_Model]


class Choice:
    """One of the responses to a request, as far as it has come, in OpenAI's words.

    Args:
        index: of the choice.
        chat: whether it answers a conversation, or goes on with a text.
        specialists: their names.
        tokenizer: that they share.
    """

    def __init__(
        self, index: int, chat: bool, specialists: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.steps: list[TokenStep] = []
        self._index, self._chat, self._specialists = index, chat, list(specialists)
        self._texts = TextStream(tokenizer, skip_special_tokens=False)
        self._bytes = TokenBytes(tokenizer)

    def part(self, steps: Sequence[TokenStep], is_delta: bool) -> dict[str, Any]:
        """The choice with some of its tokens: the newest, in a chunk of a stream, or all.

        Args:
            steps: those.
            is_delta: whether it is a chunk.
        """
        text = "".join(step.text for step in steps)
        finish = steps[-1].finish if steps else "length"  # none at all, because none was allowed
        offset = sum(len(step.text) for step in self.steps)
        is_first = not self.steps
        self.steps += steps
        texts = [self._texts.push(step.token_id) for step in steps]
        if texts and finish is not None:
            texts[-1] += self._texts.flush()
        choice: dict[str, Any] = {
            "index": self._index,
            "finish_reason": None if finish is None else FINISH_REASONS[finish],
            "logprobs": self._logprobs(steps, offset),
            "fusion": {
                "specialists": self._specialists,
                "tokens": texts,
                "gate_weights": [[round(weight, 6) for weight in step.gate_weights] for step in steps],
            },
        }
        if not self._chat:
            return {**choice, "text": text}
        role = {"role": "assistant"} if is_first else {}  # clients join what chunks say
        return {**choice, "delta" if is_delta else "message": {**role, "content": text}}

    def _logprobs(self, steps: Sequence[TokenStep], offset: int) -> dict[str, Any] | None:
        if not steps or steps[0].logprob is None:
            return None
        if self._chat:
            return {"content": [self._chat_logprob(step) for step in steps], "refusal": None}
        offsets = []
        for step in steps:
            offsets.append(offset)
            offset += len(step.text)
        return {
            "tokens": [_written(self._bytes.of(step.token_id)) for step in steps],
            "token_logprobs": [step.logprob for step in steps],
            # Of tokens with the same text the likeliest stays, which comes first.
            "top_logprobs": [
                {_written(self._bytes.of(token)): value for token, value in reversed(step.alternatives)}
                for step in steps
            ],
            "text_offset": offsets,
        }

    def _chat_logprob(self, step: TokenStep) -> dict[str, Any]:
        assert step.logprob is not None
        best = [self._named(token, value) for token, value in step.alternatives]
        return {**self._named(step.token_id, step.logprob), "top_logprobs": best}

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        content = self._bytes.of(token_id)
        return {"token": _written(content), "logprob": logprob, "bytes": list(content)}


def _written(content: bytes) -> str:
    """The text of a token; of a part of a character, as OpenAI writes it: `bytes:` and what it is made of."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def usage(prompt_tokens: int, choices: Sequence[Choice]) -> dict[str, int]:
    """Counted tokens; a prompt's are those of the first specialist."""
    completion = sum(len(choice.steps) for choice in choices)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
    }


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
