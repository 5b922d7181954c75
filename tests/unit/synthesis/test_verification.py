"""What is checked of responses: final answers, and code however it is fenced."""

from types import SimpleNamespace

import pytest

from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.verification import answer_problem, code_problem


def program_of(response):
    """What a sandbox is given to run; None for nothing."""
    told = []

    class Listener:
        def run(self, program):
            told.append(program)
            return SimpleNamespace(passed=True)

    assert code_problem(response, Listener()) is None
    assert len(told) <= 1
    return told[0] if told else None


@pytest.mark.parametrize(
    ("response", "reference", "is_right"),
    [
        ("So it is $\\boxed{42}$.", "42", True),
        ("So it is $\\boxed{\\frac{1}{2}}$.", "0.5", True),
        ("It costs $12 in all. The answer is 12.", "12", True),
        ("So it is $\\boxed{41}$.", "42", False),
        ("I do not know.", "42", False),
        ("It is Tuesday.", "Tuesday", True),  # no number: not judged
    ],
)
def test_final_answers(response, reference, is_right):
    assert (answer_problem(response, reference) is None) == is_right


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ("No code.", None),
        ("```python\nprint(1)\n```", None),
        ("```python\ndef f(x):\n    return x\n```\nand\n```python\nassert f(2) == 2\n```", None),
        ("```python\ndef f(x): return x\nassert f(2) == 3\n```", "ended: AssertionError"),
        ("```py\nprint(\n```", "SyntaxError"),
        ("```\nthis is no Python\n```", None),
        ("```python\nimport no_such_library\n```", None),
        ("```python\nname = input()\n```", None),
        ("```python\nwhile True: print('x' * 1000)\n```", "output"),
    ],
)
def test_code(response, problem):
    found = code_problem(response, Sandbox())
    assert (found is None) if problem is None else (problem in found)


@pytest.mark.parametrize(
    "form",
    [
        "```python\n{}\n```",
        "```Python\n{}\n```",
        "``` PY \n{}\n```",
        "```python3\n{}\n```\nSo.",
        '```python title="x" {{1}}\n{}\n```',
        "```{{.python}}\n{}\n```",
        "````python\n{}\n````",
        "~~~python\n{}\n~~~",
        "~~~ python `x`\n{}\n~~~~~ \nSo.",
        "```python\n{}",  # not closed
        "````python\nx = 1  # ```\n{}\n````",
        "First\n```\nno Python\n```\nthen\n```python\n{}\n```",
        "Use `x` or ```x``` so:\n```python\n{}\n```",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_code_is_run_however_it_is_fenced(form, end):
    code = "if 1:\n    x = 1 / 0"
    run = program_of(form.format(code).replace("\n", end))
    assert run.removeprefix("x = 1  # ```\n") == code


@pytest.mark.parametrize(
    ("first", "indent", "inner"),
    [("   ", "   ", "   "), ("1. ", "   ", "   "), ("- 2) ", "     ", "     "), ("\t", "\t", "\t"), ("", "", "    "),
     ("   ", "", ""), ("* ", "", "  ")],
)  # fmt: skip
def test_code_may_be_indented(first, indent, inner):
    code = "x = 0\n\nif 1:\n    1 / x"
    lines = "\n".join(inner + line if line else "" for line in code.split("\n"))
    assert program_of(f"So:\n{first}```python\n{lines}\n{indent}```\nThat is all.") == code


def test_strings_may_be_indented_less_than_the_code():
    code = 'if 1:\n    x = """\na"""'
    assert program_of(f"```python\n{code}\n```") == code
    assert program_of("- ```python\n  " + code.replace("\n", "\n  ") + "\n  ```") == code


def test_fences_in_a_docstring_end_nothing():
    code = 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n1 / 0'
    assert program_of(f"```python\n{code}\n```") == code


@pytest.mark.parametrize(
    "response",
    [
        "````markdown\n```python\n1 / 0\n```\n````",  # shown, not meant
        "```python\n>>> 1 / 0\nZeroDivisionError\n```",
        "```python\n\n# Like this:\n>>> f(2)\n4\n```",
        "```python-repl\n1 / 0\n```",
        "```pycon\n1 / 0\n```",
        "```\n1 / 0\n```",
        "Write ```python 1 / 0``` there.",
        "```python\n\n```",
        "```python",
    ],
)
def test_what_is_no_program_is_not_run(response):
    assert program_of(response) is None


def test_a_transcript_does_not_spare_the_program_beside_it():
    assert program_of("```python\n>>> f(2)\n4\n```\n```python\n1 / 0\n```") == "1 / 0"
    assert "ZeroDivisionError" in code_problem("- so:\n\n  ```Python x\n  1 / 0", Sandbox())


def test_odd_lines_take_no_long_time():
    assert program_of("-    " * 2000 + "x\n" + "`" * 10_000 + "x`\n" + " " * 10_000) is None
