import copy

import pytest
import yaml

from ultrafuser.errors import RecipeError
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe, read_recipe

SMALLEST = {"specialists": {"code": {"model": "org/coder"}}, "data": {"code": "code.jsonl"}}
SINGLE = {
    "model": "org/base",
    "data": {"code": "code.jsonl"},
    "stage": {"steps": 3, "examples_per_domain": 2},
}


def read(tmp_path, content, kind=FusionRecipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return read_recipe(path, kind)


def changed(recipe, key, value):
    """A copy with one dotted key set."""
    recipe = copy.deepcopy(recipe)
    *parents, last = key.split(".")
    section = recipe
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return recipe


def test_defaults_are_the_papers(tmp_path):
    recipe = read(tmp_path, SMALLEST)
    assert (recipe.gate.form, recipe.gate.size) == ("shared", 512)
    first, second = recipe.stage1, recipe.stage2
    assert (first.steps, first.examples_per_domain, first.learning_rate, first.schedule) == (
        400,
        64,
        2e-5,
        "cosine",
    )
    assert (second.examples_per_domain, second.learning_rate, second.schedule) == (32, 2e-5, "cosine")
    assert first.balanced
    assert second.train == "full"
    assert not first.cache_states
    assert recipe.specialists["code"].template == "tokenizer"


def test_null_leaves_stage_2_out(tmp_path):
    assert read(tmp_path, {**SMALLEST, "stage2": None}).stage2 is None


@pytest.mark.parametrize(
    ("recipe", "key", "nearest"),
    [
        (SMALLEST, "specialist", "specialists"),
        (SMALLEST, "stage_1", "stage1"),
        (SMALLEST, "stage1.learning_rat", "learning_rate"),
        (SMALLEST, "stage2.lora.rnak", "rank"),
        (SMALLEST, "gate.hidden_size", "size"),
        (SMALLEST, "specialists.code.adaptor", "adapter"),
        (SINGLE, "tempalte", "template"),
        (SINGLE, "stage.warmup", "warmup_steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path, recipe, key, nearest):
    kind = FusionRecipe if recipe is SMALLEST else SpecializeRecipe
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, changed(recipe, key, 1), kind)
    assert f"unknown key {key!r}. Did you mean {nearest!r}? Known here: " in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("stage1.steps", "many", "stage1.steps: input should be a valid integer"),
        ("stage1.steps", -1, "stage1.steps: input should be greater than or equal to 0, got -1."),
        ("stage1.learning_rate", 0, "stage1.learning_rate: input should be greater than 0, got 0."),
        ("stage1.learning_rate", float("inf"), "stage1.learning_rate: input should be a finite number"),
        ("stage1", None, "stage1: input should be a valid dictionary"),
        ("stage2.train", "some", "stage2.train: input should be 'full' or 'lora', got 'some'."),
        (
            "stage2.lora.target_modules",
            "q_proj",
            "stage2.lora.target_modules: input should be 'all-linear' or",
        ),
        (
            "bank",
            "both",
            "bank: input should be 'whole' or 'adapters' or input should be 'auto', got 'both'.",
        ),
        (
            "gate.form",
            "common",
            "gate.form: input should be 'shared', 'per_specialist' or 'joint', got 'common'.",
        ),
        ("dtype", "float16", "dtype: input should be 'float32' or 'bfloat16', got 'float16'."),
        ("seed", -1, "seed: input should be greater than or equal to 0"),
        ("data", {}, "data: dictionary should have at least 1 item"),
        ("data.code", 3, "data.code: input should be a valid list, got 3."),
        ("specialists", ["code"], "specialists: input should be a valid dictionary"),
        ("specialists.code", {}, "specialists.code.model is missing."),
        ("stage1.examples_per_pass", 7, "examples_per_pass (7) must divide examples_per_domain (64)."),
        ("stage1.warmup_steps", 401, "warmup_steps (401) must be at most steps (400)."),
        ("stage2.lora", {"rank": 8}, "lora has no say in train: full."),
    ],
)
def test_a_wrong_value_is_refused_by_name(tmp_path, key, value, message):
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, changed(SMALLEST, key, value))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"recipe {tmp_path}")


@pytest.mark.parametrize(("key", "value"), [("adapter", "my/adapter"), ("train", "full")])
def test_a_shape_of_an_adapter_that_is_not_made_is_refused(tmp_path, key, value):
    with pytest.raises(RecipeError, match="lora shapes a fresh adapter"):
        read(tmp_path, {**SINGLE, key: value, "lora": {"rank": 8}}, SpecializeRecipe)


def test_a_path_with_a_dot_is_the_recipes_own(tmp_path):
    recipe = read(tmp_path, {**SINGLE, "adapter": "./start"}, SpecializeRecipe)
    assert recipe.adapter == str(tmp_path / "start")


@pytest.mark.parametrize("key", ["specialists", "data"])
def test_a_missing_key_is_named(tmp_path, key):
    with pytest.raises(RecipeError, match=f"{key} is missing"):
        read(tmp_path, {k: v for k, v in SMALLEST.items() if k != key})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("- a", "must hold settings"),
        ("", "must hold settings"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("stage1:\n  steps: 1\n  steps: 2\n", "'steps' stands twice"),
        ("seed: \x00", "is not valid YAML"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(RecipeError, match="is not valid YAML"):
        read_recipe(tmp_path / "latin.yaml", FusionRecipe)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        read_recipe(tmp_path / "none.yaml", FusionRecipe)


def test_numbers_may_be_written_as_people_write_them(tmp_path):
    text = yaml.safe_dump(SMALLEST) + "stage1: {learning_rate: 1e-3}\n"  # text to YAML 1.1
    assert read(tmp_path, text).stage1.learning_rate == 1e-3


def test_relative_paths_are_the_recipes_own(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("coder", "adapter", "fused"):
        (tmp_path / folder).mkdir()
    entry = {"model": "coder", "adapter": "adapter"}
    hub = {"model": "org/base", "adapter": "package://ultrafuser/specialists/code"}
    recipe = read(
        tmp_path,
        {
            "specialists": {"code": entry, "text": hub},
            "data": {"code": "code.jsonl", "text": ["/data/a.jsonl", "package://ultrafuser/demo/b.jsonl"]},
            "heldout": {"code": ["../held.jsonl"]},
            "gate": {"start": "fused"},
            "stage1": {"cache_states": "states"},
        },
    )
    assert recipe.specialists["code"].model == str(tmp_path / "coder")
    assert recipe.specialists["code"].adapter == str(tmp_path / "adapter")
    assert recipe.specialists["text"].model == "org/base"
    assert recipe.specialists["text"].adapter == "package://ultrafuser/specialists/code"
    assert recipe.data["code"] == [str(tmp_path / "code.jsonl")]
    assert recipe.data["text"] == ["/data/a.jsonl", "package://ultrafuser/demo/b.jsonl"]
    assert recipe.heldout["code"] == [str(tmp_path.parent / "held.jsonl")]
    assert recipe.stage1.cache_states == str(tmp_path / "states")
    assert recipe.gate.start == str(tmp_path / "fused")
    single = read(tmp_path, {**SINGLE, "model": "coder", "adapter": "adapter"}, SpecializeRecipe)
    assert (single.model, single.adapter) == (str(tmp_path / "coder"), str(tmp_path / "adapter"))


def test_package_files_are_found_when_they_are_read(tmp_path):
    recipe = read(tmp_path, changed(SMALLEST, "data.code", "package://ultrafuser/demo/recipe.yaml"))
    assert recipe.data_files["code"][0].is_file()
