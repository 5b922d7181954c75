"""What is not taken: too short or long, of another language, said before, or part of a benchmark.

A sieve sees all instructions of all domains in one order and keeps what it has taken in mind, so whether an
instruction is taken depends on those before it alone.
"""

import gzip
import hashlib
import itertools
import json
import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from datasketch import MinHash
from numpy.typing import NDArray

from ultrafuser.errors import DataError
from ultrafuser.progress import ProgressBar
from ultrafuser.synthesis.recipe import FilterSettings

_UNSPACED = (
    "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
    "\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff"  # Thai, Lao, Myanmar, Khmer
)
"""Scripts that put no spaces between words."""


def _class_of(*categories: str) -> str:
    """All characters of some categories, for a class of a regular expression; none are beyond but tags."""
    found = (
        character for character in map(chr, range(0x20000)) if unicodedata.category(character) in categories
    )
    return "".join(found)


_MARKS = _class_of("Mn", "Mc", "Me")
"""Accents and vowel signs: no word begins with one, and none ends before one."""
_UNSEEN = re.compile(f"[{_class_of('Cf')}\u034f\ufe00-\ufe0f\U000e0000-\U000e01ef]+")
"""Soft hyphens, joiners, spaces of no width, marks of direction, selectors of a variant."""
_WORD = rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|(?:[^\W{_UNSPACED}]++[{_MARKS}]*+)+"
_SIGN = rf"[^\w\s{_MARKS}]"
_PUNCTUATION = re.compile(
    # What sets parts of a sentence apart; not a decimal point, a factorial, !=, f'(x) or a minus.
    r"[,?;:\"`…“”„«»‹›‘’‚—―。、，！？；：「」『』]|\.(?!\d)|(?<!\d)(?<!\b\w)!(?!=)|'(?!\()|–(?!\d)"
    r"|(?<=[^\W\d])-(?=[^\W\d])"  # of well-known words
)


def _patterns(word: str, sign: str) -> tuple[re.Pattern[str], re.Pattern[str], re.Pattern[str]]:
    """Of a word, of space next to a sign, and of a word with the signs before it and those after the last one."""
    token = rf"{sign}*(?:{word})(?:{sign}+\Z)?|{sign}+"
    return re.compile(word), re.compile(rf"(?<={sign}) | (?={sign})"), re.compile(token)


_ANY, _ASCII = _patterns(_WORD, _SIGN), _patterns("[a-z0-9]+", r"[^a-z0-9\s]")
"""The second for text of ASCII only, which is faster."""
_FENCED = re.compile(
    r"```.*?(```|\Z)|`[^`\n]*`|\$\$.{0,2000}?\$\$|\$[^$\n]*\$|\\\(.{0,2000}?\\\)|\\\[.{0,2000}?\\\]",
    re.DOTALL,
)
_LEAST_WORDS_FOR_LANGUAGE = 8
LEAST_WORDS_OF_PART, LEAST_WORDS_OF_MOST = 8, 5
"""Of a benchmark's text that is shorter than an n-gram and counts wherever it is repeated; and of one that counts where
it is at least half of what repeats it. (What is shorter is said by chance: "why the sky is blue".)
"""
_PERMUTATIONS = 64
_LEAST_RECALL = 0.98
"""Share of pairs just at the threshold that are to meet in a band."""
_MOST_IN_BUCKET = 250
"""More texts than these that are equal in a band have a phrase in common, no more; the band says nothing of them."""
_MOST_COMPARED = 50
"""Candidates that are looked at closely: those with the likest sketches."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why something is not taken: one of "short", "long", "language", "duplicate", "near duplicate", "benchmark"."""

    reason: str
    detail: str


def words_of(text: str) -> list[str]:
    """Words in small letters, without what stands between them; every character where a script has no spaces.

    However a text is encoded or set, its words are the same: compatible characters are one, what is not seen is not
    there, and `_` and `*` emphasise.
    """
    text = _plain(text, "NFKC")
    word, _, _ = _ASCII if text.isascii() else _ANY
    return word.findall(text)


def tokens_of(text: str) -> list[str]:
    """Words with the signs before each, as they tell instructions apart; sentences' punctuation is left out.

    "C++" is not "C#", nor "12 + 5" "12 * 5"; "x²" is not "x2" as it is among words. Signs are no tokens of their own:
    so one that differs counts like a word or a number that differs, and formulas have no more tokens than words.
    """
    text = " ".join(_PUNCTUATION.sub(" ", _plain(text, "NFC")).split())
    _, space, token = _ASCII if text.isascii() else _ANY
    return token.findall(space.sub("", text))


class LanguageFilter:
    """Finds text of other languages than some; code and formulas are not looked at, nor what has too few words.

    Args:
        languages: ISO 639-1 codes; None takes all.
    """

    def __init__(self, languages: Sequence[str] | None) -> None:
        self._languages = languages
        if languages is not None:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

            self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def find(self, text: str) -> Finding | None:
        """What is wrong with a text."""
        if self._languages is None:
            return None
        prose = _FENCED.sub(" ", text)
        if sum(word[0].isalpha() for word in words_of(prose)) < _LEAST_WORDS_FOR_LANGUAGE:
            return None
        language, probability = self._identifier.classify(prose)
        if language in self._languages or probability < 0.9:
            return None
        return Finding("language", language)


class _Text(NamedTuple):
    """What is compared of a text: a digest of its tokens, hashes of pairs of them, and their MinHash."""

    digest: bytes
    shingles: NDArray[np.uint32]
    sketch: NDArray[np.uint32]


class NearDuplicates:
    """Texts that were taken, and which of them a new one is nearly the same as.

    MinHash finds candidates (shingles of two tokens, 64 permutations in bands). The likest of them are compared shingle
    by shingle. However many texts follow one pattern, the number of comparisons has a bound; and what is found follows
    from which texts were taken, not from their order.

    One word, number or sign that differs in the middle breaks two shingles of a text's and adds two, at the end one: at
    a threshold of 0.7 that is a near duplicate from 13 tokens on, or 7.

    Args:
        threshold: Jaccard similarity of shingles from which on two texts are one; of those that just reach it 98 % are
            candidates.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._rows = _rows_for(threshold)
        self._pattern = MinHash(_PERMUTATIONS, hashfunc=int)
        self._names: list[str] = []
        self._shingles: list[NDArray[np.uint32]] = []
        self._sketches = np.zeros((1024, _PERMUTATIONS), np.uint32)  # with room for more
        self._buckets: dict[bytes, tuple[int, ...] | None] = {}  # None for one that is too full
        self._whole: dict[bytes, str] = {}
        self._last: tuple[str, _Text] | None = None  # looked at: what is not found is mostly added

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str, but: str | None = None) -> tuple[str, float] | None:
        """The text that is most like a new one, and how much: 1 for the same tokens.

        Args:
            text: the new one.
            but: name of one that does not count.
        """
        digest, shingles, sketch = self._look_at(text)
        same = self._whole.get(digest)
        if same is not None and same != but:
            return same, 1.0
        if not len(shingles):
            return None
        near = {number for key in self._bands(sketch) for number in self._buckets.get(key) or ()}
        found = [
            (_overlap(shingles, self._shingles[number]), self._names[number])
            for number in self._likest(sketch, near)
            if self._names[number] != but
        ]
        overlap, name = max(found, default=(0.0, ""))
        return (name, overlap) if overlap >= self._threshold else None

    def add(self, name: str, text: str) -> None:
        """Take a text, under a name that is new."""
        digest, shingles, sketch = self._look_at(text)
        self._whole.setdefault(digest, name)
        number = len(self._names)
        if number == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
        self._names.append(name)
        self._shingles.append(shingles)
        self._sketches[number] = sketch
        for key in self._bands(sketch):
            bucket = self._buckets.get(key, ())
            if bucket is not None:
                self._buckets[key] = (*bucket, number) if len(bucket) < _MOST_IN_BUCKET else None

    def _likest(self, sketch: NDArray[np.uint32], near: set[int]) -> list[int]:
        """Those candidates whose sketches have most in common with one; all that have as much as the last of them."""
        if len(near) <= _MOST_COMPARED:
            return list(near)
        numbers = np.fromiter(near, np.int64, len(near))
        common = (self._sketches[numbers] == sketch).sum(axis=1)
        return numbers[common >= np.partition(common, -_MOST_COMPARED)[-_MOST_COMPARED]].tolist()

    def _look_at(self, text: str) -> _Text:
        if self._last is None or self._last[0] != text:
            tokens, pattern = tokens_of(text), self._pattern
            shingles = _shingles(tokens)
            sketch = MinHash(
                pattern.num_perm, hashfunc=int, permutations=pattern.permutations, scheme=pattern.scheme
            )
            sketch.update_batch(shingles)
            self._last = text, _Text(_digest(tokens), shingles, sketch.hashvalues)
        return self._last[1]

    def _bands(self, sketch: NDArray[np.uint32]) -> Iterator[bytes]:
        """Keys of the buckets that a text is in."""
        size = self._rows * sketch.itemsize
        whole = sketch.tobytes()
        for band in range(len(whole) // size):
            yield bytes([band]) + whole[band * size : (band + 1) * size]


class Contamination:
    """Texts of benchmarks, and whether another text shares words in a row with one of them.

    Args:
        ngram: words in a row. Texts that have fewer are looked for as a whole: those of 8 words or more anywhere, those
            of 5 to 7 where they are at least half of the other text.
    """

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._grams: dict[int, int] = {}  # hash -> benchmark
        self._whole: dict[int, int] = {}  # of texts that have fewer words
        self._lengths: dict[int, set[int]] = {}  # hash of the first words of those -> numbers of words
        self._names: list[str] = []

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Learn a benchmark."""
        self._names.append(name)
        number = len(self._names) - 1
        for text in texts:
            words = words_of(text)
            for gram in _grams(words, self._ngram):
                self._grams.setdefault(gram, number)
            if LEAST_WORDS_OF_MOST <= len(words) < self._ngram:
                self._whole.setdefault(hash(tuple(words)), number)
                first = next(_grams(words, LEAST_WORDS_OF_MOST))
                self._lengths.setdefault(first, set()).add(len(words))

    def find(self, text: str) -> Finding | None:
        """The benchmark that a text repeats, and where."""
        words = words_of(text)
        for start, gram in enumerate(_grams(words, self._ngram)):
            if (number := self._grams.get(gram)) is not None:
                shared = " ".join(words[start : start + self._ngram])
                return Finding("benchmark", f"{self._names[number]}: {shared}")
        for start, first in enumerate(_grams(words, LEAST_WORDS_OF_MOST)):
            for length in self._lengths.get(first, ()):
                part = words[start : start + length]
                if length < LEAST_WORDS_OF_PART and 2 * length < len(words):
                    continue
                if (number := self._whole.get(hash(tuple(part)))) is not None:
                    return Finding("benchmark", f"{self._names[number]}: {' '.join(part)}")
        return None


class Sieve:
    """All of these.

    Args:
        settings: what is not taken.
    """

    def __init__(self, settings: FilterSettings) -> None:
        self._settings = settings
        self._language = LanguageFilter(settings.languages)
        self._seen = NearDuplicates(settings.near_duplicate)
        self._benchmarks = Contamination(settings.ngram)
        with ProgressBar("reading benchmarks") as bar:
            for done, path in enumerate(settings.benchmarks, 1):
                self._benchmarks.add(Path(path).name, benchmark_texts(path))
                bar.update(done, len(settings.benchmarks))

    def take(self, name: str, text: str, instead_of: str | None = None) -> Finding | None:
        """Take an instruction, or say why not.

        Args:
            name: of it.
            text: of it.
            instead_of: name of one that was taken, and that this one replaces.
        """
        finding = self._find(text, instead_of)
        if finding is None:
            self._seen.add(name, text)
        return finding

    def remember(self, name: str, text: str) -> None:
        """Note an instruction that was taken in an earlier run."""
        self._seen.add(name, text)

    def check_response(self, text: str) -> Finding | None:
        """Why a response is not taken."""
        if len(words_of(text)) > self._settings.max_response_words:
            return Finding("long", f"{len(words_of(text))} words")
        finding = self._benchmarks.find(text)
        return self._language.find(text) if finding is None else finding

    def _find(self, text: str, instead_of: str | None) -> Finding | None:
        settings, count = self._settings, len(words_of(text))
        if count < settings.min_words:
            return Finding("short", f"{count} words")
        if count > settings.max_words:
            return Finding("long", f"{count} words")
        if (finding := self._benchmarks.find(text)) is not None:
            return finding
        if (finding := self._language.find(text)) is not None:
            return finding
        like = self._seen.find(text, instead_of)
        if like is None:
            return None
        return Finding("duplicate" if like[1] == 1 else "near duplicate", f"{like[0]}: {like[1]:.2f}")


def benchmark_texts(path: str | Path) -> Iterator[str]:
    """Every text of every row of a JSON lines file, gzip or not.

    Raises:
        DataError: it cannot be read.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    yield from _texts(json.loads(line))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path}: {error}. A benchmark is a JSON lines file.") from error


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:  # some answers are keys
            yield from _texts(part)


def _grams(words: Sequence[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))


def _plain(text: str, form: Literal["NFC", "NFKC"]) -> str:
    if text.isascii():
        return text.lower().replace("_", " ")
    return _UNSEEN.sub("", unicodedata.normalize(form, text).casefold()).replace("_", " ").replace("−", "-")


def _rows_for(threshold: float) -> int:
    """Permutations of a band: the more, the fewer candidates, but two texts that just reach the threshold are to agree
    in all permutations of one band or another.
    """
    fitting = [
        rows
        for rows in range(1, _PERMUTATIONS // 4 + 1)
        if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _LEAST_RECALL
    ]
    return max(fitting, default=1)


def _digest(tokens: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(tokens).encode(), digest_size=16).digest()


def _shingles(tokens: Sequence[str]) -> NDArray[np.uint32]:
    """Hashes of pairs of tokens, sorted; of a token that is alone."""
    pairs = map(" ".join, itertools.pairwise(tokens)) if len(tokens) > 1 else tokens
    return np.unique(np.array([zlib.crc32(pair.encode()) for pair in pairs], np.uint32))


def _overlap(some: NDArray[np.uint32], others: NDArray[np.uint32]) -> float:
    common = len(some) + len(others) - len(np.unique(np.concatenate([some, others])))
    return common / (len(some) + len(others) - common)
