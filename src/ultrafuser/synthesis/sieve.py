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
from typing import Any

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
_MARKS = "".join(filter(lambda one: unicodedata.category(one)[0] == "M", map(chr, range(0xE00, 0x3100))))
_WORD = re.compile(r"\w+")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_WORD_OR_CHARACTER = re.compile(rf"(?=\w)[{_UNSPACED}][{_MARKS}]*|[^\W{_UNSPACED}]+")
_FENCED = re.compile(r"```.*?(```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_LEAST_WORDS_FOR_LANGUAGE = 8
_LEAST_WORDS_FOR_WHOLE = 5
"""Of a benchmark's text that is shorter than an n-gram: it has to be repeated whole to be found."""
_BANDS, _ROWS = 16, 4
"""Two texts whose shingles overlap by 0.7 meet in a band with probability 0.99, by 0.5 with 0.64 (and are compared)."""
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
    """Words in small letters, without what stands between them; every character where a script has no spaces."""
    text = text.lower()
    is_spaced = text.isascii() or _IS_UNSPACED.search(text) is None
    return (_WORD if is_spaced else _WORD_OR_CHARACTER).findall(text)


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
        if sum(word.isalpha() for word in words_of(prose)) < _LEAST_WORDS_FOR_LANGUAGE:
            return None
        language, probability = self._identifier.classify(prose)
        if language in self._languages or probability < 0.9:
            return None
        return Finding("language", language)


class NearDuplicates:
    """Texts that were taken, and which of them a new one is nearly the same as.

    MinHash finds candidates (shingles of two words, 64 permutations in 16 bands). The likest of them are compared
    shingle by shingle. However many texts follow one pattern, the number of comparisons has a bound; and what is found
    follows from which texts were taken, not from their order.

    Args:
        threshold: Jaccard similarity of shingles from which on two texts are one.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._pattern = MinHash(_BANDS * _ROWS, hashfunc=int)
        self._names: list[str] = []
        self._shingles: list[NDArray[np.uint32]] = []
        self._sketches = np.zeros((1024, _BANDS * _ROWS), np.uint32)  # with room for more
        self._buckets: dict[bytes, tuple[int, ...] | None] = {}  # None for one that is too full
        self._whole: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._names)

    def find(self, text: str, but: str | None = None) -> tuple[str, float] | None:
        """The text that is most like a new one, and how much: 1 for the same words.

        Args:
            text: the new one.
            but: name of one that does not count.
        """
        words = words_of(text)
        same = self._whole.get(_digest(words))
        if same is not None and same != but:
            return same, 1.0
        shingles = _shingles(words)
        if not len(shingles):
            return None
        sketch = self._sketch(shingles)
        near = {number for key in _bands(sketch) for number in self._buckets.get(key) or ()}
        found = [
            (_overlap(shingles, self._shingles[number]), self._names[number])
            for number in self._likest(sketch, near)
            if self._names[number] != but
        ]
        overlap, name = max(found, default=(0.0, ""))
        return (name, overlap) if overlap >= self._threshold else None

    def add(self, name: str, text: str) -> None:
        """Take a text, under a name that is new."""
        words = words_of(text)
        self._whole.setdefault(_digest(words), name)
        number, shingles = len(self._names), _shingles(words)
        sketch = self._sketch(shingles)
        if number == len(self._sketches):
            self._sketches = np.concatenate([self._sketches, np.zeros_like(self._sketches)])
        self._names.append(name)
        self._shingles.append(shingles)
        self._sketches[number] = sketch
        for key in _bands(sketch):
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

    def _sketch(self, shingles: NDArray[np.uint32]) -> NDArray[np.uint32]:
        pattern = self._pattern
        sketch = MinHash(
            pattern.num_perm, hashfunc=int, permutations=pattern.permutations, scheme=pattern.scheme
        )
        sketch.update_batch(shingles)
        return sketch.hashvalues


class Contamination:
    """Texts of benchmarks, and whether another text shares words in a row with one of them.

    Args:
        ngram: words in a row. Texts of 5 words or more that have fewer are looked for as a whole.
    """

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._grams: dict[int, int] = {}  # hash -> benchmark
        self._whole: dict[int, int] = {}
        self._names: list[str] = []

    def add(self, name: str, texts: Iterable[str]) -> None:
        """Learn a benchmark."""
        self._names.append(name)
        number = len(self._names) - 1
        for text in texts:
            words = words_of(text)
            for gram in _grams(words, self._ngram):
                self._grams.setdefault(gram, number)
            if _LEAST_WORDS_FOR_WHOLE <= len(words) < self._ngram:
                self._whole.setdefault(hash(tuple(words)), number)

    def find(self, text: str) -> Finding | None:
        """The benchmark that a text repeats, and where."""
        words = words_of(text)
        for start, gram in enumerate(_grams(words, self._ngram)):
            if (number := self._grams.get(gram)) is not None:
                shared = " ".join(words[start : start + self._ngram])
                return Finding("benchmark", f"{self._names[number]}: {shared}")
        if (number := self._whole.get(hash(tuple(words)))) is not None:
            return Finding("benchmark", f"{self._names[number]}: {' '.join(words)}")
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
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _grams(words: Sequence[str], length: int) -> Iterator[int]:
    for start in range(len(words) - length + 1):
        yield hash(tuple(words[start : start + length]))


def _digest(words: Sequence[str]) -> bytes:
    return hashlib.blake2b(" ".join(words).encode(), digest_size=16).digest()


def _shingles(words: Sequence[str]) -> NDArray[np.uint32]:
    """Hashes of pairs of words, sorted; of a word that is alone."""
    pairs = (f"{a} {b}" for a, b in itertools.pairwise(words)) if len(words) > 1 else words
    return np.unique(np.array([zlib.crc32(pair.encode()) for pair in pairs], np.uint32))


def _bands(sketch: NDArray[np.uint32]) -> Iterator[bytes]:
    """Keys of the buckets that a text is in."""
    for band, rows in enumerate(sketch.reshape(_BANDS, _ROWS)):
        yield bytes([band]) + rows.tobytes()


def _overlap(some: NDArray[np.uint32], others: NDArray[np.uint32]) -> float:
    common = len(some) + len(others) - len(np.unique(np.concatenate([some, others])))
    return common / (len(some) + len(others) - common)
