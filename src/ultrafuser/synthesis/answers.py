"""Reading answers: JSON in whatever dress it comes, and the form that it has to have."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_CHARACTERS = 200_000
"""Of an answer; no use reads a longer one."""

_MOST_PLACES = 100
"""Brackets in a text at which JSON is looked for."""
_MOST_MENDED = 20
"""Of those, how many may lack JSON only for commas too many, which takes longer to find out."""
_BRACKET = re.compile(r"[\[{]")
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.?)*+(?:"|\Z))|,(?=\s*[\]}])', re.DOTALL)
"""A comma too many; or a string, which keeps its commas. One that is not closed ends with the text, so that no place
is looked at twice."""


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

    Objects come before lists, which may be examples or parts of what was said. Of a list, items that are not what
    they have to be are left out, as long as one is left, and as nothing else is right as a whole.

    Args:
        text: what the model said.
        kind: what it has to be.

    Raises:
        UnreadableError: it is not there.
    """
    if len(text) > MAX_CHARACTERS:
        raise UnreadableError(f"{len(text):,} characters")
    problem = ""
    field = next(iter(kind.model_fields))
    partly: A | None = None
    for value in sorted(_values(text), key=lambda value: isinstance(value, list)):
        candidate = {field: value} if isinstance(value, list) else value
        try:
            return kind.model_validate(candidate)
        except ValidationError as error:
            first = error.errors()[0]
            problem = problem or f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            if partly is None and isinstance(candidate, dict):
                partly = _without_bad_items(candidate, field, error, kind)
    if partly is None:
        raise UnreadableError(problem or "no JSON in it")
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
    """JSON values in a text, none of them a part of another."""
    for form in (text, _without_trailing_commas(text)):
        try:
            yield json.loads(form, strict=False)
        except (ValueError, RecursionError):
            continue
        return
    end = 0
    for number in range(_MOST_PLACES):
        if (match := _BRACKET.search(text, end)) is None:
            return
        found = _value_at(text, match.start(), may_mend=number < _MOST_MENDED)
        end = match.end() if found is None else found[1]
        if found is not None:
            yield found[0]


def _value_at(text: str, place: int, *, may_mend: bool) -> tuple[Any, int] | None:
    """The JSON value that begins at a place, and where it ends."""
    decoder = json.JSONDecoder(strict=False)
    try:
        return decoder.raw_decode(text, place)
    except (ValueError, RecursionError):
        if not may_mend:
            return None
    try:
        value, length = decoder.raw_decode(_without_trailing_commas(text[place:]))
    except (ValueError, RecursionError):
        return None
    return value, place + length


def _without_trailing_commas(text: str) -> str:
    """As long as it was, so that places stay what they are."""
    return _TRAILING_COMMA.sub(lambda match: match[1] or " ", text)
