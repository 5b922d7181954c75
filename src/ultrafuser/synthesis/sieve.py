"""What is not taken: too short or long, of another language, said before, or part of a benchmark.

A sieve sees all instructions of all domains in one order and keeps what it has taken in mind, so whether an
instruction is taken depends on those before it alone.
"""

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasketch import MinHash, MinHashLSH

from ultrafuser.errors import DataError
from ultrafuser.progress import ProgressBar
from ultrafuser.synthesis.recipe import FilterSettings

_WORD = re.compile(r"\w+")
_FENCED = re.compile(r"```.*?(```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\(.*?\\\)|\\\[.*?\\\]", re.DOTALL)
_LEAST_WORDS_FOR_LANGUAGE = 8
_LEAST_WORDS_FOR_WHOLE = 5
"""Of a benchmark's text that is shorter than an n-gram: it has to be repeated whole to be found."""
_BANDS, _ROWS = 16, 4
"""Two texts whose shingles overlap by 0.7 meet in a band with probability 0.99, by 0.5 with 0.64 (and are compared)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Why something is not taken: one of "short", "long", "language", "duplicate", "near duplicate", "benchmark"."""

    reason: str
    detail: str


def words_of(text: str) -> list[str]:
    """Words in small letters, without what stands between them."""
    return _WORD.findall(text.lower())


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

    MinHash finds candidates (shingles of two words, 64 permutations in 16 bands), whose overlap is then counted.

    Args:
        threshold: Jaccard similarity of shingles from which on two texts are one.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._pattern = MinHash(_BANDS * _ROWS, hashfunc=zlib.crc32)
        self._index = MinHashLSH(num_perm=_BANDS * _ROWS, params=(_BANDS, _ROWS))
        self._texts: dict[str, str] = {}
        self._whole: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._texts)

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
        found = [
            (_overlap(shingles, _shingles(words_of(self._texts[name]))), name)
            for name in self._index.query(self._sketch(shingles))
            if name != but
        ]
        overlap, name = max(found, default=(0.0, ""))
        return (name, overlap) if overlap >= self._threshold else None

    def add(self, name: str, text: str) -> None:
        """Take a text, under a name that is new."""
        words = words_of(text)
        self._index.insert(name, self._sketch(_shingles(words)))
        self._texts[name] = text
        self._whole.setdefault(_digest(words), name)

    def _sketch(self, shingles: set[bytes]) -> MinHash:
        pattern = self._pattern
        sketch = MinHash(
            pattern.num_perm, hashfunc=zlib.crc32, permutations=pattern.permutations, scheme=pattern.scheme
        )
        sketch.update_batch(shingles)
        return sketch


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
    return " ".join(words).encode()


def _shingles(words: Sequence[str]) -> set[bytes]:
    if len(words) < 2:
        return {word.encode() for word in words}
    return {f"{a} {b}".encode() for a, b in itertools.pairwise(words)}


def _overlap(some: set[bytes], others: set[bytes]) -> float:
    return len(some & others) / max(len(some | others), 1)
