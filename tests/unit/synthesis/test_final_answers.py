"""Final answers against references: what is right, what is wrong, and what is left alone."""

import queue
import random
import re
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.final_answers import agrees, answer_problem

RIGHT, WRONG, UNCLEAR = True, False, None
PAIRS = [
    ("√2", r"\sqrt{2}", RIGHT), ("2√3", r"2\sqrt{3}", RIGHT), ("½", "0.5", RIGHT), ("-½", "-0.5", RIGHT),
    ("1½", "1.5", RIGHT), ("¾", r"\frac{3}{4}", RIGHT), ("10⁻³", "0.001", RIGHT), ("10³", "1000", RIGHT),
    ("10³", "10", WRONG), ("£5", "£5.00", RIGHT), ("¥500", "500", RIGHT), ("2x", "2 x", RIGHT), ("5n", "5 n", RIGHT),
    ("3a+2b", "3 a + 2 b", RIGHT), ("1/2 x", "x/2", UNCLEAR), ("5 choose 2", "10", UNCLEAR),
    ("(5, oo)", "x > 5", UNCLEAR), ("x > 5", "(5, oo)", RIGHT), ("11", "1011_2", UNCLEAR), ("0x1F", "31", UNCLEAR),
    ("3 x", "3", WRONG), ("> 5", "5", UNCLEAR), ("(1,200)", "1200", UNCLEAR), ("≈ 3.14", "3.14", UNCLEAR),
    ("3 mod 5", "3", UNCLEAR), ("2₁₀", "2", UNCLEAR),
    ("2**10", "1024", RIGHT), ("2**10", "2", WRONG), ("2^10", "1024", RIGHT), ("1 1/2", "1.5", RIGHT),
    ("1 1/2", "3/2", RIGHT), ("1 1/2", "1", WRONG), ("2 1/2", r"\frac{5}{2}", RIGHT),
    ("2 1/2", r"2\frac{1}{2}", RIGHT), ("2 1/2", "21/2", WRONG), ("2*pi", r"2\pi", RIGHT), ("2*pi", r"\pi", WRONG),
    ("2*pi", "6.28", UNCLEAR), ("2*pi", "6", WRONG), ("ln(2)", r"\ln 2", RIGHT), ("ln(2)", r"\ln(3)", WRONG),
    ("ln(2)", "0.693", UNCLEAR), ("1.2e-5", r"1.2 \times 10^{-5}", RIGHT), ("1.2e-5", "0.000012", RIGHT),
    ("1.2e-5", "1.2e-4", WRONG), ("1.2e-5", r"1.2\cdot10^{-6}", WRONG), ("72 km/h", "72", RIGHT),
    ("72 km/h", r"72 \text{ km/h}", RIGHT), ("72 km/h", r"20\ \text{m/s}", UNCLEAR), ("72 km/h", "71", WRONG),
    ("72 km/h", r"72\,\mathrm{m/s}", UNCLEAR), ("5 cm", "5", RIGHT), ("5 cm", "5 m", UNCLEAR),
    ("5 cm", "50 mm", UNCLEAR), ("5 cm", r"5\text{ centimeters}", UNCLEAR), ("5 cm", "6 cm", WRONG),
    ("$18", "18", RIGHT), ("$18", r"\$18", RIGHT), ("$18", r"18\text{ dollars}", RIGHT), ("$18", "19", WRONG),
    ("$18", "1800 cents", UNCLEAR), ("18", r"\$18.00", RIGHT), ("$1,234.50", "1234.5", RIGHT),
    ("20%", r"20\%", RIGHT), ("20%", "20", RIGHT), ("20%", "0.2", RIGHT), ("20%", r"\frac{1}{5}", RIGHT),
    ("20%", "0.02", WRONG), ("20%", r"25\%", WRONG), ("0.2", r"20\%", RIGHT), ("20", r"20\%", RIGHT),
    ("#### 1,234", "1234", RIGHT), ("1,234", "1{,}234", RIGHT), ("1,234", "1.234", WRONG), ("1234", "1,234", RIGHT),
    ("1234", "234", WRONG), (r"\frac{1}{2}", "0.5", RIGHT), ("0.5", r"\dfrac12", RIGHT), ("1/3", "0.33", UNCLEAR),
    ("1/3", "0.34", WRONG), ("1/3", "0.3333", UNCLEAR), ("1/3", "1/4", WRONG), (r"\sqrt{2}", "sqrt(2)", RIGHT),
    (r"2\sqrt{3}", r"\sqrt{12}", RIGHT), ("sqrt(8)", r"2\sqrt2", RIGHT), ("(1, 2)", "(1,2)", RIGHT),
    ("(1, 2)", "(2, 1)", WRONG), ("(1, 2)", r"\left(1, 2\right)", RIGHT), ("[0, 1]", "[0,1]", RIGHT),
    ("[0, 1)", "[0,1]", UNCLEAR), ("(0, 1]", "(0,1]", RIGHT), ("[0,1]", "(0,1)", UNCLEAR),
    ("two dozen", "24", UNCLEAR), ("24", "two dozen", UNCLEAR), ("$5", "-$5", WRONG), ("-$5", r"-\$5", RIGHT),
    ("(0, oo)", r"(0, \infty)", RIGHT), ("(0, oo)", r"[0, \infty)", UNCLEAR), ("1, 2", "2, 1", RIGHT),
    ("1, 2", "1 and 2", RIGHT), ("{1, 2}", r"\{2, 1\}", RIGHT), ("1, 2", "1, 3", WRONG), ("1,2,3", "1, 2", WRONG),
    ("-3", "-3", RIGHT), ("-3", "3", WRONG), ("-3", "−3", RIGHT), ("x = 5", "5", RIGHT), ("5", "x = 5", RIGHT),
    ("x=5", "x=-5", WRONG), ("x = 5 or x = -3", "x=-3, x=5", UNCLEAR), ("x = 2, y = 3", "(2, 3)", UNCLEAR),
    ("x=2, y=3", "x=3, y=2", UNCLEAR), ("2x+3", "3+2x", RIGHT), ("2x + 3", "2x+4", WRONG),
    ("(x+1)^2", "x^2+2x+1", RIGHT), ("x^2-1", "(x-1)(x+1)", RIGHT), ("y = 2x+3", "2x+3", RIGHT),
    ("x > 5", "x > 5", RIGHT), ("x > 5", "5 < x", RIGHT), ("x>5", "x<5", WRONG), ("x > 5", r"(5,\infty)", RIGHT),
    ("1 < x <= 2", "(1, 2]", UNCLEAR), ("x < -2 or x > 3", r"(-\infty,-2)\cup(3,\infty)", UNCLEAR),
    ("12 apples", "12", RIGHT), ("12", "12 apples", RIGHT), ("12 apples", "13", WRONG), ("5 men", "5", RIGHT),
    ("3 dozen", "36", UNCLEAR), ("5!", "120", RIGHT), ("90°", r"90^\circ", RIGHT), ("90°", "90", RIGHT),
    ("90", r"90^{\circ}", RIGHT), (r"\pi/2", r"90^\circ", RIGHT), ("6", "2x + 3y = 6", UNCLEAR),
    ("42", r"\text{no solution}", UNCLEAR), ("42", r"\text{forty-two}", UNCLEAR), ("12", "B", UNCLEAR),
    ("3 hours", "180 minutes", UNCLEAR), ("2 hours 30 minutes", "150", UNCLEAR), ("1e6", "1000000", RIGHT),
    ("6.02e23", r"6.02 \times 10^{23}", RIGHT), ("log(100)", "2", RIGHT), ("log(8)/log(2)", "3", RIGHT),
    (r"\log_2 8", "3", UNCLEAR), ("e^2", "e^{2}", RIGHT), ("e^2", "7.389", UNCLEAR),
    ("2 ± sqrt(3)", r"2 \pm \sqrt{3}", RIGHT), ("3+4i", "3 + 4i", RIGHT), ("3+4i", "3-4i", WRONG),
    ("|x|", "|x|", RIGHT), ("x", "5", WRONG), ("n(n+1)/2", r"\frac{n(n+1)}{2}", RIGHT),
    ("100 square cm", r"100\text{ cm}^2", UNCLEAR), ("C(5,2)", "10", UNCLEAR), (r"\binom{5}{2}", "10", RIGHT),
    ("1/2x", "x/2", UNCLEAR), ("3,5", "3.5", UNCLEAR), ("7:30", "7:30", UNCLEAR), ("10^-3", "0.001", RIGHT),
    ("3/4 cup", "0.75", RIGHT), ("50 cents", "0.50", WRONG), ("5 m/s", r"5\ \mathrm{m/s}", RIGHT),
    ("9.8 m/s^2", "9.8", RIGHT), ("0", "0", RIGHT), ("0", "1", WRONG), ("2pi", r"2\pi", RIGHT),
    ("12 cm^2", "12 cm", UNCLEAR), (r"\frac{3}{4}", "3/4", RIGHT), ("25π", "25pi", RIGHT),
    ("sin(30°)", "1/2", UNCLEAR), ("-1/2", r"-\frac{1}{2}", RIGHT), ("9^(9^9)", "5", UNCLEAR), ("20 °C", "20", RIGHT),
    ("1/2 hour", "30 minutes", UNCLEAR), ("1:2", "1:2", UNCLEAR), ("50 mph", "50", RIGHT), ("€5", "5", RIGHT),
    ("$1.5 million", "1500000", UNCLEAR), ("10,000", "10 000", UNCLEAR), ("10000", "10,000", RIGHT),
    ("100,200", "(100,200)", UNCLEAR), ("50 mph", "50 miles per hour", UNCLEAR), ("72 km per hour", "72 km/h", UNCLEAR),
    ("3 hours", "3 hours of work", UNCLEAR), ("12 clips", "12 bolts", UNCLEAR), ("5 stone", "31.75 kg", UNCLEAR),
    ("1st", "1", RIGHT), ("5 sec", "5", RIGHT), ("2*Pi", r"2\pi", RIGHT), ("3.14159", "3.14", UNCLEAR),
    ("3.14", "3.141", UNCLEAR), ("2.5", "2.46", UNCLEAR), ("100/3", r"\$33.33", UNCLEAR), ("2/3", "0.67", UNCLEAR),
    ("2/3", "0.66", UNCLEAR), ("2/3", "0.68", WRONG), ("12345678901234567890", "12345678901234567891", WRONG),
    ("2^64", "18446744073709551616", RIGHT), ("2^64", "18446744073709551617", WRONG),
    (r"\sqrt{2}", "1.4142135623730951", RIGHT), (r"\frac{x^2-1}{x-1}", "x+1", RIGHT), (r"\frac{x}{2}", "x/3", WRONG),
    ("2t", "2x", UNCLEAR), ("5", "5x", WRONG), ("sin^2(x)+cos^2(x)", "1", UNCLEAR), ("-2^2", "4", WRONG),
    ("(-8)^(1/3)", "-2", UNCLEAR), (r"\sqrt[3]{-8}", "-2", UNCLEAR), ("-x^2", "x^2", WRONG),
    ("The answer is 42.", "42", RIGHT), ("**42**", "42", RIGHT), ("$42$", "42", RIGHT),
    (r"\(42\)", r"\boxed{42}", RIGHT), ("42.", "42.0", RIGHT), ("Total = 42", "42", RIGHT),
    ("P(A) = 1/3", r"\frac13", RIGHT), ("2 + 3 = 5", "5", RIGHT), ("x = 5", "y = 5", UNCLEAR),
    ("[1, 2) U (3, 4]", r"[1,2)\cup(3,4]", RIGHT), ("[1, 2) U (3, 4]", r"[1,2)\cup[3,4]", UNCLEAR),
    (r"x \in [0, 1]", "[0, 1]", UNCLEAR), (r"\mathbb{R}", r"(-\infty, \infty)", UNCLEAR),
    ("{1, 2}", "{1, 2, 3}", WRONG), ("((1, 2), (3, 4))", "((1, 2), (3, 4))", RIGHT),
    ("(1, 2), (3, 4)", "(3, 4), (1, 2)", RIGHT), ("1, 2", "(2, 1)", RIGHT), ("Tuesday", "Monday", UNCLEAR),
    ("B", "C", UNCLEAR), (r"\frac{9}{0}", "5", UNCLEAR), ("1/0", "1/0", UNCLEAR), ("5", "zero", UNCLEAR),
    ("2.5e", "2.5e", RIGHT), ("2e+3", "2000", RIGHT), ("2e + 3", "8.436563656918091", RIGHT),
    ("$3 and 50 cents", "3.50", UNCLEAR), ("1,00", "1", UNCLEAR), ("5L", "5 L", UNCLEAR), ("5L", "5", UNCLEAR),
    ("5", "5 L", RIGHT), ("5", "5K", UNCLEAR), ("5L", "6 L", WRONG), ("5L", "6", WRONG), ("0.5", "200!", WRONG),
    ("10^{400}", "1.5", WRONG), ("10^{400}", "10^{400}", RIGHT), ("1 percent", "10^{400}", WRONG),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer", "verdict"), PAIRS)
def test_verdicts(reference, answer, verdict):
    assert agrees(reference, answer) is verdict
    response = f"First $1 + 1 = 2$.\n\nSo it is $\\boxed{{{answer}}}$."
    assert (answer_problem(response, reference) is None) == (verdict is not WRONG)


@pytest.mark.parametrize(
    ("response", "reference", "is_right"),
    [
        ("So it is $\\boxed{42}$.", "42", True),
        ("So it is $\\boxed{\\frac{1}{2}}$.", "0.5", True),
        ("It costs $12 in all. The answer is 12.", "12", True),
        ("So it is $\\boxed{41}$.", "42", False),
        ("I do not know.", "42", False),
        ("It is Tuesday.", "Tuesday", True),  # no number: not judged
        ("", "42", False),
        ("Half of 48 is 24.\n#### 72", "#### 72", True),
        ("Half of 48 is 24.\n#### 1,072", "72", False),
        ("\\boxed{1} first, then \\boxed{42}", "42", True),
        ("\\boxed{42} first, then \\boxed{1}", "42", False),
        ("$x = \\boxed{1}$ and $y = \\boxed{2}$", "1, 2", True),
        ("$x = \\boxed{1}$ and $y = \\boxed{2}$", "1, 3", False),
        ("\\boxed{\\text{the set } \\{1, 2\\}}", "3", True),  # not understood
        ("\\boxed{\\text{no solution}}", "3", True),
        ("**Final answer:** 1 1/2.", "3/2", True),
        ("The final answer is: **12**. I hope it helps.", "12", True),
        ("The final answer is: **12**. I hope it helps.", "13", False),
        ("**Answer:**\n\n12 apples", "12", True),
        ("She has 12 apples left after 3 days.", "12", True),
        ("She has 12 apples left after 3 days.", "9", False),
        ("So it is about 0.333.", "1/3", True),
        ("There are 4 terms.\nHence it equals \\(\\pi\\).", "\\pi", True),
        ("The farm needs 12 a day.", "12", True),
        ("The distance is 5000 m.", "5 km", True),
        ("So we get 3/2.\n\nI hope this helps!", "3/2", True),
        ("So we get 3/2.\n\nI hope this helps!", "5/2", False),
        ("Hence $x = \\frac{1}{2}$.", "1/2", True),
        ("\\boxed{42", "42", True),
        # what names a variable, or says nothing, is not the last line that counts
        ("Hence the total is 12.\nThis is the value of \\(x\\).", "12", True),
        ("Hence the total is 12.\nThis holds for all $n$.", "12", True),
        ("Hence the total is 12,\nwhere y = x", "12", True),
        ("Hence the total is 12.\nSo \\(", "12", True),
        ("Hence the total is 11.\nThis holds for all $n$.", "12", False),
        ("Hence the total is $n$.", "n", True),  # not judged
        # formulas that are lines
        ("So it is\n\\[ \\frac{\\pi}{2} \\]", "\\pi/2", True),
        ("So it is\n\\[\n2\\sqrt{3}\n\\]", "2\\sqrt{3}", True),
        ("So it is\n\\[ \\frac{\\pi}{2} \\]", "\\pi/3", False),
        ("So it is $\\frac{1}{2}$.", "1/3", False),
        ("So it is\n\\begin{align*}\nx &= 11\n\\end{align*}", "12", False),
        ("So x = 11.\n\\qed", "12", False),
        # with numbers, but not understood: not judged
        ("So it is\n\\[ \\mathbf{\\frac{\\sqrt{3}}{2}} \\]", "\\frac{\\sqrt{3}}{2}", True),
        ("So it is\n\\[ x \\approx \\frac{22}{7} \\]", "\\frac{22}{7}", True),
        ("So the probability is \\frac{1}{2}.", "1/2", True),
        # several numbers
        ("So it is 5/6, i.e. about 83%.", "5/6", True),
        ("Hence x = 3 or x = -3.", "3, -3", True),
        ("Hence x = 3 or x = -2.", "3, -3", False),
        ("So it is 1/3, and that is it.", "2/3", False),
    ],
)
def test_final_answers_are_found(response, reference, is_right):
    assert (answer_problem(response, reference) is None) == is_right


def test_problems_say_what_was_found_and_expected():
    assert answer_problem("\\boxed{41}", "42") == "41, 42 was expected"
    assert answer_problem("", "42") == "no final answer, 42 was expected"


def written(draw, depth):
    """A random expression: plain, in LaTeX, and its value."""
    kind = draw.choice("+-*/^") if depth else "n"
    if kind == "n":
        number = draw.choice(["7", "12", "0.5", "3", "1", "2.25"])
        return number, number, Fraction(number)
    first, second = written(draw, depth - 1), written(draw, depth - 1)
    if kind == "^":
        power = draw.choice([2, 3])
        return f"({first[0]})**{power}", f"\\left({first[1]}\\right)^{{{power}}}", first[2] ** power
    if kind == "/":
        if not second[2]:
            return first
        return f"({first[0]})/({second[0]})", f"\\dfrac{{{first[1]}}}{{{second[1]}}}", first[2] / second[2]
    value = {"+": first[2] + second[2], "-": first[2] - second[2], "*": first[2] * second[2]}[kind]
    sign = {"+": "+", "-": "-", "*": " \\cdot "}[kind]
    return f"({first[0]}) {kind} ({second[0]})", f"({first[1]}){sign}({second[1]})", value


@pytest.mark.parametrize("seed", range(20))
def test_values_of_random_expressions(seed):
    plain, latex, value = written(random.Random(seed), seed % 4)
    exact = f"{value.numerator}/{value.denominator}"
    other = f"{value.numerator + 1}/{value.denominator}"
    for answer in (plain, latex):
        assert agrees(exact, answer) is not WRONG
        assert agrees(other, answer) is not RIGHT
    if seed % 4 < 2:
        assert agrees(exact, latex) is RIGHT
        assert agrees(other, latex) is WRONG


@pytest.mark.parametrize("seed", range(10))
def test_no_text_breaks_it_and_none_is_other_than_itself(seed):
    draw = random.Random(seed)
    parts = [*"0123456789+-*/^()[]{},.%!|$ xei=<±°²¼√", "pi", "sqrt", "\\frac", "log_2", "ln", " m", " apples", " or ",
             " and ", "1/2", "\\infty", "\\{", "\\}", "\\boxed", "e-5", ",000", "binom", "\\cup", "^{"]  # fmt: skip
    for length in (2, 3, 5, 8, 13, 100):
        text, other = ("".join(draw.choices(parts, k=length)) for _ in range(2))
        assert agrees(text, text) is not False
        agrees(text, other)
        answer_problem(text, other)


HOSTILE = [
    "\\boxed{9^{9^{9}}}", "\\boxed{9^9^9^9^9}", "\\boxed{2^{10^9}}", "\\boxed{1e999999999}", "\\boxed{170!!!}",
    "\\boxed{" + "(" * 390, "\\boxed{" + "9" * 390 + "}", "\\boxed{" * 25_000, "\\boxed{1}" * 20_000, "$" * 200_000,
    "answer is " * 20_000, "1/" * 100_000, "#### " * 40_000, "\\boxed{\\binom{1000}{500}^{1000}}",
    "answer" + " " * 9**5, "The answer:" + " " * 200_000 + ".", "\\(" * 100_000,
    "\\boxed{" + "\\frac{" * 50 + "}", "\\boxed{" + "{,}" * 130 + "}", "\\boxed{" + "1 and " * 60 + "}", "(" * 200_000,
]  # fmt: skip


@pytest.mark.parametrize("response", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_take_no_long_time(response):
    """Neither here nor in the process that compares."""
    agrees("1", "1")  # it has started now
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    for reference in ("5", response, response[:400], response[7:-1]):
        answer_problem(response, reference)
    assert time.process_time() - start_cpu_s < 1
    assert time.monotonic() - start_s < 60


def test_a_comparison_that_never_ends_is_ended(monkeypatch):
    """And the next one works again."""
    monkeypatch.setattr("ultrafuser.synthesis.final_answers._UNCLEAR", re.compile("(?!)"))
    monkeypatch.setattr("ultrafuser.synthesis.final_answers._MOST_S", 3.0)
    start_s = time.monotonic()
    assert agrees("5", "10^{10^{10}}") is UNCLEAR
    assert time.monotonic() - start_s < 30
    assert agrees("5", "5") is RIGHT


def test_a_comparison_that_takes_the_library_too_long_says_nothing():
    """Its limit is of seconds, so that a busy machine would call answers wrong."""
    factors = "({}*(f+g))^{{60}}"
    product = factors.format("(a+b)*(c+d)"), factors.format("(a*c+a*d+b*c+b*d)")
    assert agrees(*product) in (UNCLEAR, RIGHT)


def test_those_that_have_ended_are_not_asked(monkeypatch):
    idle = queue.SimpleQueue()
    monkeypatch.setattr("ultrafuser.synthesis.final_answers._COMPARERS", idle)
    assert agrees("5", "5") is RIGHT
    ended = idle.get_nowait()
    ended._process.kill()
    ended._process.wait()
    idle.put(ended)
    assert agrees("5", "5") is RIGHT
    assert idle.get_nowait() is not ended
    assert idle.empty()


def test_scripts_compare_however_they_are_run(tmp_path):
    """Without a guard around what they do, or from standard input; no process is left behind."""
    code = "from ultrafuser.synthesis.final_answers import answer_problem\nprint(answer_problem('\\\\boxed{41}', '42'))"
    script = tmp_path / "script.py"
    script.write_text(code)
    for command, given in (([sys.executable, str(script)], ""), ([sys.executable, "-"], code)):
        ended = subprocess.run(command, input=given, capture_output=True, text=True, timeout=120)
        assert ended.stdout == "41, 42 was expected\n", ended.stderr


def test_a_library_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr("ultrafuser.synthesis.final_answers._COMPARERS", queue.SimpleQueue())
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UltrafuserError, match="final answers cannot be compared"):
        agrees("1", "1")
