"""The README says nothing that does not work: its commands, its Python, its recipe, its links."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
import yaml
from conftest import save_model, tiny_model
from transformers import PreTrainedTokenizerFast

from ultrafuser.cli import app
from ultrafuser.modeling import sources
from ultrafuser.training.recipe import FusionRecipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"(?:^    |`)(ultrafuser [a-z][^`\n]*)", README, flags=re.MULTILINE)))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_exist_with_their_options(line: str):
    words = shlex.split(line)
    group = typer.main.get_command(app)
    assert words[1] in group.commands
    known = {name for parameter in group.commands[words[1]].params for name in (*parameter.opts, "--help")}
    for word in words[2:]:
        if word.startswith("-"):
            assert word in known, f"{line}: {word} is no option of {words[1]}"


def test_every_command_is_named():
    named = {shlex.split(line)[1] for line in COMMANDS}
    assert set(typer.main.get_command(app).commands) <= named


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_recipe_is_valid():
    recipes = [FusionRecipe.model_validate(yaml.safe_load(text)) for text in blocks("yaml")]
    assert recipes
    assert recipes[0].stage2 is None


def test_links_lead_somewhere():
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_python_runs(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    """All snippets, one after the other, with tiny models in place of the hub's."""
    local = sources._local
    folders = {
        name: save_model(tmp_path / str(index), tiny_model("llama", seed=index), tokenizer)
        for index, name in enumerate(re.findall(r'model="(Qwen/[^"]+)"', README))
    }
    assert len(folders) == 3
    monkeypatch.setattr(sources, "_local", lambda source: local(str(folders.get(source, source))))
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python")
    assert len(snippets) == 3
    for snippet in snippets:
        torch.manual_seed(0)
        exec(compile(snippet, "README.md", "exec"), {})  # the README is ours
    assert capsys.readouterr().out
