"""A training that is killed and resumed ends where one ends that was never stopped."""

import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ultrafuser.errors import DataError, RecipeError
from ultrafuser.modeling.checkpoint import open_fused
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe, read_recipe
from ultrafuser.training.run import check_folder, specialize, train
from ultrafuser.training.trainer import last_checkpoint

STEPS = {"stage1": 24, "stage2": 20}


def command(recipe, folder, *options):
    arguments = ["train", recipe, "-o", str(folder), *options]
    code = "from ultrafuser.cli import main; main()"
    return [sys.executable, "-c", code, *arguments]


def kill_in(stage, recipe, folder, *options):
    """Run the real command and kill it as soon as it has written a checkpoint of the stage."""
    checkpoints = folder / "checkpoints" / stage
    with subprocess.Popen(command(recipe, folder, *options), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    step = int(last_checkpoint(checkpoints).name.partition("-")[2])
    assert 0 < step < STEPS[stage]


@pytest.fixture(scope="module")
def runs(toys, tmp_path_factory):
    """One run without a break, and one that is killed in stage 1, then in stage 2, and brought to an end."""
    folder = tmp_path_factory.mktemp("resume")
    stage = {"examples_per_domain": 4, "examples_per_pass": 2, "save_every": 3, "log_every": 2}
    recipe = toys.write_recipe(
        folder / "recipe.yaml",
        heldout={},
        gate={"size": 16, "dropout": 0.5},  # what it leaves out is drawn anew in every step
        stage1={"steps": STEPS["stage1"], "learning_rate": 1e-2, "warmup_steps": 2, **stage},
        stage2={"steps": STEPS["stage2"], "learning_rate": 1e-3, **stage},
    )
    kill_in("stage1", recipe, folder / "killed")
    shutil.copytree(folder / "killed", folder / "after_kill")
    kill_in("stage2", recipe, folder / "killed", "--resume")
    settings = read_recipe(recipe, FusionRecipe)
    whole = train(settings, folder / "whole")
    return folder, settings, whole, train(settings, folder / "killed", resume=True)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_killed_training_resumes_to_the_same_losses(runs, stage):
    _, _, whole, resumed = runs
    assert resumed.stages[stage].losses == whole.stages[stage].losses
    assert len(whole.stages[stage].losses) > STEPS[stage] / 2


def test_a_killed_training_resumes_to_the_same_model(runs):
    folder = runs[0]
    for file in ("checkpoints/after_stage1/model.safetensors", "model.safetensors"):
        expected, tensors = (load_file(folder / name / file) for name in ("whole", "killed"))
        assert expected.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_a_finished_training_is_not_replaced_by_its_first_stage(runs):
    folder, settings, _, _ = runs
    with pytest.raises(RecipeError, match="has begun stage 2"):
        train(settings, folder / "whole", resume=True, only_stage1=True)
    assert not open_fused(folder / "whole").model.config.gate_only


def test_a_finished_training_resumes_to_itself(runs):
    folder, settings, whole, _ = runs
    again = train(settings, folder / "whole", resume=True)
    assert {name: stage.losses for name, stage in again.stages.items()} == {
        name: stage.losses for name, stage in whole.stages.items()
    }


def test_a_half_written_checkpoint_does_not_count(runs, tmp_path):
    folder = runs[0] / "whole/checkpoints/stage1"
    shutil.copytree(folder, tmp_path / "stage1")
    newest = last_checkpoint(tmp_path / "stage1")
    assert newest.name == f"checkpoint-{STEPS['stage1']}"
    (newest / "trainer_state.json").write_text((newest / "trainer_state.json").read_text()[:-20])
    older = last_checkpoint(tmp_path / "stage1")
    assert older.name == f"checkpoint-{STEPS['stage1'] - 3}"
    (newest / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path / "stage1") == older
    (older / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path / "stage1") is None


def test_only_safetensors_and_json_are_written(runs):
    suffixes = {path.suffix for path in runs[0].rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".yaml", ".jinja"}


def test_an_output_folder_belongs_to_one_run(runs, toys, tmp_path):
    folder, settings, *_ = runs
    stopped = folder / "after_kill"
    check_folder(stopped, settings, resume=True)
    assert read_recipe(stopped / "recipe.yaml", FusionRecipe) == settings
    with pytest.raises(RecipeError, match=r"holds this run already\. Give --resume"):
        check_folder(stopped, settings, resume=False)
    other = settings.model_copy(update={"seed": 7})
    with pytest.raises(RecipeError, match="holds another run: seed is 0 there, but 7 in this recipe"):
        check_folder(stopped, other, resume=True)
    longer = settings.model_copy(update={"stage1": settings.stage1.model_copy(update={"steps": 25})})
    with pytest.raises(RecipeError, match=re.escape("stage1.steps is 24 there, but 25 in this recipe")):
        check_folder(stopped, longer, resume=False)
    stage = {"steps": 1, "examples_per_domain": 1}
    single = SpecializeRecipe(model="base", data={"letters": "letters.jsonl"}, stage=stage)
    with pytest.raises(RecipeError, match=re.escape("its recipe.yaml is no recipe for this command")):
        check_folder(stopped, single, resume=True)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty and holds no run"):
        check_folder(tmp_path, settings, resume=True)
    with pytest.raises(RecipeError, match=re.escape("notes.txt is a file")):
        check_folder(tmp_path / "notes.txt", settings, resume=False)


@pytest.fixture(scope="module")
def own(toys, tmp_path_factory):
    """A finished run, and a specialist, over copies of the toys, so that they can be changed."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(toys.folder, folder / "toys")
    mine = replace(toys, folder=folder / "toys")
    stage = {"steps": 2, "examples_per_domain": 2}
    fusion = FusionRecipe.model_validate(mine.recipe("adapters", stage1=stage, stage2=None, heldout={}))
    train(fusion, folder / "fused")
    single = {"model": str(mine.folder / "base"), "data": mine.files(), "stage": stage, "dtype": "float32"}
    specialize(SpecializeRecipe.model_validate(single), folder / "single")
    return folder, fusion, SpecializeRecipe.model_validate(single)


def add_a_row(toys):
    path = toys / "digits.train.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")


def change_a_letter(toys):
    path = toys / "letters.train.jsonl"
    path.write_text(path.read_text().replace("letters 3?", "letters 4?"))


def train_further(path):
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, {"format": "pt"})


def change_the_base(toys):
    train_further(toys / "base/model.safetensors")


def change_an_adapter(toys):
    train_further(toys / "base-digits/adapter_model.safetensors")


def change_a_scale(toys):
    path = toys / "base-digits/adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))


def change_the_template(toys):
    path = toys / "base/chat_template.jinja"
    path.write_text("Be brief. " + path.read_text())


SIZE = r"[\d,]+ bytes, sha256 \w{16}"


@pytest.mark.parametrize(
    ("change", "message", "both"),
    [
        (add_a_row, rf"data\.digits \(.*digits\.train\.jsonl\) was {SIZE} then, and is {SIZE} now", True),
        (change_a_letter, rf"data\.letters \(.*letters\.train\.jsonl\) was {SIZE} then", True),
        (change_the_base, r"base was sha256 \w{16} then, and is sha256 \w{16} now\. Put back", True),
        (change_an_adapter, r"specialists\.digits was sha256", False),
        (change_a_scale, r"specialists\.digits was sha256", False),
        (change_the_template, r"tokens was 24 conversations, sha256", True),
    ],
)
def test_a_resume_needs_what_the_run_began_with(own, change, message, both):
    folder, fusion, single = own
    kept = folder / "kept"
    shutil.copytree(folder / "toys", kept)
    change(folder / "toys")
    try:
        with pytest.raises(RecipeError, match=f"holds a run that began with other inputs: {message}"):
            train(fusion, folder / "fused", resume=True)
        if both:
            with pytest.raises(RecipeError, match=message):
                specialize(single, folder / "single", resume=True)
    finally:
        shutil.rmtree(folder / "toys")
        kept.rename(folder / "toys")
    train(fusion, folder / "fused", resume=True)  # put back, it goes on


def test_a_resume_needs_its_files(own):
    folder, fusion, _ = own
    file = folder / "toys/digits.train.jsonl"
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match=r"digits\.train\.jsonl: cannot be read"):
        train(fusion, folder / "fused", resume=True)
    file.write_bytes(content)


def test_a_run_killed_before_it_knew_its_inputs_can_go_on(own, tmp_path):
    folder, fusion, _ = own
    shutil.copytree(folder / "fused", tmp_path / "fused")
    inputs = (tmp_path / "fused/inputs.json").read_text()
    (tmp_path / "fused/inputs.json").unlink()
    train(fusion, tmp_path / "fused", resume=True)
    assert (tmp_path / "fused/inputs.json").read_text() == inputs


@pytest.mark.parametrize("section", ["data", "specialists"])
def test_order_belongs_to_a_run(own, section):
    folder, fusion, _ = own
    turned = dict(reversed(getattr(fusion, section).items()))
    with pytest.raises(RecipeError, match="specialists or domains stand in another order"):
        train(fusion.model_copy(update={section: turned}), folder / "fused", resume=True)


def test_the_seed_decides_the_run(runs, toys):
    folder, settings, whole, _ = runs
    recipe = settings.model_copy(
        update={"stage1": settings.stage1.model_copy(update={"steps": 2}), "stage2": None, "seed": 1}
    )
    first, second = (train(recipe, folder / name).stages["stage1"].losses for name in ("first", "second"))
    assert first == second
    assert first[0][1] != whole.stages["stage1"].losses[0][1]
