"""Every recipe that is shipped can be read, and what it names inside the package is there."""

import fnmatch
import tomllib
from pathlib import Path

import pytest
import yaml

from ultrafuser.modeling.sources import resolve_file
from ultrafuser.synthesis.recipe import read_synthesis_recipe
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe, read_recipe

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src/ultrafuser"
RECIPES = sorted([*ROOT.glob("recipes/**/*.yaml"), *PACKAGE.rglob("recipe.yaml")])


def test_there_are_recipes():
    assert PACKAGE / "demo/recipe.yaml" in RECIPES
    assert len(RECIPES) > 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_shipped_recipe_can_be_read(path):
    if "endpoint" in yaml.safe_load(path.read_text()):
        assert sum(domain.instructions for domain in read_synthesis_recipe(path).domains.values()) == 310_000
        return
    kind = FusionRecipe if "specialists" in yaml.safe_load(path.read_text()) else SpecializeRecipe
    recipe = read_recipe(path, kind)
    places = [file for files in (*recipe.data.values(), *recipe.heldout.values()) for file in files]
    entries = recipe.specialists.values() if isinstance(recipe, FusionRecipe) else [recipe]
    places += [place for entry in entries for place in (entry.model, entry.adapter) if place is not None]
    for place in places:
        if place.startswith("package://ultrafuser/"):
            assert resolve_file(place).exists()


def test_what_the_demo_needs_is_package_data():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["ultrafuser"]
    folders = [PACKAGE / "demo", *(PACKAGE / "specialists" / name for name in ("text", "code", "math"))]
    files = [
        path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"
    ]
    for path in files:
        name = path.relative_to(PACKAGE).as_posix()
        assert path.suffix == ".py" or any(fnmatch.fnmatch(name, p.replace("**/", "*")) for p in patterns), (
            name
        )
    assert (PACKAGE / "demo/recipe.yaml") in files
