"""What the sieve lets through, and what not."""

import gzip
import itertools
import json
import random
import unicodedata

import pytest

from ultrafuser.errors import DataError
from ultrafuser.synthesis import sieve
from ultrafuser.synthesis.recipe import FilterSettings
from ultrafuser.synthesis.sieve import (
    Contamination,
    LanguageFilter,
    NearDuplicates,
    Sieve,
    tokens_of,
    words_of,
)

WORDS = [f"word{index}" for index in range(400)]


def text_of(choice, count):
    return " ".join(choice.choices(WORDS, k=count))


def overlap(a, b):
    """Jaccard similarity of pairs of words, counted by hand."""
    x, y = ({(p, q) for p, q in itertools.pairwise(w)} for w in (words_of(a), words_of(b)))
    return len(x & y) / len(x | y)


def test_near_duplicates_are_those_that_overlap_enough():
    """Against every pair counted: all that are far above the threshold, none below it."""
    choice = random.Random(1)
    texts = [text_of(choice, 30) for _ in range(60)]
    for text in list(texts):
        for changes in (1, 2, 4, 8):
            words = text.split()
            for _ in range(changes):
                words[choice.randrange(30)] = choice.choice(WORDS)
            texts.append(" ".join(words))
    index, found, missed, wrong = NearDuplicates(0.7), 0, 0, 0
    for number, text in enumerate(texts):
        likest = max((overlap(text, other) for other in texts[:number]), default=0.0)
        like = index.find(text)
        if like is not None:
            assert overlap(text, texts[int(like[0])]) == pytest.approx(like[1])
            wrong += likest < 0.7
            found += 1
        else:
            missed += likest >= 0.7
        index.add(str(number), text)
    assert wrong == 0
    assert found > 80
    assert missed <= 2  # of a hundred; the bands miss 1 % at the threshold itself


def question_of(choice):
    """One of many questions of one pattern."""
    name, goods = choice.choice(WORDS), choice.choice(WORDS)
    a, b, c, d = (choice.randint(2, 99) for _ in range(4))
    return (
        f"{name} buys {a} boxes of {goods} for {b} dollars each and sells every box for {c} dollars at the market. "
        f"How much profit does {name} make in all when {d} boxes are damaged?"
    )


def test_many_texts_of_one_pattern_are_compared_with_few(monkeypatch):
    choice, index, compared = random.Random(4), NearDuplicates(0.7), []
    overlap_of = sieve._overlap
    monkeypatch.setattr(sieve, "_overlap", lambda *sets: compared.append(None) or overlap_of(*sets))
    taken, most, planted, found = {}, 0, 0, 0
    for number in range(1200):
        words = question_of(choice).split()
        if number > 1000:  # one of the others, with another word
            words = choice.choice(list(taken.values())).split()
            words[choice.randrange(len(words))] = "perhaps"
            planted += 1
        text = " ".join(words)
        compared.clear()
        like = index.find(text)
        most = max(most, len(compared))
        if like is None:
            index.add(str(number), text)
            taken[str(number)] = text
        else:
            assert overlap(text, taken[like[0]]) == pytest.approx(like[1])
            found += number > 1000
    assert most < 100
    assert found >= 0.99 * planted


def test_what_is_found_does_not_depend_on_the_order_of_what_was_taken():
    choice = random.Random(5)
    texts = {str(number): question_of(choice) for number in range(900)}
    forth, back = NearDuplicates(0.5), NearDuplicates(0.5)
    for name, text in texts.items():
        forth.add(name, text)
    for name, text in reversed(texts.items()):
        back.add(name, text)
    asked = [question_of(choice) for _ in range(60)]
    found = [forth.find(text) for text in asked]
    assert found == [back.find(text) for text in asked]
    assert any(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World_1: don't!", "hello world 1 don t"),
        ("Füße café naïve 𝐱²", "füsse café naïve x2"),
        ("cafe\u0301 ques\u00adtion ze\u200bro _so_ **bold**", "café question zero so bold"),
        ("कि की किताब", "कि की किताब"),  # vowels are marks
        ("请用Python写一个函数,2024年。", "请 用 python 写 一 个 函 数 2024 年"),
        ("東京タワー・です", "東 京 タ ワ ー で す"),
        ("ภาษาไทย ๑", "ภ า ษ า ไ ท ย ๑"),
        ("กี่", "กี่"),  # a consonant with its marks
        ("ພາສາ", "ພ າ ສ າ"),
        ("ភាសាខ្មែរ។", "ភា សា ខ្ មែ រ"),
        ("မြန်မာ၊", "မြ န် မာ"),
        ("한국어 문장", "한국어 문장"),  # has spaces
    ],
)
def test_words(text, words):
    assert words_of(text) == words.split()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Sort, please: 'a', \"b\"; then (c)!", "sort please a b then (c)"),
        ("f ( x) = -2.", "f (x )=-2"),
        ("well-known 1.5 and 1,5 don't", "well known 1 .5 and 1 5 don t"),
        ("In C++ and C#?", "in c ++and c#"),
        ("x \u2212 y² _z_", "x -y² z"),
        ("用C++写。", "用 c ++写"),
        ("!?", ""),
        ("+", "+"),
    ],
)
def test_tokens(text, tokens):
    assert tokens_of(text) == tokens.split()


def test_scripts_without_spaces_are_sieved_like_others():
    choice = random.Random(6)
    signs = [chr(choice.randrange(0x4E00, 0x9FFF)) for _ in range(40)]
    text, contamination, index = "".join(signs), Contamination(13), NearDuplicates(0.7)
    one = Sieve(FilterSettings(languages=None))
    assert one.take("a", text[:3]) is None
    assert one.take("b", text[:2]).reason == "short"
    contamination.add("bench", [text])
    assert contamination.find("问" + text[10:23] + "答") is not None
    assert contamination.find("问" + text[10:22] + "答") is None
    index.add("a", text)
    assert index.find(text[:20] + "问" + text[21:])[0] == "a"


DIFFERENT = [
    ("C++", "C#"),
    ("12 + 5", "12 * 5"),
    ("x < y", "x > y"),
    ("f(x)=-2", "f(x)=2"),
    ("f'(x)", "f(x)"),
    ("x == y", "x != y"),
    ("x == y", "x === y"),
    ("x²", "x2"),
    ("1.5", "1 5"),
    ("n!", "n"),
    ("5% of 20", "5 of 20"),
    ("(a + b) * c", "a + b * c"),
]


@pytest.mark.parametrize("frame", ["{}", "What is {}?", "Please tell us what {} means, in short."])
@pytest.mark.parametrize(("some", "other"), DIFFERENT)
def test_short_texts_that_differ_in_a_sign_are_two(some, other, frame):
    index = NearDuplicates(0.7)
    index.add("a", frame.format(some))
    assert index.find(frame.format(other)) is None
    assert index.find(frame.format(some).upper()) == ("a", 1.0)


def test_a_sign_that_differs_counts_like_a_number():
    """In long texts both are near duplicates, as in a word; the threshold says from which length on."""
    frame = "A shop has {} apples, and every one of them is sold to some other person at the market. How much is left?"
    for changed in ("12 * 5", "13 + 5"):
        index = NearDuplicates(0.7)
        index.add("a", frame.format("12 + 5"))
        name, overlap = index.find(frame.format(changed))
        assert (name, overlap) == ("a", pytest.approx(21 / 25))
    for count, is_near in ((12, False), (13, True)):  # tokens
        words = WORDS[:count]
        index = NearDuplicates(0.7)
        index.add("a", " ".join(words))
        assert (index.find(" ".join([*words[:5], "+" + words[5], *words[6:]])) is not None) == is_near


@pytest.mark.parametrize("threshold", [0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_nearly_all_pairs_just_above_a_threshold_are_found(threshold):
    """Texts whose overlap is between the threshold and 0.05 more, and below it: 400 of each."""
    choice, index = random.Random(7), NearDuplicates(threshold)
    above, below, number = [], [], 0
    while min(len(above), len(below)) < 400:
        words = choice.choices(WORDS, k=choice.randint(30, 60))
        wanted = choice.uniform(threshold - 0.1, threshold + 0.05)
        changed = list(words)
        while overlap(" ".join(words), " ".join(changed)) > wanted:
            changed[choice.randrange(len(words))] = choice.choice(WORDS)
        real = overlap(" ".join(words), " ".join(changed))
        number += 1
        index.add(str(number), " ".join(words))
        like = index.find(" ".join(changed))
        assert like is None or like == (str(number), pytest.approx(real))
        (above if real >= threshold else below).append(like is not None)
    assert sum(above) >= 0.95 * len(above)
    assert not any(below)


def test_thresholds_that_are_too_low_are_refused():
    FilterSettings(near_duplicate=0.4)
    with pytest.raises(ValueError, match=r"near_duplicate\n.*greater than or equal to 0\.4"):
        FilterSettings(near_duplicate=0.39)


def test_the_same_words_are_a_duplicate_whatever_stands_between_them():
    index = NearDuplicates(0.7)
    index.add("a", "Sort this list: 3, 1, 2.")
    assert index.find("sort THIS list 3 1 2") == ("a", 1.0)
    assert index.find("sort THIS list 3 1 2", but="a") is None
    assert index.find("Hello") is None
    index.add("b", "Hello")
    assert index.find("hello.") == ("b", 1.0)


def test_contamination_is_words_in_a_row():
    choice = random.Random(2)
    question = text_of(choice, 40)
    contamination = Contamination(13)
    contamination.add("bench", [question, "What is the capital of France today?"])
    words = question.split()
    inside = " ".join([*choice.choices(WORDS, k=9), *words[11:24], "and more"])
    finding = contamination.find(inside)
    assert finding is not None
    assert finding.reason == "benchmark"
    assert finding.detail == "bench: " + " ".join(words[11:24])
    assert contamination.find(" ".join([*choice.choices(WORDS, k=9), *words[11:23], "and more"])) is None
    assert contamination.find(inside.upper().replace(" ", ", ")) is not None
    assert contamination.find("what is the capital of france, today") is not None


@pytest.mark.parametrize(
    "disguise",
    [
        lambda words: unicodedata.normalize("NFD", " ".join(words)),
        lambda words: " ".join(word[:2] + "\u00ad" + word[2:] for word in words),
        lambda words: " ".join(word[:1] + "\u200b\u2060" + word[1:] for word in words),
        lambda words: " ".join(f"_{word}_" for word in words),
        lambda words: " ".join(f"**{word}**" for word in words),
        lambda words: "".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in " ".join(words)),
        lambda words: " ".join(words).upper(),
    ],
)
def test_a_benchmark_is_found_however_it_is_written(disguise):
    words = words_of("wie weit fährt die große Bahn über den Fluß bis nach Köln hinüber")
    assert len(words) == 13
    contamination = Contamination(13)
    contamination.add("bench", [" ".join(words)])
    assert contamination.find("Und: " + disguise(words)) is not None
    assert contamination.find("Und: " + disguise(words[:12])) is None
    other = Contamination(13)
    other.add("bench", [disguise(words)])
    assert other.find("Und: " + " ".join(words)) is not None


def test_short_benchmark_texts_are_found_whole():
    contamination = Contamination(13)
    contamination.add("bench", [" ".join(WORDS[:count]) for count in range(1, 13)])  # all with one beginning
    contamination.add("other", ["Why is the sky blue?", " ".join(WORDS[20:28])])
    for count, around, is_found in [
        (4, 0, False),
        (5, 0, True),
        (5, 5, True),  # half of the words
        (5, 6, False),
        (7, 7, True),
        (7, 8, False),
        (8, 40, True),
        (12, 40, True),
    ]:
        text = " ".join(["please", *WORDS[:count], *["again"] * (around - 1)] if around else WORDS[:count])
        finding = contamination.find(text)
        assert (finding is not None) == is_found, (count, around)
    assert contamination.find("Tell me, why is the sky blue").detail == "other: why is the sky blue"
    assert contamination.find("x " * 30 + " ".join(WORDS[20:28])).detail == "other: " + " ".join(WORDS[20:28])
    assert contamination.find("x " * 30 + " ".join(WORDS[20:27])) is None
    assert contamination.find(" ".join([*WORDS[20:24], "new", *WORDS[24:28]])) is None  # a word added within


def test_benchmarks_are_read_from_all_fields(tmp_path):
    row = {"id": 1, "turns": [{"question": " ".join(WORDS[:20])}], "choices": [" ".join(WORDS[50:70])]}
    row["answers"] = {" ".join(WORDS[80:95]): True}  # as in TruthfulQA
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps(row) + "\n\n")
    sieve = Sieve(FilterSettings(benchmarks=[str(tmp_path / "b.jsonl.gz")], languages=None))
    for first in (0, 50, 80):
        finding = sieve.take("x", "please say " + " ".join(WORDS[first : first + 15]))
        assert finding is not None
        assert finding.detail.startswith("b.jsonl.gz: ")
    assert sieve.check_response("so: " + " ".join(WORDS[3:17])) is not None
    assert sieve.take("x", "please say " + " ".join(WORDS[20:40])) is None


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", None])
def test_a_benchmark_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "b.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"b\.jsonl: .*JSON lines"):
        Sieve(FilterSettings(benchmarks=[str(path)], languages=None))


def test_lengths():
    sieve = Sieve(FilterSettings(min_words=3, max_words=10, max_response_words=20, languages=None))
    assert sieve.take("a", "Too short").reason == "short"
    assert sieve.take("b", " ".join(WORDS[:11])).reason == "long"
    assert sieve.take("c", " ".join(WORDS[:10])) is None
    assert sieve.take("d", " ".join(WORDS[:10])).reason == "duplicate"
    assert sieve.take("e", " ".join([*WORDS[:9], "x"])).reason == "near duplicate"
    assert sieve.take("f", " ".join([*WORDS[:9], "x"]), instead_of="c") is None
    assert sieve.check_response(" ".join(WORDS[:21])).reason == "long"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Please explain to me how the tides of the sea follow the moon over a month.", None),
        ("Erkläre mir bitte, wie die Gezeiten des Meeres im Laufe eines Monats dem Mond folgen.", "de"),
        ("Explique-moi s'il te plaît comment les marées de la mer suivent la lune pendant un mois.", "fr"),
        ("Bonjour", None),  # too little to tell
        (
            "Mend this: ```\nfür jede Zeile in der Datei sei die Summe aller Zahlen darin gleich null\n```",
            None,
        ),
    ],
)
def test_languages(text, language):
    finding = LanguageFilter(["en"]).find(text)
    assert (None if finding is None else finding.detail) == language
    assert LanguageFilter(None).find(text) is None
