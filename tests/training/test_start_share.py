"""`start_share`: the result of `specialize` is the average of the weights before and after."""

from pathlib import Path

import pytest
import yaml
from conftest import Toys
from safetensors.torch import load_file

from ultrafuser.errors import RecipeError
from ultrafuser.training.recipe import SpecializeRecipe, read_recipe
from ultrafuser.training.run import specialize


def run(folder: Path, toys: Toys, share: float) -> dict:
    recipe = folder / f"{share}.yaml"
    settings = {
        **toys.sources("adapters")["letters"],
        "data": toys.files(),
        "dtype": "float32",
        "start_share": share,
        "stage": {"steps": 3, "examples_per_domain": 2, "learning_rate": 0.05},
    }
    recipe.write_text(yaml.safe_dump(settings))
    specialize(read_recipe(recipe, SpecializeRecipe), folder / str(share))
    return load_file(folder / str(share) / "adapter" / "adapter_model.safetensors")


def test_average_of_before_and_after(tmp_path: Path, toys: Toys):
    before = load_file(Path(toys.sources("adapters")["letters"]["adapter"]) / "adapter_model.safetensors")
    after, halfway = run(tmp_path, toys, 0.0), run(tmp_path, toys, 0.5)
    assert after.keys() == halfway.keys() == before.keys()
    for name, tensor in halfway.items():
        expected = (before[name].float() + after[name].float()) / 2
        assert (tensor.float() - expected).abs().max() <= 0.01 * expected.abs().max()  # written in bfloat16
        assert not tensor.equal(after[name])


def test_needs_something_to_go_on_from(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: base\nstart_share: 0.5\ndata: {a: a.jsonl}\nstage: {steps: 1, examples_per_domain: 1}\n"
    )
    with pytest.raises(RecipeError, match="start_share needs an adapter"):
        read_recipe(path, SpecializeRecipe)
