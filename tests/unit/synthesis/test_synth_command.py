"""`ultrafuser synth` as a user calls it, and `ultrafuser train` on what it made."""

import json

import pytest
import yaml
from conftest import save_model, tiny_model
from pyarrow import parquet
from test_pipeline import RECIPE, serve, write_recipe  # noqa: F401 (a fixture)
from typer.testing import CliRunner

from ultrafuser.cli import app


def call(*arguments, **environment):
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], env={"COLUMNS": "120", **environment}
    )


@pytest.fixture(scope="module")
def made(serve, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("made")
    result = call("synth", write_recipe(folder, serve()), "-o", folder / "run", "--json", folder / "m.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    return folder, result.stdout


def test_it_says_what_was_made(made):
    folder, output = made
    assert "README.md says more" in output
    metrics = json.loads((folder / "m.json").read_text())["metrics"]
    assert json.loads((folder / "run" / "metrics.json").read_text())["metrics"] == metrics
    for domain, wanted in RECIPE["domains"].items():
        assert metrics[f"conversations/{domain}"] == wanted["instructions"]
        assert metrics[f"sub_topics/{domain}"] == wanted["sub_topics"]
        assert 20 < metrics[f"words_per_conversation/{domain}"] < 300
    assert metrics["unread_answers"] == 0


def test_the_files_agree(made):
    run = made[0] / "run"
    card, topics, review = ((run / name).read_text() for name in ("README.md", "topics.md", "review.html"))
    assert "| conversations for training | 36 | 23 | 18 |" in card  # of 40, 25 and 20
    assert "| conversations held out | 4 | 2 | 2 |" in card
    assert (run / "instructions.png").read_bytes().startswith(b"\x89PNG")
    for domain in RECIPE["domains"]:
        for split in ("train", "heldout"):
            lines = [
                json.loads(line)
                for line in (run / "data" / f"{domain}.{split}.jsonl").read_text().splitlines()
            ]
            table = parquet.read_table(run / "data" / f"{domain}.{split}.parquet").to_pylist()
            assert [{k: v for k, v in row.items() if v is not None} for row in table] == lines
            assert all(line["sub_topic"] in topics and line["meta_topic"] in topics for line in lines)
    assert review.count("<details>") >= 3 * 4  # samples of several topics
    assert "<script" not in review


def test_the_estimate_is_near_what_it_took_and_asks_nothing(made, tmp_path):
    recipe = write_recipe(tmp_path, "http://127.0.0.1:9")
    result = call("synth", recipe, "-o", tmp_path / "run", "--dry-run", "--json", tmp_path / "m.json")
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "run").exists()
    expected = json.loads((tmp_path / "m.json").read_text())["metrics"]
    calls = sum(value for name, value in expected.items() if name.startswith("calls/"))
    took = json.loads((made[0] / "m.json").read_text())["metrics"]["answers"]
    assert calls == pytest.approx(took, rel=0.1)
    assert "0:0" in result.stdout


def test_what_it_made_trains(made, tmp_path, tokenizer):
    run = made[0] / "run" / "data"
    context = {"max_position_embeddings": 2048}
    models = {
        name: save_model(tmp_path / name, tiny_model(seed=seed, **context), tokenizer)
        for seed, name in enumerate("ab")
    }
    recipe = {
        "specialists": {
            name: {"model": str(folder), "template": "alpaca"} for name, folder in models.items()
        },
        "data": {name: str(run / f"{name}.train.jsonl") for name in ("text", "music")},
        "heldout": {name: str(run / f"{name}.heldout.jsonl") for name in ("text", "music")},
        "gate": {"size": 8},
        "stage1": {"steps": 2, "examples_per_domain": 4, "learning_rate": 0.001},
        "stage2": None,
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    result = call("train", tmp_path / "train.yaml", "-o", tmp_path / "fused", "--json", tmp_path / "m.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "text: 36 conversations" in result.output
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["loss/fused/music"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"domains": {"law": {"meta_topics": 1, "sub_topics": 1, "instructions": 1}}},
            "domains.law needs a description",
        ),
        ({"domains": {}}, "domains"),
        ({"endpoint": {"api_key_variable": "NOT_SET_HERE"}}, "NOT_SET_HERE"),
        ({"budget": {"money": 1}, "model": {"model": "m"}}, "budget.money needs a price"),
        (
            {"domains": {"a/b": {"description": "x", "meta_topics": 1, "sub_topics": 1, "instructions": 1}}},
            "'a/b' is to name files",
        ),
        ({"filters": {"benchmarks": ["nowhere.jsonl"]}}, "nowhere.jsonl is not there"),
        ({"seeds": 1}, "Did you mean 'seed'?"),
        ({"stages": {"topics": {}}}, "stages"),
        (
            {"domains": {"text": {"meta_topics": 2, "sub_topics": 1, "instructions": 1}}},
            "sub_topics must be at least as many",
        ),
        (
            {
                "domains": {
                    "text": {"meta_topics": 1, "sub_topics": 1, "instructions": 9, "strongly_related": 0.8}
                }
            },
            "together must be below 1",
        ),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(tmp_path, change, message):
    result = call("synth", write_recipe(tmp_path, "http://127.0.0.1:9", **change), "-o", tmp_path / "run")
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


def test_a_model_places_instructions_and_counts_tokens(made, tmp_path, tokenizer):
    model = save_model(tmp_path / "model", tiny_model(max_position_embeddings=512), tokenizer)
    run = made[0] / "run"
    before = (run / "instructions.png").read_bytes()
    recipe = write_recipe(tmp_path, "http://127.0.0.1:9", embedding=str(model))
    result = call("synth", recipe, "-o", run, "--json", tmp_path / "m.json")
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert (run / "instructions.png").read_bytes() != before
    metrics = json.loads((tmp_path / "m.json").read_text())["metrics"]
    parts = [run / "data" / f"music.{split}.jsonl" for split in ("train", "heldout")]
    rows = [json.loads(line) for path in parts for line in path.read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    counted = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) / len(rows)
    assert metrics["tokens_per_conversation/music"] == pytest.approx(counted)
    assert f"{counted:,.1f}" in (run / "README.md").read_text()


def test_prompts_can_be_changed_without_code(serve, tmp_path):  # noqa: F811
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "responses.jinja").write_text("Be brief about {{ domain }}.")
    (tmp_path / "own" / "complicated.jinja").write_text("{{ nothing_of_that_name }}")
    domains = {"text": {"meta_topics": ["a"], "sub_topics": 1, "instructions": 3, "complicated": 0.0}}
    recipe = write_recipe(tmp_path, serve(), prompts="own", domains=domains)
    result = call("synth", recipe, "-o", tmp_path / "run", "--no-figure")
    assert result.exit_code == 0, result.output + repr(result.exception)
    domains["text"]["complicated"] = 1.0
    recipe = write_recipe(tmp_path, serve(), prompts="own", domains=domains)
    result = call("synth", recipe, "-o", tmp_path / "other", "--no-figure")
    assert result.exit_code == 2
    assert "complicated.jinja" in result.stderr
    assert "nothing_of_that_name" in result.stderr
