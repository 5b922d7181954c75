"""Recipes: YAML files that say everything a run depends on. What is in them is said where they are used.

Every field is checked before any work begins; an unknown key is an error that names the nearest known one.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ultrafuser.errors import RecipeError

_UNION_MEMBER = re.compile(r"(literal|list|dict|\[key)\[?.*\]")


class RecipeSection(BaseModel):
    """A recipe, or a part of one with keys of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=RecipeSection)


def load_recipe(path: str | Path, kind: type[R]) -> R:
    """Read and check a recipe; paths in it stay as they are.

    Args:
        path: YAML file.
        kind: what it has to be.

    Raises:
        RecipeError: the file cannot be read, or a key or value is wrong; the message names it.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path} must hold settings (key: value), got {type(content).__name__}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {_explain(error, kind)}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See `yaml.SafeLoader`."""
        mapping = super().construct_mapping(node, deep)
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands twice", node.start_mark)
        return mapping


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first few problems, each with its key; for unknown keys the nearest known one."""
    problems: dict[str, list[Any]] = {}
    # Where several types are allowed, each complains, under the key and its own name.
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"] if not _UNION_MEMBER.fullmatch(str(part)))
        problems.setdefault(key, []).append(problem)
    unknown_first = sorted(problems, key=lambda key: problems[key][0]["type"] != "extra_forbidden")
    return " ".join(_explain_key(key, problems[key], kind) for key in unknown_first[:3])


def _explain_key(key: str, problems: list[Any], kind: type[BaseModel]) -> str:
    problem = problems[0]
    if problem["type"] == "extra_forbidden":
        known = _known_keys(kind, problem["loc"][:-1])
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.0)[0]
        return f"unknown key {key!r}. Did you mean {near!r}? Known here: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"{key} is missing."
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}."
    messages = " or ".join(problem["msg"][:1].lower() + problem["msg"][1:] for problem in problems)
    return f"{key}: {messages}, got {problem['input']!r}."


def _known_keys(kind: type[BaseModel], parents: tuple[int | str, ...]) -> list[str]:
    """Keys of the section that a path of an error leads to."""
    section: Any = kind
    for part in parents:
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue  # the name of a specialist leads from the mapping to its entry, which is chosen below
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        models = [a for a in _leaves(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
        section = models[0] if models else section
    return list(section.model_fields)


def _leaves(annotation: Any) -> list[Any]:
    arguments = getattr(annotation, "__args__", None)
    return [annotation] if not arguments else [leaf for argument in arguments for leaf in _leaves(argument)]
