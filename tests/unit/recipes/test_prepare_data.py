"""The rows of the specialists: kept apart, free of test text, and the same in every run."""

import ast
import gzip
import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest

from ultrafuser.errors import UltrafuserError

SCRIPT = Path(__file__).parents[3] / "recipes" / "specialists" / "prepare_data.py"
PLANTED = "one two three four five six seven eight nine ten eleven twelve thirteen"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["prepare_data"]


def sentence(rng, num_words=12):
    return " ".join(f"w{rng.randrange(10**6)}" for _ in range(num_words))


def records(fields, num_rows, seed, **fixed):
    rng = random.Random(seed)
    return [{name: sentence(rng) for name in fields} | fixed for _ in range(num_rows)]


def write(folder, name, rows):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def source(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    instruct = ("instruction", "input", "output")
    gsm8k = records(("question", "answer"), 380, 1)
    gsm8k[0] = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 apples.\n#### 5"}
    gsm8k[1] = {"question": "Copied?", "answer": f"So {PLANTED.upper()}!\n#### 1"}
    gsm8k[2] = {"question": "Long?", "answer": "x" * 2401}
    gsm8k[3] = {"question": "Empty?", "answer": " "}
    gsm8k[4] = gsm8k[5]
    math_test = records(("problem", "solution"), 210, 2)
    math_train = records(("problem", "solution"), 180, 3)
    math_train[0]["problem"] = math_test[7]["problem"].upper() + "?"
    mbpp = [
        row
        for number, (split, count) in enumerate({"prompt": 10, "train": 110, "validation": 10}.items())
        for row in records(("text", "code"), count, 20 + number, split=split)
    ]
    mbpp[0]["code"] = "def f(x):\r\n\treturn x\r\n"
    write(folder, "math_gsm8k_train", gsm8k)
    write(folder, "math_gsm8k_test", records(("question", "answer"), 210, 4))
    write(folder, "math_math_train", math_train)
    write(folder, "math_math_test", math_test)
    write(folder, "math_aqua_dev", records(("question", "rationale"), 5, 5, options=["A)1", "B)2"]))
    write(folder, "math_mawps_test", [{"question": f"And {PLANTED}.", "answer": 1.0}])
    write(folder, "text_alpacaeval_test", [{"instruction": math_train[1]["problem"]}])
    write(folder, "code_gpteacher_codegen_train", records(instruct, 520, 6))
    write(folder, "code_mbpp_train_val_prompt", mbpp)
    write(
        folder,
        "code_humaneval_instruct_test",
        [{"instruction": "Add.", "declaration": "\ndef f(a):\n", "canonical_solution": "    return a\n\n"}],
    )
    write(folder, "text_dolly_filtered_train", records(instruct, 520, 7))
    commits = [
        {"prompt": f"{script.FIRST_COMMIT}\nx = 1", "output": "x = 2"},
        {"prompt": "Fix.", "output": "x = 3"},
    ]
    write(folder, "text_oasst_octopack_train", records(("prompt", "output"), 220, 8) + commits)
    write(folder, "text_gpteacher_roleplay_train", records(instruct, 220, 9))
    return folder


@pytest.fixture(scope="module")
def prepared(script, source, tmp_path_factory):
    output = tmp_path_factory.mktemp("output")
    counts = script.prepare(source, output)
    return counts, output


def read(output, name):
    rows = [
        json.loads(line)["messages"] for line in (output / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    return [(user["content"], assistant["content"]) for user, assistant in rows]


@pytest.mark.parametrize("domain", ["math", "code", "text"])
def test_train_gate_and_heldout_share_no_question(prepared, domain):
    counts, output = prepared
    names = [name for name in counts["rows"] if name.startswith(f"{domain}.")]
    questions = {name: {question for question, _ in read(output, name)} for name in names}
    assert sum(map(len, questions.values())) == len(set().union(*questions.values()))
    assert len(questions[f"{domain}.train"]) == counts["rows"][f"{domain}.train"]


def test_parts_have_their_sizes(prepared):
    rows = prepared[0]["rows"]
    assert (rows["math.gate"], rows["code.gate"], rows["text.gate"]) == (500, 500, 500)
    assert (rows["math.heldout"], rows["math.heldout_math"], rows["math.heldout_aqua"]) == (200, 200, 5)
    assert (rows["code.heldout"], rows["code.heldout_mbpp"], rows["code.heldout_humaneval"]) == (200, 10, 1)
    assert (rows["text.heldout"], rows["text.heldout_oasst"], rows["text.heldout_roleplay"]) == (
        200,
        100,
        100,
    )


def test_heldout_rows_are_the_first_of_the_shuffled_file(script, source, prepared):
    expected = script.read_records(source, "text_dolly_filtered_train")
    random.Random(0).shuffle(expected)
    first = expected[0]
    assert read(prepared[1], "text.heldout")[0] == (
        f"{first['instruction']}\n\n{first['input']}",
        first["output"],
    )


def test_overlap_with_test_files_is_removed_and_counted(prepared):
    counts, output = prepared
    questions = {question for part in ("train", "gate") for question, _ in read(output, f"math.{part}")}
    assert "How many?" in questions
    assert not questions & {"Copied?", "Long?", "Empty?"}
    dropped = {name: source["dropped"] for name, source in counts["sources"]["math"].items()}
    assert dropped == {
        "gsm8k": {"duplicate": 1, "empty": 1, "overlap:math_mawps_test": 1, "too_long": 1},
        "math": {"overlap:math_math_test": 1},  # alpacaeval is non-commercial and not read
    }


def test_code_commits_are_not_text(prepared):
    assert prepared[0]["sources"]["text"]["oasst"]["read"] == 120
    assert not {"x = 2", "x = 3"} & {answer for _, answer in read(prepared[1], "text.train")}


def test_answers_are_cleaned(prepared):
    output = prepared[1]
    math = dict(read(output, "math.train") + read(output, "math.gate"))
    assert math["How many?"] == "2 + 3 = 5 apples.\n#### 5"
    code = dict(read(output, "code.train") + read(output, "code.gate"))
    assert "def f(x):\n\treturn x" in code.values()
    assert read(output, "code.heldout_humaneval") == [("Add.", "def f(a):\n    return a")]
    assert all(question.endswith("\nA)1\nB)2") for question, _ in read(output, "math.heldout_aqua"))


def test_two_runs_write_the_same_bytes(script, source, prepared, tmp_path):
    script.prepare(source, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in prepared[1].iterdir())
    assert all((tmp_path / name).read_bytes() == (prepared[1] / name).read_bytes() for name in names)


def test_interleave_keeps_the_pace_until_a_source_runs_out(script):
    merged = script.interleave([(["a"] * 8, 2), (["b"] * 10, 1)])
    assert merged[:12].count("a") == 8
    assert merged[:6].count("a") == 4
    assert merged[12:] == ["b"] * 6


def test_missing_file_is_named(script, tmp_path):
    with pytest.raises(UltrafuserError, match=r"math_gsm8k_test\.jsonl\.gz"):
        script.prepare(tmp_path, tmp_path / "out")


def test_too_short_source_is_refused(script, source, tmp_path):
    for path in source.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, "math_math_train", records(("problem", "solution"), 3, 3))
    with pytest.raises(UltrafuserError, match="math must have at least 150 usable rows"):
        script.prepare(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


MODULE = '''
import math
LIMIT = 3

def area(radius):
    """Return the area of a circle of the given radius."""
    if radius < 0:
        raise ValueError(radius)
    return math.pi * radius**2

def limited(value):
    """Return the value, bounded by the limit."""
    if value > LIMIT:
        return LIMIT
    return value

class Box:
    def add(self, item):
        """Add an item to the box and return it."""
        self.items.append(item)
        self.count += 1
        return item

    def hide(self, item):
        """Add an item to the hidden ones."""
        self._items.append(item)
        self._count += 1
        return item
'''


def test_documented_functions_are_those_that_stand_alone(script):
    found = list(script.documented_functions("shapes", MODULE))
    assert [item.qualname for item in found] == ["shapes.area", "shapes.Box.add"]
    assert found[0].row().answer.startswith("import math\n\n\ndef area(radius):\n")
    assert "`Box`" in found[1].row().question
    assert found[0].without_docstring().split("\n")[1] == "    if radius < 0:"
    assert found[0].fields()["third"] == "returns the area of a circle of the given radius."


def test_standard_library_answers_are_short_python(script):
    rows = script.stdlib_rows()
    assert len(rows) > 200
    assert all(len(row.answer) <= 1200 and ast.parse(row.answer).body for row in rows)
    assert len({row.question for row in rows}) > 0.98 * len(rows)
