"""The book of a run: one SQLite file in which every answer is written before it counts.

A run may end at any moment, by SIGKILL too; what is in the book then is all that was ever relied on, and the next run
goes on from there. Keys of calls and ids of items follow from the recipe and from the answers before them, never from
the clock, so a run that was interrupted ends with what one that was not would have had.
"""

import fcntl
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ultrafuser.errors import UltrafuserError

FILE_NAME = "book.sqlite"
MODEL_OF = "model of "
"""A stage: how settings begin that may change until the stage has an answer."""
_READINGS_OF = "readings of "
"""A stage and domain: how the note begins that has `times_to_read`."""

_TABLES = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
-- One row for each call that is over: its answer, or why there is none.
CREATE TABLE IF NOT EXISTS calls (
    key TEXT PRIMARY KEY, stage TEXT NOT NULL, model TEXT NOT NULL, readings INTEGER NOT NULL,
    answer TEXT, finish TEXT, reason TEXT, seconds REAL NOT NULL
) STRICT, WITHOUT ROWID;
-- Answers that were not what was asked for, so that a run that goes on asks as often as one that never stopped.
CREATE TABLE IF NOT EXISTS unread (
    key TEXT NOT NULL, reading INTEGER NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (key, reading)
) STRICT, WITHOUT ROWID;
-- Answers that are paid for and yet to be looked at.
CREATE TABLE IF NOT EXISTS unchecked (
    key TEXT PRIMARY KEY, answer TEXT NOT NULL, finish TEXT NOT NULL, input_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL, seconds REAL NOT NULL
) STRICT, WITHOUT ROWID;
-- What was spent, by stage and model; answers that could not be read cost, too.
CREATE TABLE IF NOT EXISTS spending (
    stage TEXT NOT NULL, model TEXT NOT NULL, answers INTEGER NOT NULL, unread INTEGER NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, PRIMARY KEY (stage, model)
) STRICT;
CREATE TABLE IF NOT EXISTS items (
    stage TEXT NOT NULL, domain TEXT NOT NULL, place INTEGER NOT NULL, parent INTEGER, content TEXT NOT NULL,
    PRIMARY KEY (stage, domain, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS removed (
    stage TEXT NOT NULL, domain TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, content TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS rounds (
    stage TEXT NOT NULL, domain TEXT NOT NULL, round INTEGER NOT NULL, is_last INTEGER NOT NULL,
    PRIMARY KEY (stage, domain, round)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as the endpoint gave it.

    Attributes:
        text: of it.
        finish: why it ended: "stop", "length" or what the endpoint says.
        input_tokens: as the endpoint counts them, or about as many.
        output_tokens: likewise.
        seconds: from the request to its end.
        lost: attempts before it that ended without an answer, but may have to be paid.
    """

    text: str
    finish: str
    input_tokens: int
    output_tokens: int
    seconds: float
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """Something that a stage has made.

    Attributes:
        content: JSON.
        parent: place of the item that it was made from, in the stage that its stage reads.
        place: among the items of its stage and domain; given by the book.
    """

    content: dict[str, Any]
    parent: int | None = None
    place: int = -1


@dataclass(frozen=True, slots=True)
class Removed:
    """Something that a stage has not taken: why, and what it is too much like."""

    reason: str
    detail: str
    content: str


@dataclass(frozen=True, slots=True)
class Spent:
    """What one model has cost in one stage."""

    stage: str
    model: str
    answers: int
    unread: int
    input_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Book:
    """An open book; `Book.open` opens it. It belongs to one process, and to one thread of it."""

    _connection: sqlite3.Connection
    _lock: Any
    _counts: dict[tuple[str, str], int] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: str | Path, settings: Mapping[str, Any]) -> Self:
        """Open the book of a folder, or begin it.

        Args:
            folder: made if it is not there.
            settings: name -> JSON of everything that a result depends on.

        Raises:
            UltrafuserError: another process has it open, or it was begun with other settings; they are named. The
                model of a stage without an answer may be another one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{FILE_NAME}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise UltrafuserError(f"another run is writing to {folder}. Wait for it, or end it.") from error
        connection = sqlite3.connect(folder / FILE_NAME, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(_TABLES)
        book = cls(connection, lock)
        try:
            book._agree(settings, folder)
        except UltrafuserError:
            book.close()
            raise
        return book

    def _agree(self, settings: Mapping[str, Any], folder: Path) -> None:
        given = {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}
        known = dict(self._connection.execute("SELECT name, value FROM settings WHERE name NOT LIKE '.%'"))
        changed = sorted(name for name in given.keys() | known.keys() if known.get(name) != given.get(name))
        free = [name for name in changed if name.startswith(MODEL_OF) and not self._is_answered(name)]
        changed = [name for name in changed if name not in free]
        if known and changed:
            raise UltrafuserError(
                f"{folder} was begun with another recipe: {', '.join(changed)} changed. Go on with the old recipe, or "
                "choose another folder."
            )
        new = given.items() if not known else [(name, given[name]) for name in free if name in given]
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", new)
            for name in free:  # what another model said that could not be read says nothing
                keys = _below(name.removeprefix(MODEL_OF))
                self._connection.execute("DELETE FROM unread WHERE key > ? AND key < ?", keys)
                keys = _below(f".{_READINGS_OF}{name.removeprefix(MODEL_OF)}")
                self._connection.execute("DELETE FROM settings WHERE name > ? AND name < ?", keys)

    def _is_answered(self, name: str) -> bool:
        """Whether there is anything that depends on the model of a stage."""
        tables = ("calls WHERE answer IS NOT NULL AND", "unchecked WHERE")
        query = " OR ".join(f"EXISTS (SELECT 1 FROM {table} key > ? AND key < ?)" for table in tables)
        keys = _below(name.removeprefix(MODEL_OF))
        return bool(self._connection.execute(f"SELECT {query}", keys * 2).fetchone()[0])

    def close(self) -> None:
        """Let go of it."""
        self._connection.close()
        self._lock.close()

    def note(self, name: str, value: str) -> None:
        """Keep something that was found out on the way, such as what the endpoint can do."""
        self._connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (f".{name}", value))

    def noted(self, name: str) -> str | None:
        """What was kept under a name."""
        row = self._connection.execute("SELECT value FROM settings WHERE name = ?", (f".{name}",)).fetchone()
        return None if row is None else row[0]

    def unanswered(self, keys: Sequence[str]) -> list[str]:
        """Those calls that are not over."""
        marks = ",".join("?" * len(keys))
        found = {
            key for (key,) in self._connection.execute(f"SELECT key FROM calls WHERE key IN ({marks})", keys)
        }
        return [key for key in keys if key not in found]

    def problems(self, key: str) -> list[str]:
        """What was wrong with the answers to a call that could not be read, in their order."""
        query = "SELECT reason FROM unread WHERE key = ? ORDER BY reading"
        return [reason for (reason,) in self._connection.execute(query, (key,))]

    def unchecked(self, key: str) -> Reply | None:
        """The answer to a call that came, and that nobody has looked at yet."""
        query = "SELECT answer, finish, input_tokens, output_tokens, seconds FROM unchecked WHERE key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None else Reply(*row)

    def receive(self, key: str, stage: str, model: str, reply: Reply) -> None:
        """Write an answer down, and what it cost, before it is looked at."""
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            row = (key, reply.text, reply.finish, reply.input_tokens, reply.output_tokens, reply.seconds)
            self._connection.execute("INSERT INTO unchecked VALUES (?, ?, ?, ?, ?, ?)", row)
            self._spend(stage, model, input_tokens=reply.input_tokens, output_tokens=reply.output_tokens)

    def record(
        self, key: str, stage: str, model: str, reading: int, reply: Reply, problem: str | None
    ) -> None:
        """Note what was found out about an answer that was received; it counts from now on, if nothing is wrong.

        Args:
            key: of the call.
            stage: of it.
            model: that answered.
            reading: how many answers could not be read before.
            reply: the answer.
            problem: what is wrong with it.

        Raises:
            UltrafuserError: the call is over already.
        """
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute("DELETE FROM unchecked WHERE key = ?", (key,))
            if problem is None:
                self._finish_call(
                    (key, stage, model, reading + 1, reply.text, reply.finish, None, reply.seconds)
                )
                self._spend(stage, model, answers=1)
            else:
                row = (key, reading, _whole(problem))
                self._connection.execute("INSERT INTO unread VALUES (?, ?, ?)", row)
                self._spend(stage, model, unread=1)

    def spend(self, stage: str, model: str, input_tokens: int, output_tokens: int) -> None:
        """Write down what was paid for something else than an answer."""
        self._spend(stage, model, input_tokens=input_tokens, output_tokens=output_tokens)

    def _spend(
        self,
        stage: str,
        model: str,
        *,
        answers: int = 0,
        unread: int = 0,
        input_tokens: int = 0,
        output_tokens: int = 0,
    ) -> None:
        self._connection.execute(
            "INSERT INTO spending VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (stage, model) DO UPDATE SET "
            "answers = answers + excluded.answers, unread = unread + excluded.unread, "
            "input_tokens = input_tokens + excluded.input_tokens, "
            "output_tokens = output_tokens + excluded.output_tokens",
            (stage, model, answers, unread, input_tokens, output_tokens),
        )

    def give_up(self, key: str, stage: str, model: str, readings: int, reason: str) -> None:
        """Note that a call will never be answered.

        Raises:
            UltrafuserError: the call is over already.
        """
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._finish_call((key, stage, model, readings, None, None, _whole(reason), 0.0))

    def _finish_call(self, row: tuple[Any, ...]) -> None:
        try:
            self._connection.execute("INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.IntegrityError as error:
            raise UltrafuserError(f"the call {row[0]} was answered twice.") from error

    def answer(self, key: str) -> tuple[str, str] | None:
        """(text, finish) of a call that is over; None for one that was given up."""
        query = "SELECT answer, finish FROM calls WHERE key = ?"
        row = self._connection.execute(query, (key,)).fetchone()
        return None if row is None or row[0] is None else (row[0], row[1])

    def reason(self, key: str) -> str:
        """Why a call was given up; nothing if it was not."""
        row = self._connection.execute("SELECT reason FROM calls WHERE key = ?", (key,)).fetchone()
        return "" if row is None or row[0] is None else row[0]

    def num_answered(self, stage: str, domain: str, number: int | None = None) -> int:
        """Calls of a stage in a domain, in all rounds or in one, that have an answer."""
        of = f"{stage}/{domain}" + ("" if number is None else f"/{number}")
        query = "SELECT COUNT(*) FROM calls WHERE key > ? AND key < ? AND answer IS NOT NULL"
        return int(self._connection.execute(query, _below(of)).fetchone()[0])

    def read_on(self, stage: str, domain: str) -> None:
        """Let calls of a stage in a domain whose answers could not be read be asked as often again."""
        self.note(f"{_READINGS_OF}{stage}/{domain}", str(self.times_to_read(stage, domain) + 1))

    def times_to_read(self, stage: str, domain: str) -> int:
        """How many times as many readings as usual calls of a stage in a domain may take."""
        noted = self.noted(f"{_READINGS_OF}{stage}/{domain}")
        return 1 if noted is None else int(noted)

    def next_round(self, stage: str, domain: str) -> int | None:
        """The round that a stage has to go on with in a domain; None when it is done."""
        query = "SELECT round, is_last FROM rounds WHERE stage = ? AND domain = ? ORDER BY round DESC LIMIT 1"
        row = self._connection.execute(query, (stage, domain)).fetchone()
        if row is None:
            return 0
        return None if row[1] else row[0] + 1

    def finish_round(
        self,
        stage: str,
        domain: str,
        number: int,
        items: Iterable[Item],
        removed: Iterable[Removed],
        *,
        is_last: bool,
    ) -> None:
        """Write down what a round has made, all of it or nothing."""
        place = self.count(stage, domain)
        with self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            for item in items:
                row = (stage, domain, place, item.parent, json.dumps(item.content, ensure_ascii=False))
                self._connection.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?)", row)
                place += 1
            self._connection.executemany(
                "INSERT INTO removed VALUES (?, ?, ?, ?, ?)",
                ((stage, domain, one.reason, one.detail, one.content) for one in removed),
            )
            self._connection.execute(
                "INSERT INTO rounds VALUES (?, ?, ?, ?)", (stage, domain, number, is_last)
            )
        self._counts[stage, domain] = place

    def count(self, stage: str, domain: str) -> int:
        """Items of a stage in a domain."""
        if (stage, domain) not in self._counts:
            query = "SELECT COUNT(*) FROM items WHERE stage = ? AND domain = ?"
            self._counts[stage, domain] = self._connection.execute(query, (stage, domain)).fetchone()[0]
        return self._counts[stage, domain]

    def items(self, stage: str, domain: str, first: int = 0, before: int | None = None) -> Iterator[Item]:
        """Items of a stage in a domain, from place `first` on and below `before`, in order; few at a time in memory."""
        end = self.count(stage, domain) if before is None else before
        query = (
            "SELECT content, parent, place FROM items WHERE stage = ? AND domain = ? AND place >= ? AND place < ? "
            "ORDER BY place LIMIT 1000"
        )
        while rows := self._connection.execute(query, (stage, domain, first, end)).fetchall():
            for content, parent, place in rows:
                yield Item(json.loads(content), parent, place)
            first = rows[-1][2] + 1

    def item(self, stage: str, domain: str, place: int) -> Item:
        """One item."""
        return next(self.items(stage, domain, place, place + 1))

    def removed(self) -> Iterator[tuple[str, str, Removed]]:
        """(stage, domain, what and why) of everything that was not taken."""
        query = "SELECT stage, domain, reason, detail, content FROM removed ORDER BY rowid"
        for stage, domain, *rest in self._connection.execute(query):
            yield stage, domain, Removed(*rest)

    def keys(self) -> list[str]:
        """Of all calls that are over."""
        return [key for (key,) in self._connection.execute("SELECT key FROM calls")]

    def given_up(self) -> list[tuple[str, str, int]]:
        """(stage, reason, how many) of calls without an answer, the most frequent first."""
        query = (
            "SELECT stage, reason, COUNT(*) FROM calls WHERE answer IS NULL GROUP BY stage, reason "
            "ORDER BY COUNT(*) DESC, stage, reason"
        )
        return list(self._connection.execute(query))

    def spent(self) -> list[Spent]:
        """What was spent so far."""
        query = "SELECT stage, model, answers, unread, input_tokens, output_tokens FROM spending ORDER BY stage, model"
        return [Spent(*row) for row in self._connection.execute(query)]


def _below(path: str) -> tuple[str, str]:
    """Between which two texts all keys are that begin with a path."""
    return f"{path}/", f"{path}0"  # the sign behind the slash


def _whole(text: str) -> str:
    """A text with halves of characters replaced, which no file can hold; programs may fail with any."""
    return text.encode(errors="replace").decode()
