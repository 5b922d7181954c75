"""Reading answers: JSON in whatever dress it comes, and the form that it has to have."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_CHARACTERS = 200_000
"""Of an answer; no use reads a longer one."""

_FENCE = re.compile(r"```(?:json)?\s*(.*?)(?:```|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(r",\s*([\]}])")


class UnreadableError(ValueError):
    """An answer is not what was asked for; the same may be asked again."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", str_strip_whitespace=True)


class Topics(_Answer):
    """Names of meta-topics."""

    topics: list[str]


class SubTopic(_Answer):
    """A narrower topic: its name, why people need it, and who would ask about it."""

    name: str
    relevance: str
    use_case: str


class SubTopics(_Answer):
    """Sub-topics of a meta-topic."""

    sub_topics: list[SubTopic]


class Instruction(_Answer):
    """What somebody asks for."""

    instruction: str


class SolvedInstruction(_Answer):
    """What somebody asks for, and its final answer, which may come as a number."""

    instruction: str
    reference: Annotated[str, Field(coerce_numbers_to_str=True)]


class Instructions(_Answer):
    """Several instructions."""

    instructions: list[Instruction]


class SolvedInstructions(_Answer):
    """Several instructions with final answers."""

    instructions: list[SolvedInstruction]


A = TypeVar("A", bound=BaseModel)


@functools.cache
def schema_of(kind: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of an answer, as endpoints want it: without references, and with nothing beyond what is named."""

    def closed(part: Any, definitions: dict[str, Any]) -> Any:
        if isinstance(part, list):
            return [closed(one, definitions) for one in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return closed(definitions[part["$ref"].rsplit("/", 1)[-1]], definitions)
        kept = {
            key: closed(value, definitions) for key, value in part.items() if key not in ("$defs", "title")
        }
        return {**kept, "additionalProperties": False} if kept.get("type") == "object" else kept

    schema = kind.model_json_schema()
    result: dict[str, Any] = closed(schema, schema.get("$defs", {}))
    return result


def read_json(text: str, kind: type[A]) -> A:
    """The answer in a text: JSON as it is, in a fence, with words around it, or with commas too many.

    Of a list, items that are not what they have to be are left out, as long as one is left.

    Args:
        text: what the model said.
        kind: what it has to be.

    Raises:
        UnreadableError: it is not there.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"{len(text):,} characters")
    problem = "no JSON in it"
    field = next(iter(kind.model_fields))
    partly: A | None = None  # only where nothing is right as a whole
    for value in _values(text):
        candidate = {field: value} if isinstance(value, list) else value
        try:
            return kind.model_validate(candidate)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if partly is None and isinstance(candidate, dict):
                partly = _without_bad_items(candidate, field, error, kind)
    if partly is None:
        raise UnreadableError(problem)
    return partly


def _without_bad_items(
    candidate: dict[str, Any], field: str, error: ValidationError, kind: type[A]
) -> A | None:
    """What is left of a list when the items with errors are out; None for nothing, or where the error is another."""
    places = {one["loc"][1] for one in error.errors() if len(one["loc"]) > 1}
    items = candidate.get(field)
    kept = (
        [item for place, item in enumerate(items) if place not in places] if isinstance(items, list) else []
    )
    if not places or not kept:
        return None
    try:
        return kind.model_validate({field: kept})
    except ValidationError:
        return None


def _values(text: str) -> Iterator[Any]:
    """JSON values in a text, the likeliest first."""
    is_whole = False
    for candidate in (text, *_FENCE.findall(text)):
        for form in (candidate, _TRAILING_COMMA.sub(r"\1", candidate)):
            try:
                yield json.loads(form, strict=False)
                is_whole = True
            except (ValueError, RecursionError):
                continue
    if is_whole:
        return  # a part of it was not meant
    decoder = json.JSONDecoder(strict=False)
    for place in [match.start() for match in re.finditer(r"[\[{]", text)][:20]:
        try:
            yield decoder.raw_decode(_TRAILING_COMMA.sub(r"\1", text[place:]))[0]
        except (ValueError, RecursionError):
            continue
