"""The commands that use a fused model, as a person or a program calls them: on tiny random models."""

import copy
import io
import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from conftest import randomise_gate, save_adapter, save_model, tiny_model
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import ultrafuser
from ultrafuser import SpecialistSource, fuse, open_fused, save_fused
from ultrafuser.cli import app, report
from ultrafuser.cli.chat import Chat
from ultrafuser.cli.opening import open_decoder
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.decoding.engine import FusedDecoder
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.decoding.text import TextStream
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.templates import BUILTIN_TEMPLATES

NAMES = ["a", "b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    """A self-contained fused model of two adapters."""
    root = tmp_path_factory.mktemp("model")
    base = tiny_model(seed=1)
    folder = save_model(root / "base", base, tokenizer)
    sources = {
        name: SpecialistSource(
            model=folder, adapter=save_adapter(root / name, base, seed=seed), template=template
        )
        for seed, (name, template) in enumerate({"a": "alpaca", "b": "tokenizer"}.items())
    }
    fused = fuse(sources, gate_size=16)
    randomise_gate(fused.model.gate)
    save_fused(fused, root / "fused")
    return str(root / "fused")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two domains, in two of the usual forms."""
    folder = tmp_path_factory.mktemp("data")
    text = [{"prompt": f"Say {word}.", "completion": f"{word}!"} for word in ("yes", "no", "perhaps")]
    code = [{"instruction": "Print", "input": str(n), "output": f"print({n})"} for n in range(3)]
    for name, rows in (("text", text), ("code", code)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def succeeds(*arguments, **options):
    result = run(*arguments, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def refused(*arguments):
    """The one line on stderr of a command that exits with code 2 and says nothing else."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ultrafuser: ")
    assert result.stdout == ""
    return lines[0]


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


# --- the frame ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "chat", "serve", "inspect", "export"])
def test_every_command_explains_itself(command):
    assert command in succeeds("--help").stdout
    assert "Usage" in succeeds(command, "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{}", "Hello"), ("chat", "{}"), ("inspect", "{}", "--data", "text={data}"),
        ("export", "{}", "-o", "{out}"),
    ],
)  # fmt: skip
def test_a_model_that_is_not_there_is_one_line(arguments, tmp_path, data):
    places = {"data": data / "text.jsonl", "out": tmp_path / "out"}
    filled = [argument.format(tmp_path / "nowhere", **places) for argument in arguments]
    assert "nowhere: there is no such folder" in refused(*filled)
    assert not (tmp_path / "out").exists()


def test_an_error_of_many_lines_is_printed_on_one(monkeypatch, model):
    def fail(*_):
        raise UltrafuserError("first\nsecond [red]line[/red]")

    monkeypatch.setattr("ultrafuser.cli.generate.open_model", fail)
    assert refused("generate", model, "Hello") == "ultrafuser: first second [red]line[/red]"


def test_a_device_that_is_not_there_is_refused(model):
    assert "--device tpu9" in refused("generate", model, "Hello", "--device", "tpu9")


def test_the_installed_command_runs():
    code = "from ultrafuser.cli import main; main()"
    command = [sys.executable, "-c", code, "export", "/nowhere", "-o", "/dev/null/x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ultrafuser: ")


# --- generate -------------------------------------------------------------------------------------


def test_one_prompt_gives_one_json_line(model):
    rows = json_lines(succeeds("generate", model, "Hello", "--max-new-tokens", 8).stdout)
    assert [set(row) for row in rows] == [{"index", "response", "tokens", "finish"}]
    fused = open_fused(model)
    encoder = fused.model.conversation_encoder(fused.tokenizer)
    inputs = encoder.batch_prompts([[{"role": "user", "content": "Hello"}]])
    sequence = fused.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
    assert rows[0]["response"] == encoder.decode(sequence[inputs["input_ids"].shape[1] :].tolist())
    assert rows[0]["tokens"] == 8 or rows[0]["finish"] == "end"


def test_a_file_of_every_form_is_answered_in_order(model, tmp_path):
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = [
        {"messages": [*conversation, {"role": "user", "content": "And?"}], "id": "first"},
        {"messages": conversation, "id": 2},
        {"instruction": "Print", "input": "5"},
        {"instruction": "Print", "output": "left out", "id": None},
        {"prompt": "Say yes."},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, metrics = tmp_path / "out.jsonl", tmp_path / "metrics.json"
    common = ("generate", model, "--input", tmp_path / "in.jsonl", "--max-new-tokens", 6)
    result = succeeds(*common, "-o", out, "--batch-size", 2, "--json", metrics)
    assert result.stdout == ""
    answers = json_lines(out.read_text())
    assert [row["index"] for row in answers] == [0, 1, 2, 3, 4]
    assert [row.get("id") for row in answers] == ["first", 2, None, None, None]
    assert json_lines(succeeds(*common, "--batch-size", 1).stdout) == answers  # batched equals single
    alone = json_lines(succeeds("generate", model, "Hi", "--max-new-tokens", 6).stdout)
    assert answers[1]["response"] == alone[0]["response"]
    written = json.loads(metrics.read_text())
    assert written["metrics"]["num_prompts"] == 5
    assert written["metrics"]["num_tokens"] == sum(row["tokens"] for row in answers)
    assert written["provenance"]["seed"] == 0


def test_weights_come_with_every_token(model, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n{"prompt": "A much longer question, is it not?"}\n')
    common = ("generate", model, "--input", tmp_path / "in.jsonl", "--max-new-tokens", 6, "--weights")
    together = json_lines(succeeds(*common).stdout)
    single = json_lines(succeeds(*common, "--batch-size", 1).stdout)
    for row, same in zip(together, single, strict=True):
        assert row["specialists"] == NAMES
        assert len(row["token_texts"]) == len(row["gate_weights"]) == row["tokens"]
        assert "".join(row["token_texts"]).removesuffix("<|im_end|>") == row["response"]
        weights = torch.tensor(row["gate_weights"])
        assert torch.allclose(weights.sum(-1), torch.ones(len(weights)), atol=1e-4)
        assert weights.std() > 0.01
        assert torch.allclose(weights, torch.tensor(same["gate_weights"]), atol=1e-4)


def test_zero_valued_options_mean_zero(model):
    def answer(*options):
        return json_lines(succeeds("generate", model, "Hello", "--max-new-tokens", 12, *options).stdout)[0]

    greedy = answer()
    assert answer("--temperature", 0, "--top-p", 0.5, "--top-k", 3, "--seed", 5) == greedy
    assert answer("--temperature", 3, "--top-p", 0) == greedy
    assert answer("--temperature", 3, "--top-k", 1) == greedy
    sampled = answer("--temperature", 3, "--top-k", 0, "--seed", 0)
    assert sampled != greedy
    assert answer("--temperature", 3) == sampled  # 0 is what top-k and the seed are by default
    assert answer("--temperature", 3, "--seed", 1) != sampled
    nothing = json_lines(succeeds("generate", model, "Hello", "--max-new-tokens", 0, "--weights").stdout)
    assert nothing == [
        {
            "index": 0, "response": "", "tokens": 0, "finish": "length",
            "specialists": NAMES, "token_texts": [], "gate_weights": [],
        }
    ]  # fmt: skip


def test_a_system_message_is_read(model):
    common = ("generate", model, "Hello", "--max-new-tokens", 12)
    assert succeeds(*common, "--system", "Be brief.").stdout != succeeds(*common).stdout


def test_dtype_is_taken(model, tmp_path):
    succeeds(
        "generate", model, "Hello", "--max-new-tokens", 1, "--dtype", "bfloat16", "--json", tmp_path / "m"
    )
    assert json.loads((tmp_path / "m").read_text())["provenance"]["dtype"] == "torch.bfloat16"


def test_a_draft_model_drafts_and_changes_nothing(model, tmp_path, tokenizer, monkeypatch):
    drafting = save_model(tmp_path / "draft", tiny_model(seed=7), tokenizer)
    decoders = []

    def opened(*arguments):
        decoders.append(open_decoder(*arguments))
        return decoders[-1]

    monkeypatch.setattr("ultrafuser.cli.generate.open_decoder", opened)
    question = ("generate", model, "Hello", "--max-new-tokens", 24)
    plain = succeeds(*question, "--no-speculate").stdout
    assert succeeds(*question, "--draft-model", drafting).stdout == plain
    assert decoders[0].stats.draft_passes == 0 < decoders[1].stats.draft_passes


def test_a_seed_decides_samples_unless_drafts_are_asked_for(model, monkeypatch):
    speculating = []

    def opened(fused, max_batch, speculate, draft_model):
        speculating.append(speculate)
        return open_decoder(fused, max_batch, speculate, draft_model)

    monkeypatch.setattr("ultrafuser.cli.generate.open_decoder", opened)
    question = ("generate", model, "Hello", "--max-new-tokens", 4)
    for options in ((), ("--temperature", 0.8), ("--temperature", 0.8, "--speculate"), ("--no-speculate",)):
        succeeds(*question, *options)
    assert speculating == [True, False, True, False]


def test_draft_models_that_cannot_draft_are_refused(model, tmp_path, tokenizer):
    question = ("generate", model, "Hello", "--max-new-tokens", 8, "--draft-model")
    assert "--no-speculate" in refused(*question, tmp_path, "--no-speculate")
    assert "nowhere" in refused(*question, tmp_path / "nowhere")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<another>"])
    assert "<another>" in refused(*question, save_model(tmp_path / "other", tiny_model(), other))


def test_generate_refuses(model, tmp_path):
    assert "got neither" in refused("generate", model)
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hi"}\n{"question": "Hi"}\n')
    assert "got both" in refused("generate", model, "Hello", "--input", tmp_path / "in.jsonl")
    assert "in.jsonl:2: expected messages" in refused("generate", model, "--input", tmp_path / "in.jsonl")
    assert "must not be empty" in refused("generate", model, "  ")
    (tmp_path / "long.jsonl").write_text('{"prompt": "Hi"}\n' + json.dumps({"prompt": "word " * 300}) + "\n")
    line = refused("generate", model, "--input", tmp_path / "long.jsonl", "-o", tmp_path / "out.jsonl")
    assert re.search(r"long\.jsonl:\d: Specialist 'a' reads at most 256 tokens", line)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "option",
    [("--temperature", -1), ("--top-p", 1.5), ("--top-k", -1), ("--batch-size", 0), ("--dtype", "int8")],
)
def test_options_out_of_range_exit_with_2(model, option):
    assert run("generate", model, "Hello", *option).exit_code == 2


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_prints_tables_and_writes_everything(model, data, tmp_path):
    arguments = ("--data", f"text={data}/text.jsonl", "--data", f"code={data}/code.jsonl")
    result = succeeds(
        "inspect", model, *arguments, "-o", tmp_path / "out", "--json", tmp_path / "metrics.json"
    )
    for word in ("Loss", "uniform", "fused", "Mean gate weight", "text", "code"):
        assert word in result.stdout
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"weights.png", "samples.png", "tokens.png", "tokens.html", "metrics.json"}
    for name in ("weights.png", "samples.png", "tokens.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    document = json.loads((tmp_path / "metrics.json").read_text())
    assert document.keys() == {"metrics", "provenance"}
    rows = [*NAMES, "uniform", "fused"]
    losses = {f"loss/{row}/{domain}" for row in rows for domain in ("text", "code")}
    assert document["metrics"].keys() == losses | {f"weight/{d}/{n}" for d in ("text", "code") for n in NAMES}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"] == document["metrics"]


def test_inspect_without_a_folder_writes_none(model, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    succeeds("inspect", model, "--data", f"text={data}/text.jsonl", "--max-rows", 1, "--dtype", "float32")
    assert list(tmp_path.iterdir()) == []


def test_files_of_one_domain_are_joined_and_cut(model, data, tmp_path):
    both = ("--data", f"x={data}/text.jsonl", "--data", f"x={data}/code.jsonl")
    one = ("--data", f"x={data}/text.jsonl")

    def metrics(*arguments):
        succeeds("inspect", model, *arguments, "--json", tmp_path / "m.json")
        return json.loads((tmp_path / "m.json").read_text())["metrics"]

    assert metrics(*both, "--max-rows", 3) == metrics(*one)
    assert metrics(*both) != metrics(*one)


def test_inspect_refuses(model, data, tmp_path):
    assert "must be DOMAIN=FILE" in refused("inspect", model, "--data", "text.jsonl")
    assert "must be DOMAIN=FILE" in refused("inspect", model, "--data", "text=")
    assert "nowhere.jsonl: cannot be read" in refused("inspect", model, "--data", f"t={data}/nowhere.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "Hi", "completion": "Ho"}\n{"prompt": "Hi"}\n')
    assert "bad.jsonl:2: " in refused("inspect", model, "--data", f"t={tmp_path}/bad.jsonl")
    assert run("inspect", model).exit_code == 2
    assert run("inspect", model, "--data", f"t={data}/text.jsonl", "--max-rows", 0).exit_code == 2


def test_long_conversations_are_cut_only_when_asked(model, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "Go on.", "completion": "on " * 400}) + "\n")
    common = ("inspect", model, "--data", f"t={tmp_path}/long.jsonl")
    assert "reads at most 256 tokens" in refused(*common)
    succeeds(*common, "--truncate")


# --- serve ----------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_serve_names_what_vllm_needs(model):
    assert "pip install 'ultrafuser[vllm]'" in refused("serve", model, "--engine", "vllm")


def test_serve_refuses_options_of_the_other_engine(model):
    options = ("--engine", "vllm", "--max-waiting", 3, "--speculate")
    assert "--max-waiting, --speculate is for --engine native" in refused("serve", model, *options)
    assert "--seed 1: further options are for --engine vllm" in refused("serve", model, "--", "--seed", 1)


# --- export ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [(), ("--form", "gate-only"), ("--form", "whole"), ("--form", "specialist", "--name", "a"),
     ("--form", "adapter", "--name", "b")],
)  # fmt: skip
def test_export_writes_every_form_once(model, tmp_path, options):
    out = tmp_path / "out"
    result = succeeds("export", model, "-o", out, *options)
    assert "MB" in result.stdout
    assert any(out.glob("*.safetensors"))
    assert "must be new or empty" in refused("export", model, "-o", out, *options)


def test_export_makes_what_others_open(model, tmp_path):
    succeeds("export", model, "-o", tmp_path / "one", "--form", "specialist", "--name", "a")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "one")).__name__ == "LlamaForCausalLM"
    succeeds("export", model, "-o", tmp_path / "gate", "--form", "gate-only")
    whole = succeeds("export", tmp_path / "gate", "-o", tmp_path / "whole", "--form", "whole")
    assert "Wrote whole" in whole.stdout
    asked = ("Hello", "--max-new-tokens", 8)
    assert (
        succeeds("generate", tmp_path / "whole", *asked).stdout == succeeds("generate", model, *asked).stdout
    )


def test_export_gives_all_specialists_one_template(model, tmp_path):
    succeeds("export", model, "-o", tmp_path / "one", "--template", "alpaca")
    opened = open_fused(tmp_path / "one")
    (template,) = {member.template for member in opened.model.config.members}
    assert template == BUILTIN_TEMPLATES["alpaca"]
    assert opened.tokenizer.chat_template == template  # for programs that ask no specialist
    tokenizers = open_fused(model).tokenizer
    assert tokenizers.chat_template != template
    assert "Did you mean 'alpaca'" in refused(
        "export", model, "-o", tmp_path / "two", "--template", "alpacca"
    )
    assert not (tmp_path / "two").exists()


def test_an_adapter_is_written_in_the_type_asked_for(model, tmp_path):
    options = ("--form", "adapter", "--name", "a")
    succeeds("export", model, "-o", tmp_path / "stored", *options)
    succeeds("export", model, "-o", tmp_path / "half", *options, "--dtype", "bfloat16")
    dtypes = [
        {tensor.dtype for tensor in load_file(tmp_path / folder / "adapter_model.safetensors").values()}
        for folder in ("stored", "half")
    ]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_export_refuses(model, tmp_path):
    assert "needs the name" in refused("export", model, "-o", tmp_path / "out", "--form", "adapter")
    assert "no specialist 'q'" in refused(
        "export", model, "-o", tmp_path / "out", "--form", "specialist", "--name", "q"
    )
    assert list(tmp_path.iterdir()) == []


# --- chat -----------------------------------------------------------------------------------------


def test_chat_answers_and_obeys_its_commands(model):
    lines = ["/help", "/weights", "Hello", "/weights", "/only b", "Hello", "/weights", "/only", "/only q",
             "/reset", "/dance", "", "Hello", "/quit", "never read"]  # fmt: skip
    result = succeeds("chat", model, "--max-new-tokens", 8, input="\n".join(lines) + "\n")
    out = result.stdout
    assert out.count("/reset ") >= 2  # the help, asked for and after an unknown command
    assert "No answer yet." in out
    assert "mean weight" in out
    assert "b answers alone" in out and "b> " in out  # noqa: PT018
    assert "a 0.00  b 1.00" in out
    assert "All specialists answer" in out
    assert "no specialist q; there are a, b" in out
    assert "begins anew" in out
    assert "There is no command /dance." in out
    assert "never read" not in out
    first = re.findall(r"a \d\.\d\d  b \d\.\d\d · \d+ tokens", out)
    assert len(first) == 3
    assert first[0] == first[2]  # /reset forgot everything in between


def test_chat_ends_with_the_input_and_survives_a_conversation_that_is_full(model):
    question = "word " * 40
    result = succeeds("chat", model, "--max-new-tokens", 100, input=f"{question}\n" * 4)
    assert "context full" in result.stdout or "no longer fits" in result.stdout
    again = succeeds("chat", model, "--max-new-tokens", 4, input=f"{question * 9}\nHello\n")
    assert "no longer fits" in again.stdout
    assert "4 tokens" in again.stdout  # the question that did not fit was not kept


def test_chat_shows_what_generate_answers(model):
    row = json_lines(succeeds("generate", model, "Hello", "--max-new-tokens", 8).stdout)[0]
    result = succeeds("chat", model, "--max-new-tokens", 8, input="Hello\n")
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in row["response"])
    assert shown in result.stdout.replace("\r", "\ufffd")


def test_chat_with_no_tokens_allowed_says_so(model):
    assert "(no answer)" in succeeds("chat", model, "--max-new-tokens", 0, input="Hello\n").stdout


@pytest.fixture
def talk(model, monkeypatch):
    """Chat on a terminal that is a string; lines are typed, and an exception among them is raised instead."""

    def talk(*lines, **options):
        typed = iter(lines)

        def type_line(_prompt):
            line = next(typed, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", type_line)
        screen = io.StringIO()
        console = Console(
            file=screen, force_terminal=True, color_system="truecolor", width=80, highlight=False
        )
        Chat(open_fused(model), SamplingParams(max_new_tokens=6), console=console, **options).run()
        return screen.getvalue()

    return talk


def test_tokens_stand_on_the_mix_of_their_colours(talk):
    alone = {name: talk(f"/only {name}", "Hello") for name in NAMES}
    grounds = {name: set(re.findall(r"48;2;(\d+;\d+;\d+)m", screen)) for name, screen in alone.items()}
    assert grounds["a"] == grounds["b"]  # the two of the legend, one of which the answer has
    mixed = set(re.findall(r"48;2;(\d+;\d+;\d+)m", talk("Hello")))
    assert len(mixed) > 3


def test_ctrl_c_at_the_prompt_does_not_leave(talk):
    screen = talk(KeyboardInterrupt(), "Hello")
    assert "Ctrl-D leaves" in screen
    assert "6 tokens" in screen or "tokens, " in screen


def test_ctrl_c_stops_an_answer_and_keeps_what_came(talk, monkeypatch):
    original = FusedDecoder.stream

    def interrupted(*arguments, **options):
        for index, step in enumerate(original(*arguments, **options)):
            if index == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(FusedDecoder, "stream", interrupted)
    screen = talk("Hello", "/weights", "And?")
    assert screen.count("3 tokens") == 2
    assert screen.count("stopped") == 2


def test_answers_cannot_command_the_terminal(talk, monkeypatch):
    monkeypatch.setattr(TextStream, "push", lambda self, token_id: "\x1b[2J\x07[red]")
    screen = talk("Hello")
    assert "\x1b[2J" not in screen
    assert "\x07" not in screen
    assert "[red]" in screen


# --- provenance -----------------------------------------------------------------------------------


def test_provenance_says_how_numbers_came_about(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ultrafuser", "inspect", "a b"])
    found = provenance(seed=0, recipe="r.yaml")
    assert found["command"] == "ultrafuser inspect 'a b'"
    assert (found["seed"], found["recipe"]) == (0, "r.yaml")
    assert found["ultrafuser"] == ultrafuser.__version__
    assert found["torch"].startswith(torch.__version__.partition("+")[0])
    assert {"transformers", "python", "platform", "cpu", "num_cpus", "date", "git_commit"} <= found.keys()
    json.dumps(found)


def test_an_installed_copy_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(report.ultrafuser, "__file__", str(tmp_path / "site-packages/ultrafuser/__init__.py"))
    assert provenance()["git_commit"] is None


def test_metrics_are_written_whole_or_not_at_all(tmp_path):
    write_metrics(tmp_path / "new" / "m.json", {"loss": 0.0, "count": 3}, {"seed": 0})
    document = json.loads((tmp_path / "new" / "m.json").read_text())
    assert document == {"metrics": {"loss": 0.0, "count": 3}, "provenance": {"seed": 0}}
    with pytest.raises(UltrafuserError, match="metric loss must be a finite number"):
        write_metrics(tmp_path / "new" / "m.json", {"loss": float("nan")}, {})
    assert json.loads((tmp_path / "new" / "m.json").read_text()) == document
