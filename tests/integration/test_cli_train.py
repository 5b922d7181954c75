"""`ultrafuser train`, `specialize` and `demo`, as a user calls them."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from ultrafuser.cli import app, chat, demo
from ultrafuser.modeling.checkpoint import open_fused

ROWS = ("letters", "digits", "uniform", "fused")


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "100"})


def called(*arguments):
    """Call a command that has to succeed; everything it printed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*arguments):
    """Call a command that has to refuse; the one line that says why."""
    result = call(*arguments)
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("ultrafuser: ")
    return result.stderr


def metrics_in(path):
    document = json.loads(path.read_text())
    assert document["provenance"]["seed"] == 0
    assert {"ultrafuser", "torch", "transformers"} <= document["provenance"].keys()
    return document["metrics"]


def expected_metrics():
    losses = {f"loss/{row}/{domain}" for row in ROWS for domain in ROWS[:2]}
    return losses | {f"weight/{domain}/{name}" for domain in ROWS[:2] for name in ROWS[:2]}


@pytest.fixture
def no_pickles(monkeypatch):
    """Neither torch.save nor torch.load may be called."""

    def refuse(*_, **__):
        raise AssertionError("a pickle")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)


@pytest.mark.usefixtures("no_pickles")
def test_train_reports_every_stage_and_writes_a_model(toys, tmp_path):
    recipe = toys.write_recipe(tmp_path / "recipe.yaml", "adapters")
    output = called("train", recipe, "-o", tmp_path / "fused", "--json", tmp_path / "m.json")
    assert "letters: 12 conversations" in output
    assert output.count("Loss (nats per response token)") == 2
    assert output.count("Mean gate weight") == 2
    assert output.index("stage 1") < output.index("Mean gate weight") < output.index("stage 2: step 1/4")
    assert "Loading weights" not in output
    assert "Writing model" not in output
    metrics = metrics_in(tmp_path / "m.json")
    wanted = expected_metrics()
    assert wanted | {f"stage{n}/{name}" for n in (1, 2) for name in wanted} <= metrics.keys()
    assert all(metrics[name] == metrics[f"stage2/{name}"] for name in wanted)
    assert metrics_in(tmp_path / "fused/metrics.json") == metrics
    assert {"seconds/stage1", "seconds/stage2", "train_loss/stage1"} <= metrics.keys()
    assert not open_fused(tmp_path / "fused").model.config.gate_only
    written = yaml.safe_load((tmp_path / "fused/recipe.yaml").read_text())
    assert written["stage1"]["schedule"] == "cosine"  # defaults included
    pickles = {".pt", ".pth", ".bin", ".pkl", ".ckpt"}
    assert not [path for path in tmp_path.rglob("*") if path.suffix in pickles]
    assert "holds this run already" in refused("train", recipe, "-o", tmp_path / "fused")


def test_stage_1_alone_writes_a_gate_and_can_go_on(toys, tmp_path):
    recipe = toys.write_recipe(
        tmp_path / "recipe.yaml", stage1={"steps": 2, "cache_states": True}, data_rows=5
    )
    output = called("train", recipe, "-o", tmp_path / "fused", "--stage", "1")
    assert "letters: 5 conversations" in output
    assert "stage 2" not in output
    assert "Running the specialists once" in output
    assert open_fused(tmp_path / "fused").model.config.gate_only
    assert "Cached states: " in output
    assert {"cache_s/stage1", "cache_bytes/stage1"} <= metrics_in(tmp_path / "fused/metrics.json").keys()
    output = called("train", recipe, "-o", tmp_path / "fused", "--resume")
    assert "stage 1: step" not in output  # that is done
    assert "stage 2: step 4/4" in output
    assert not open_fused(tmp_path / "fused").model.config.gate_only


def single_recipe(toys, path, **settings):
    stage = {"steps": 3, "examples_per_domain": 4, "learning_rate": 5e-3, "log_every": 1}
    recipe = {
        "model": str(toys.folder / "base"),
        "data": toys.files(),
        "heldout": toys.files("heldout"),
        "dtype": "float32",
        "stage": stage,
        **settings,
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.mark.usefixtures("no_pickles")
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_specialize_writes_what_others_open(toys, tmp_path, mode):
    recipe = single_recipe(toys, tmp_path / "recipe.yaml", train=mode)
    output = called("specialize", recipe, "-o", tmp_path / "run", "--json", tmp_path / "m.json")
    assert "specialize: step 3/3" in output
    assert "before" in output
    metrics = metrics_in(tmp_path / "m.json")
    for domain in ("letters", "digits"):
        assert metrics[f"loss/specialist/{domain}"] < metrics[f"loss/before/{domain}"]
    base = AutoModelForCausalLM.from_pretrained(toys.folder / "base")
    if mode == "lora":
        opened = PeftModel.from_pretrained(base, tmp_path / "run/adapter")
        assert opened.peft_config["default"].base_model_name_or_path == str(toys.folder / "base")
    else:
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
        assert (tmp_path / "run/model/tokenizer.json").is_file()
    ids = torch.tensor([[1, 50, 60, 70]])
    assert not torch.allclose(opened(input_ids=ids).logits, base_logits(toys, ids), atol=1e-3)
    # What was made is a specialist: fuse it with another.
    specialists = toys.sources()
    specialists["new"] = (
        {"model": str(toys.folder / "base"), "adapter": str(tmp_path / "run/adapter")}
        if mode == "lora"
        else {"model": str(tmp_path / "run/model")}
    )
    fusion = toys.write_recipe(
        tmp_path / "fusion.yaml", specialists=specialists, heldout={}, stage1={"steps": 1}, stage2=None
    )
    called("train", fusion, "-o", tmp_path / "fused")


def base_logits(toys, ids):
    return AutoModelForCausalLM.from_pretrained(toys.folder / "base")(input_ids=ids).logits


def exchange(question, answer):
    return json.dumps({"prompt": question, "completion": answer})


@pytest.mark.parametrize("part", ["data", "heldout"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            exchange("?", "ab") + '\n\n{"prompt": "?"}\n',
            "bad.jsonl:3: a row with prompt must also have completion",
        ),
        (exchange("?", "ab") + "\nno json\n", "bad.jsonl:2: expected one JSON object"),
        ("", "bad.jsonl: expected at least one conversation, got an empty file"),
        (None, "bad.jsonl: cannot be read after line 0"),
        (exchange("?" * 300, "ab") + "\n", "letters: "),
    ],
    ids=["row", "json", "empty", "missing", "long"],
)
def test_data_that_cannot_be_trained_on_is_refused_at_once(toys, tmp_path, part, content, message):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    files = {**toys.files(), "letters": str(bad)}
    recipe = toys.write_recipe(tmp_path / "recipe.yaml", **{part: files})
    line = refused("train", recipe, "-o", tmp_path / "fused")
    assert message in line
    assert not (tmp_path / "fused").exists()
    if part == "data":
        single = single_recipe(toys, tmp_path / "single.yaml", data=files)
        assert message in refused("specialize", single, "-o", tmp_path / "run")


def test_conversations_that_are_cut_or_left_out_are_counted(toys, tmp_path):
    rows = [exchange("?", "ab"), exchange("?", "abcd" * 20), exchange("?" * 300, "ab")]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    files = {**toys.files(), "letters": str(tmp_path / "some.jsonl")}
    recipe = toys.write_recipe(
        tmp_path / "recipe.yaml", data=files, heldout=files, max_length=60, stage1={"steps": 1}, stage2=None
    )
    output = called("train", recipe, "-o", tmp_path / "fused")
    assert "letters: 2 conversations, 1 of them cut to max_length, 1 more left out as too long" in output
    assert "held-out letters: 2 conversations, 1 of them cut to max_length, 1 more left out" in output
    dropping = toys.write_recipe(
        tmp_path / "drop.yaml",
        heldout=files,
        max_length=60,
        too_long="drop",
        stage1={"steps": 1},
        stage2=None,
    )
    output = called("train", dropping, "-o", tmp_path / "dropped")
    assert "held-out letters: 1 conversations, 2 more left out as too long" in output
    strict = toys.write_recipe(tmp_path / "strict.yaml", data=files, max_length=60, too_long="error")
    assert "data.letters, conversation 2: Specialist 'letters' reads at most 60 tokens" in refused(
        "train", strict, "-o", tmp_path / "strict"
    )
    late = toys.write_recipe(tmp_path / "late.yaml", heldout=files, max_length=60, too_long="error")
    assert "heldout.letters, conversation 2: " in refused("train", late, "-o", tmp_path / "late")


def test_recipes_and_folders_are_refused_in_one_line(toys, tmp_path):
    recipe = toys.write_recipe(tmp_path / "recipe.yaml", stages=2)
    assert "unknown key 'stages'. Did you mean 'stage" in refused("train", recipe, "-o", tmp_path / "fused")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    recipe = toys.write_recipe(tmp_path / "recipe.yaml", "adapters", stage2={"train": "full"})
    assert "holds no run" in refused("train", recipe, "-o", tmp_path / "mine", "--resume")
    assert call("train", recipe, "-o", tmp_path / "fused", "--stage", "2").exit_code == 2


@pytest.fixture
def tiny_demo(toys, tmp_path, monkeypatch):
    recipe = toys.write_recipe(
        tmp_path / "demo.yaml", "adapters", stage1={"steps": 2, "cache_states": True}, stage2=None
    )
    monkeypatch.setattr(demo, "RECIPE", recipe)


@pytest.mark.usefixtures("tiny_demo")
def test_demo_keeps_its_model_where_it_is_told_to(tmp_path):
    arguments = ("demo", "--no-chat", "-o", tmp_path / "kept", "--json", tmp_path / "m.json")
    output = called(*arguments)
    assert "Loss (nats per response token)" in output
    assert "Mean gate weight" in output
    assert expected_metrics() <= metrics_in(tmp_path / "m.json").keys()
    assert open_fused(tmp_path / "kept").model.config.gate_only
    again = called(*arguments)  # goes on where it was: nothing is left to do
    assert "stage 1: step" not in again


@pytest.mark.usefixtures("tiny_demo")
def test_demo_ends_in_a_chat(monkeypatch):
    talks = []
    monkeypatch.setattr(chat.Chat, "run", lambda self: talks.append(self._names))
    called("demo")
    assert talks == [["letters", "digits"]]
