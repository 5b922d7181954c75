"""What is checked of responses: code, however it is fenced and however it ends."""

import ast
import os
import threading
import time
from types import SimpleNamespace

import pytest

from ultrafuser.sandbox import Limits, Sandbox
from ultrafuser.synthesis.stages import Call, ResponseStage
from ultrafuser.synthesis.verification import code_problem, problem_of

FENCED = "```python\n{}\n```"


def program_of(response, earlier=()):
    """What a sandbox is given to run; None for nothing."""
    told = []

    class Listener:
        def run(self, wrapped):
            call = ast.parse(wrapped).body[-1].value
            told.append(ast.literal_eval(call.args[0]))
            return SimpleNamespace(passed=True)

    assert code_problem(response, Listener(), earlier) is None
    assert len(told) <= 1
    return told[0] if told else None


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox()


@pytest.mark.parametrize(
    "told",
    [
        "open(__file__).read()",
        *(
            f"mark + {text!r}"
            for text in ("{", "[]", "[" * 9_000, '{"kinds": 3}', '{"kinds": [[]], "text": 1}')
        ),
    ],
)
def test_a_program_that_writes_the_mark_itself_is_no_error_of_ours(sandbox, told):
    find = "import os, re, sys\nmark = re.findall('[0-9a-f]{32}', open(__file__).read())[-1]\n"
    code = f"{find}sys.stderr.write({told}); sys.stderr.flush(); os._exit(1)"
    assert code_problem(FENCED.format(code), sandbox) is not None


@pytest.mark.parametrize(
    ("response", "problem"),
    [
        ("No code.", None),
        ("```python\nprint(1)\n```", None),
        ("```python\ndef f(x):\n    return x\n```\nand\n```python\nassert f(2) == 2\n```", None),
        ("```python\ndef f(x): return x\nassert f(2) == 3\n```", "ended: AssertionError"),
        ("```py\nprint(\n```", "SyntaxError"),
        ("```\nthis is no Python\n```", None),
        ("```python\nwhile True: print('x' * 1000)\n```", "output"),
        ("> ```python\n> 1 / 0\n> ```", "ended: ZeroDivisionError: division by zero"),
    ],
)
def test_code(response, problem, sandbox):
    found = code_problem(response, sandbox)
    assert (found is None) if problem is None else (problem in found)


@pytest.mark.parametrize(
    "program",
    [
        "import no_such_library",
        "try:\n    import no_such_library\nexcept ImportError as error:\n    raise SystemExit('install it') from error",
        "name = input()",
        "import sys\ncount = int(sys.stdin.readline())",
        "import sys\nfirst = sys.stdin.read().split()[0]",
        "open('no such file')",
        "try:\n    open('data.json')\nexcept OSError:\n    raise ValueError('no data')",
        "import argparse\nparser = argparse.ArgumentParser()\nparser.add_argument('path')\nparser.parse_args()",
        "import sys\nif len(sys.argv) < 2:\n    print('usage')\n    sys.exit(1)",
        "import sys\npath = sys.argv[1]",
        "import os\nkey = os.environ['API_KEY']",
        "from urllib.request import urlopen\nurlopen('http://example.com')",
        "import socket\nsocket.create_connection(('93.184.216.34', 80), 1)",
        "import subprocess\nsubprocess.run(['no-such-program'])",
    ],
)
def test_what_needs_more_than_there_is_cannot_be_judged(program, sandbox):
    assert code_problem(FENCED.format(program), sandbox) is None


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        ("assert 0, 'a\\nEOFError'", "ended: AssertionError: a\nEOFError"),
        ("import sys\nsys.stderr.write('EOFError')\nsys.exit(3)", "ended: SystemExit: 3"),
        ("raise ValueError('\\n\\nModuleNotFoundError: x')", "ended: ValueError"),
        ("import sys\nsys.stdin.read()\nassert 0", "ended: AssertionError"),
        ("try:\n    open('no such file')\nexcept OSError:\n    pass\nassert 0", "ended: AssertionError"),
        ("class E(Exception):\n    def __str__(self): raise ValueError\nraise E", "ended: E: "),
        ("import unittest\nclass T(unittest.TestCase):\n    def test(self): self.fail()\nunittest.main()",
         "ended: SystemExit"),
        ("import os\nos._exit(3)", "ended: "),
        ("x = '\\udc80'\nassert 0, x", "ended: AssertionError"),
        ("from collections import Mapping", "ended: ImportError"),
    ],
)  # fmt: skip
def test_errors_are_what_python_says_not_what_the_program_writes(program, problem, sandbox):
    assert code_problem(FENCED.format(program), sandbox).startswith(problem)


@pytest.mark.parametrize(
    "program",
    [
        "assert __name__ == '__main__'",
        "import inspect\ndef f(): return 1\nassert 'return 1' in inspect.getsource(f)",
        "import inspect\nclass A: x = 1\nassert 'x = 1' in inspect.getsource(A)",
        "import pickle\nclass A: pass\nassert type(pickle.loads(pickle.dumps(A()))) is A",
        "from __future__ import annotations\ndef f(x: no): pass\nassert f.__annotations__ == {'x': 'no'}",
        "def f(x: int): pass\nassert f.__annotations__ == {'x': int}",
        "import threading\nthreading.Timer(0.1, lambda: print(x)).start()\nx = 1",
        "raise SystemExit",
        "from concurrent.futures import ProcessPoolExecutor\nimport multiprocessing\ndef f(x): return x + 1\n"
        "if __name__ == '__main__':\n    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool:\n"
        "        assert list(pool.map(f, [1])) == [2]",
    ],
)
def test_programs_run_as_if_they_were_alone(program, sandbox):
    assert code_problem(FENCED.format(program), sandbox) is None


def test_waiting_is_not_judged_but_using_all_time_is():
    sandbox = Sandbox(Limits(wall_s=3, cpu_s=1))
    assert code_problem(FENCED.format("import time\ntime.sleep(60)"), sandbox) is None
    assert code_problem(FENCED.format("while True: pass"), sandbox) == "time: it does not end"


def test_no_more_programs_run_than_there_are_processors():
    lock, running, most = threading.Lock(), 0, 0

    class Slow:
        def run(self, program):
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.02)
            with lock:
                running -= 1
            return SimpleNamespace(passed=True)

    threads = [
        threading.Thread(target=code_problem, args=("```python\n1\n```", Slow()))
        for _ in range(4 * os.cpu_count())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == os.cpu_count()


def test_what_is_wanted_of_the_future_comes_first(sandbox):
    first = '"""Doc."""\nfrom __future__ import annotations; x = 1\ndef f(y: no): pass'
    second = "from __future__ import (\n    division,\n    annotations,\n)\nassert x == 1"
    response = FENCED.format(first) + "\n\n" + FENCED.format(second)
    assert code_problem(response, sandbox) is None
    assert program_of(response).startswith("from __future__ import annotations, division\n")
    assert code_problem(response.replace("x == 1", "x == 2"), sandbox).startswith("ended: AssertionError")
    in_text = 'x = """\nfrom __future__ import no_such_thing\n"""\ny = "äö"; '
    assert program_of(FENCED.format(in_text) + "\n" + FENCED.format("1")) == f"{in_text}\n\n1"
    assert "SyntaxError" in code_problem(FENCED.format("1 +") + "\n" + FENCED.format(first), sandbox)


def test_later_code_may_need_earlier_code(sandbox):
    earlier = [
        "No code.",
        FENCED.format("from __future__ import annotations\ndef f(x): return x"),
        FENCED.format("y = 1"),
    ]
    later = FENCED.format("from __future__ import annotations\nassert f(y) == {}")
    assert code_problem(later.format(1), sandbox, earlier) is None
    assert code_problem(later.format(1), sandbox).startswith("ended: NameError")
    assert code_problem(later.format(2), sandbox, earlier).startswith("ended: AssertionError")
    assert problem_of("code", later.format(1), None, sandbox, earlier) is None
    alone = FENCED.format("try:\n    y\nexcept NameError:\n    pass\nelse:\n    raise ValueError")
    assert code_problem(alone, sandbox, earlier) is None  # it needs nothing of them


def test_a_stage_gives_earlier_code_with_a_later_turn(sandbox):
    settings = SimpleNamespace(check="code")
    stage = ResponseStage(
        SimpleNamespace(recipe=SimpleNamespace(domains={"code": settings}), sandbox=sandbox)
    )
    said = [
        {"role": "system", "content": FENCED.format("x = 2")},
        {"role": "user", "content": FENCED.format("x = 3")},
        {"role": "assistant", "content": FENCED.format("x = 4")},
        {"role": "user", "content": "And then?"},
    ]
    call = Call("responses/code/2/0", said, None, {"domain": "code", "reference": None, "is_question": False})
    assert stage.problem(call, FENCED.format("assert x == 4")) is None
    assert stage.problem(call, FENCED.format("assert x == 2")).startswith("ended: AssertionError")


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
        "# So\n```python\n{}\n```",
        "<details>\n\n```python\n{}\n```\n</details>",
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


@pytest.mark.parametrize(
    ("lead", "rest"),
    [
        ("> ", "> "), ("a\n2. ", "   "), ("> > ", "> > "), ("> 1. ", ">    "),
        ("1. > ", "   > "), ("- a\n  ", "  "), ("- a\n\n  ", "  "),
        ("1. a\n\n   ", "   "),
        ("1. a\n    ", "    "), ("1. a\n   - b\n\n     ", "     "), ("1. a\n   - b\n     ", "     "),
        ("1. a\n\n        ", "        "), ("- a\n\t", "\t"), ("10. a\n\n    > ", "    > "), ("a\n> b\n> ", "> "),
        ("    ", "    "), ("> 1. a\n> \n>    ", ">    "),
    ],
)  # fmt: skip
def test_code_may_be_in_lists_and_quotes(lead, rest):
    code = "x = 0\n\nif 1:\n    1 / x"
    block = FENCED.format(code).replace("\n", f"\n{rest}")
    assert program_of(f"{lead}{block}\n\nSo.\n\n```python\ny = 1\n```") == f"{code}\n\ny = 1"


def test_a_quote_that_ends_ends_its_code():
    assert program_of("> ```python\n> x = 1\n\nSo.\n\n```python\n1 / 0\n```") == "x = 1\n\n1 / 0"


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


@pytest.mark.parametrize(
    "text",
    [
        "-    " * 2000 + "x\n" + "`" * 10_000 + "x`\n" + " " * 10_000,
        "`" * 200_000,
        "`" * 199_999 + "x",
        "```x`\n" * 33_000,
        ("`" * 100 + "\n") * 2000,
        "```\n``" * 28_000,
        "> " * 100_000,
        "> ```\n" * 33_000,
        ">```\n\n" * 15_000,
        "- " * 100_000,
        "- ```\n" * 33_000,
        "  - ```x`\n" * 10_000,
        "~" * 100_000 + "\n" + "`" * 100_000,
        "\n" * 200_000,
        "\t" * 200_000,
        "1. " * 60_000,
    ],
)
def test_odd_lines_take_no_long_time(text):
    start_s = time.process_time()
    assert program_of(text) is None
    assert time.process_time() - start_s < 1
