"""Prompts: Jinja files, one for each stage, and one for a domain where it needs other words.

`DOMAIN/STAGE.jinja` is taken before `STAGE.jinja`, and a folder of the recipe before this one. A description in the
recipe is taken before the one that a domain's files have.
"""

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from ultrafuser.errors import RecipeError
from ultrafuser.synthesis.recipe import SynthesisRecipe

_FOLDER = Path(__file__).parent


class Prompts:
    """The prompts of a run.

    Args:
        recipe: names a folder of files that come before ours, if any, and describes domains.

    Raises:
        RecipeError: a domain has no description, neither in the recipe nor in a file.
    """

    def __init__(self, recipe: SynthesisRecipe) -> None:
        folders = [_FOLDER] if recipe.prompts is None else [Path(recipe.prompts), _FOLDER]
        self._folders, self._domains = folders, recipe.domains
        self._environment = SandboxedEnvironment(
            loader=ChoiceLoader([FileSystemLoader(folder) for folder in folders]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        for name, domain in recipe.domains.items():
            if not domain.description and not any((folder / name).is_dir() for folder in folders):
                raise RecipeError(
                    f"domains.{name} needs a description: one line on what it is about. Text, code and math have one."
                )

    def render(self, stage: str, domain: str, **known: Any) -> str:
        """The text of a prompt.

        Args:
            stage: or "follow_up".
            domain: of it.
            **known: what the file may use, beside domain and description.

        Raises:
            RecipeError: the file is wrong, or uses what is not known there.
        """
        names = [f"{domain}/{stage}.jinja", f"{stage}.jinja"]
        description = self._domains[domain].description
        try:
            template = self._environment.select_template(names)
            return template.render(domain=domain, description=description, **known).strip()
        except TemplateError as error:
            raise RecipeError(f"the prompt {names[0]} or {names[1]}: {error}") from error

    def texts(self) -> dict[str, str]:
        """All files that are in use, by name: what a result depends on."""
        found: dict[str, str] = {}
        for folder in reversed(self._folders):
            for path in sorted(folder.rglob("*.jinja")):
                found[path.relative_to(folder).as_posix()] = path.read_text(encoding="utf-8")
        return found
