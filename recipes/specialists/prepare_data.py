"""Rows for the text, code and math specialists: training, gate and held-out files out of public data sets.

First step of the specialist recipes: it reads the downloaded files named in the README beside it and writes
`<domain>.<part>.jsonl` with one `{"messages": [user, assistant]}` object a line, ready for
`ultrafuser specialize` (`*.train`), for the gate (`*.gate`) and for measuring (`*.heldout*`), together with
`counts.json`, which says how many rows each source gave and why the others were left out. The same files and
the same Python give the same bytes.
"""

import argparse
import ast
import builtins
import gzip
import hashlib
import importlib.util
import inspect
import itertools
import json
import platform
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltrafuserError
from ultrafuser.files import atomic_write

MAX_ANSWER_CHARS = 2400
NGRAM_WORDS = 13
# Test files whose licence is non-commercial are not opened, not even to compare with.
NON_COMMERCIAL = ("text_alpacaeval_test",)
# The OASST file goes on with code commits of CommitPackFT, which are no text. The first one opens like this.
FIRST_COMMIT = "Allow host and port that the service listens on to be set from environment variables."

Record = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One exchange: a question (user) and its answer (assistant), stripped of outer blank space."""

    question: str
    answer: str

    def to_json(self) -> str:
        """Return the row as one JSON line in the messages form."""
        messages = [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": self.answer},
        ]
        return json.dumps({"messages": messages}, ensure_ascii=False)


# ---------------------------------------- from records to rows


def instruction_row(record: Record) -> Row:
    """Join instruction and input of an instruction data set by a blank line; the answer is the output."""
    parts = [record["instruction"].strip(), record["input"].strip()]
    return Row("\n\n".join(part for part in parts if part), record["output"].strip())


def oasst_part(records: list[Record]) -> list[Record]:
    """Return the OpenAssistant conversations of the OctoPack file, which come before its code commits."""
    return list(itertools.takewhile(lambda record: not record["prompt"].startswith(FIRST_COMMIT), records))


def oasst_row(record: Record) -> Row:
    """Take the first question and answer of an OpenAssistant conversation."""
    return Row(record["prompt"].strip(), record["output"].strip())


def gsm8k_row(record: Record) -> Row:
    """Take a GSM8K problem without its `<<...>>` calculator marks; the last line stays `#### n`."""
    return Row(record["question"].strip(), re.sub(r"<<.*?>>", "", record["answer"]).strip())


def math_row(record: Record) -> Row:
    """Take a MATH problem and its worked solution."""
    return Row(record["problem"].strip(), record["solution"].strip())


def aqua_row(record: Record) -> Row:
    """Take an AQuA problem with its options in the question; the answer is the rationale."""
    return Row("\n".join([record["question"].strip(), *record["options"]]), record["rationale"].strip())


def mbpp_row(record: Record) -> Row:
    """Take an MBPP task and its program, with Unix line ends and tabs as they are."""
    return Row(record["text"].strip(), record["code"].replace("\r\n", "\n").strip())


def mbpp_train_part(records: list[Record]) -> list[Record]:
    """Return the MBPP tasks that may be trained on: the prompt and the train split."""
    return [record for record in records if record["split"] in ("prompt", "train")]


def mbpp_validation_part(records: list[Record]) -> list[Record]:
    """Return the validation split of MBPP."""
    return [record for record in records if record["split"] == "validation"]


def humaneval_row(record: Record) -> Row:
    """Take the instruction form of a HumanEval problem; the answer is the whole function."""
    return Row(record["instruction"].strip(), (record["declaration"] + record["canonical_solution"]).strip())


# ---------------------------------------- the standard library as a source

# Modules written in Python. A module that the running Python lacks (`_pydatetime` before 3.12) gives no rows.
STDLIB_MODULES = """
    _collections_abc _pydatetime _pydecimal _strptime abc argparse ast asyncio.base_events
    asyncio.events asyncio.locks asyncio.queues asyncio.runners asyncio.streams asyncio.tasks base64
    bisect bz2 calendar cmd code codecs codeop collections colorsys compileall concurrent.futures._base
    concurrent.futures.thread configparser contextlib copy copyreg csv ctypes.util dataclasses datetime
    difflib dis doctest email.base64mime email.charset email.encoders email.feedparser email.header
    email.headerregistry email.iterators email.message email.quoprimime email.utils enum filecmp
    fileinput fnmatch fractions ftplib functools genericpath getopt getpass gettext glob graphlib gzip
    hashlib heapq hmac html html.parser http.client http.cookiejar http.cookies http.server imaplib
    importlib.abc importlib.resources importlib.util inspect ipaddress json json.decoder json.encoder
    json.tool keyword linecache locale logging logging.config logging.handlers lzma mailbox mimetypes
    netrc ntpath numbers opcode operator optparse pathlib pickle pickletools pkgutil platform plistlib
    poplib posixpath pprint profile pstats py_compile pyclbr pydoc queue quopri random reprlib
    rlcompleter runpy sched secrets selectors shelve shlex shutil site smtplib socket socketserver
    sqlite3.dump ssl stat statistics string stringprep struct subprocess symtable sysconfig tabnanny
    tarfile tempfile textwrap threading timeit token tokenize trace traceback tracemalloc turtle types
    typing unittest.case unittest.loader unittest.mock unittest.result unittest.suite unittest.util
    urllib.error urllib.parse urllib.request urllib.response urllib.robotparser uuid warnings wave
    weakref webbrowser wsgiref.handlers wsgiref.headers wsgiref.util xml.dom.minidom
    xml.etree.ElementTree xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zoneinfo._zoneinfo
"""
BODY_LINES = range(3, 26)
MAX_STDLIB_CHARS = 1200
MAX_DESCRIPTION_CHARS = 500

VERBS = """
    add apply ask build calculate call cancel change check choose clear close collect combine compare
    compute construct convert copy count create decode delete determine divide draw encode escape
    evaluate execute expand extract fetch fill filter find format generate get guess handle insert
    inspect iterate join list load locate look make map match merge move normalize normalise open parse
    perform pop print process produce push put quote raise read reduce register release remove rename
    render replace report reset resolve return reverse rotate run save search select send set shuffle
    sort split start stop store strip test transform translate truncate try turn unescape unquote update
    use validate wait walk wrap write yield
"""


def third_person(verb: str) -> str:
    """Return the third-person form of an English verb in lower case ("apply" gives "applies")."""
    if verb.endswith(("s", "sh", "ch", "x", "z")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


IMPERATIVE = {form: verb for verb in VERBS.split() for form in (verb, third_person(verb))}


@dataclass(frozen=True)
class Wording:
    """One way to ask for a function: a template over the fields of `Documented.fields`."""

    text: str
    keeps_docstring: bool
    needs_verb: bool = False
    for_methods: bool = False


WORDINGS = (
    Wording("Write a Python function `{signature}` that {third}{more}", False, needs_verb=True),
    Wording(
        "How would I write a Python function to {imperative}{more}\n\nCall it `{name}`.",
        False,
        needs_verb=True,
    ),
    Wording("Implement `{signature}` in Python. It should {imperative}{more}", False, needs_verb=True),
    Wording("What would the implementation of `{signature}` look like?\n\n{description}", False),
    Wording("I need a Python function called `{name}` that takes {taken}. {description}", False),
    Wording("{description}\n\nWrite this as a Python function with the signature `{signature}`.", False),
    Wording("Write `{signature}` with its docstring. {description}", True),
    Wording(
        "Give me documented Python code for this function.\n\nSignature: {signature}\nPurpose: {description}",
        True,
    ),
    Wording("Complete this function.\n\n{stub}", True),
    Wording("Fill in the body of this Python function:\n\n{stub}", True),
    Wording("Complete this method of the class `{owner}`.\n\n{stub}", True, for_methods=True),
    Wording(
        "The class `{owner}` has the following method. Write its body.\n\n{stub}", True, for_methods=True
    ),
)


@dataclass(frozen=True)
class Documented:
    """A documented function or method of a module: its syntax tree, its source, and where it stands.

    Attributes:
        qualname: module, class if any, and name, joined by dots; decides the wording.
        owner: name of the class, or "" for a function of the module.
        node: syntax tree of `source`.
        source: dedented source text.
        imports: import lines of the module that the function relies on.
    """

    qualname: str
    owner: str
    node: ast.FunctionDef
    source: str
    imports: tuple[str, ...]

    @property
    def paragraphs(self) -> list[str]:
        """Paragraphs of the docstring; the first is put on one line."""
        summary, *rest = inspect.cleandoc(ast.get_docstring(self.node) or "").split("\n\n")
        return [" ".join(summary.split()), *rest]

    @property
    def docstring_lines(self) -> slice:
        """Lines of `source` that the docstring takes."""
        quoted = self.node.body[0]
        return slice(quoted.lineno - 1, quoted.end_lineno)

    def without_docstring(self) -> str:
        """Return the source without the lines of the docstring and the blank lines after it."""
        lines = self.source.split("\n")
        place = self.docstring_lines
        head, tail = lines[: place.start], lines[place.stop :]
        while tail and not tail[0].strip():
            tail.pop(0)
        return "\n".join(head + tail)

    def stub(self) -> str:
        """Return the source up to and including the docstring."""
        return "\n".join(self.source.split("\n")[: self.docstring_lines.stop])

    def fields(self) -> dict[str, str]:
        """Return what the wordings insert; `imperative` is "" if the docstring opens with no known verb."""
        summary, *rest = self.paragraphs
        description = "\n\n".join([summary, *rest])
        if len(description) > MAX_DESCRIPTION_CHARS:
            description, rest = summary, []
        first, _, remainder = summary.partition(" ")
        verb = IMPERATIVE.get(first.lower(), "")
        arguments = ast.unparse(self.node.args)
        returns = "" if self.node.returns is None else f" -> {ast.unparse(self.node.returns)}"
        return {
            "name": self.node.name,
            "owner": self.owner,
            "taken": f"the arguments `{arguments}`" if arguments else "no arguments",
            "signature": f"{self.node.name}({arguments}){returns}",
            "description": description,
            "imperative": f"{verb} {remainder}" if verb else "",
            "third": f"{third_person(verb)} {remainder}" if verb else "",
            "more": "".join(f"\n\n{paragraph}" for paragraph in rest),
            "stub": self.stub(),
        }

    def row(self) -> Row:
        """Return the function as an instruction, in a wording that its qualified name decides."""
        fields = self.fields()
        choices = [
            wording
            for wording in WORDINGS
            if wording.for_methods == bool(self.owner) and (fields["imperative"] or not wording.needs_verb)
        ]
        wording = choices[hashlib.sha256(self.qualname.encode()).digest()[0] % len(choices)]
        source = self.source if wording.keeps_docstring else self.without_docstring()
        header = "" if self.owner or not self.imports else "\n".join(self.imports) + "\n\n\n"
        return Row(wording.text.format(**fields).strip(), (header + source).strip())


def stdlib_rows() -> list[Row]:
    """Return instructions for the documented functions of the standard library, in the order of the list."""
    rows = []
    for module in STDLIB_MODULES.split():
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        text = Path(spec.origin).read_text(encoding="utf-8")
        rows += [item.row() for item in documented_functions(module, text)]
    return [row for row in rows if len(row.answer) <= MAX_STDLIB_CHARS]


def documented_functions(module: str, text: str) -> Iterator[Documented]:
    """Yield the functions and methods of a module that make an instruction of their own.

    They have 3 to 25 lines of body, a docstring that opens with a sentence, no decorator that changes
    how they are called, and use no private name and no constant of their module.
    """
    tree = ast.parse(text)
    imports = {
        alias.asname or alias.name: ast.unparse(copy_import(statement, alias))
        for statement in tree.body
        if isinstance(statement, ast.Import)
        or (isinstance(statement, ast.ImportFrom) and statement.level == 0)
        for alias in statement.names
    }
    lines = text.split("\n")
    for owner, node in functions(tree):
        if not is_clear(node):
            continue
        start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        source = textwrap.dedent("\n".join(lines[start - 1 : node.end_lineno]))
        free = free_names(node)
        needed = tuple(sorted({imports[name] for name in free if name in imports}))
        constants = any(name.isupper() for name in free if name not in imports)
        private = any(map(is_private, [node.name, *free, *attributes(node)]))
        if can_be_parsed(source) and not private and not constants:
            qualname = ".".join(part for part in (module, owner, node.name) if part)
            alone = next(functions(ast.parse(source)))[1]
            yield Documented(qualname, owner, alone, source, needed)


def copy_import(statement: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    """Return the import statement narrowed to one of its names."""
    if isinstance(statement, ast.Import):
        return ast.Import(names=[alias])
    return ast.ImportFrom(module=statement.module, names=[alias], level=0)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield (class name or "", function) for the functions of a module and the methods of its classes."""
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            yield "", statement
        elif isinstance(statement, ast.ClassDef):
            yield from (
                (statement.name, node) for node in statement.body if isinstance(node, ast.FunctionDef)
            )


def free_names(node: ast.FunctionDef) -> set[str]:
    """Return the names that a function reads and neither binds nor finds among the builtins."""
    bound = {argument.arg for argument in ast.walk(node) if isinstance(argument, ast.arg)} | set(
        dir(builtins)
    )
    read: set[str] = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            (read if isinstance(part.ctx, ast.Load) else bound).add(part.id)
        elif isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(part.name)
        elif isinstance(part, ast.alias):
            bound.add((part.asname or part.name).partition(".")[0])
        elif isinstance(part, ast.ExceptHandler) and part.name is not None:
            bound.add(part.name)
    return read - bound


def attributes(node: ast.FunctionDef) -> set[str]:
    """Return the names of all attributes that a function touches."""
    return {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}


def is_private(name: str) -> bool:
    """Say whether a name is private to its module or class; `__names__` of the language are not."""
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def is_clear(node: ast.FunctionDef) -> bool:
    """Say whether a function can be asked for by its docstring and answered by its body."""
    sentence = re.match(r"[A-Z][^\n]*(\n[^\n]+)*?[.:](\s|$)", ast.get_docstring(node) or "")
    if sentence is None or len(sentence[0].split()) < 4 or len(node.body) < 2:
        return False
    decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
    last = node.body[-1]
    num_lines = (last.end_lineno if last.end_lineno is not None else last.lineno) - node.body[1].lineno + 1
    return decorators <= {"property", "classmethod", "staticmethod"} and num_lines in BODY_LINES


def can_be_parsed(source: str) -> bool:
    """Say whether dedented source is still Python: a string that reaches the margin keeps it indented."""
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


# ---------------------------------------- sources and what is made of them


@dataclass(frozen=True)
class Source:
    """A data set that gives training rows.

    Attributes:
        name: key in `counts.json`.
        row: makes a row of a record; `None` for the standard library, which has no file.
        file: name without `.jsonl.gz`.
        part: takes those records of the file that belong to the source; all of them by default.
        heldout: output file for the rows held out of this source, or "".
        num_heldout: rows held out: the first ones after the file's records are shuffled with seed 0.
        num_gate: rows set apart for the gate.
        pace: rows given to the front of the train file for each row of a source with pace 1; `None` means in
            proportion to the rows the source has, which spreads them evenly over the whole file.
    """

    name: str
    row: Callable[[Record], Row] | None = None
    file: str = ""
    part: Callable[[list[Record]], list[Record]] = list
    heldout: str = ""
    num_heldout: int = 0
    num_gate: int = 0
    pace: float | None = None


@dataclass(frozen=True)
class Heldout:
    """A test or validation file that is only measured on: `num_rows` records after a shuffle with seed 0."""

    output: str
    file: str
    row: Callable[[Record], Row]
    num_rows: int | None = None
    part: Callable[[list[Record]], list[Record]] = list


DOMAINS: dict[str, tuple[Source, ...]] = {
    "math": (
        Source("gsm8k", gsm8k_row, "math_gsm8k_train", num_gate=350, pace=2),
        Source("math", math_row, "math_math_train", num_gate=150, pace=1),
    ),
    "code": (
        Source(
            "gpteacher_codegen",
            instruction_row,
            "code_gpteacher_codegen_train",
            heldout="code.heldout",
            num_heldout=200,
            num_gate=300,
        ),
        Source("mbpp", mbpp_row, "code_mbpp_train_val_prompt", part=mbpp_train_part, num_gate=100),
        Source("stdlib", num_gate=100),
    ),
    "text": (
        Source(
            "dolly",
            instruction_row,
            "text_dolly_filtered_train",
            heldout="text.heldout",
            num_heldout=200,
            num_gate=300,
        ),
        Source(
            "oasst",
            oasst_row,
            "text_oasst_octopack_train",
            part=oasst_part,
            heldout="text.heldout_oasst",
            num_heldout=100,
            num_gate=100,
        ),
        Source(
            "gpteacher_roleplay",
            instruction_row,
            "text_gpteacher_roleplay_train",
            heldout="text.heldout_roleplay",
            num_heldout=100,
            num_gate=100,
        ),
    ),
}
HELDOUT = (
    Heldout("math.heldout", "math_gsm8k_test", gsm8k_row, 200),
    Heldout("math.heldout_math", "math_math_test", math_row, 200),
    Heldout("math.heldout_aqua", "math_aqua_dev", aqua_row),
    Heldout("code.heldout_mbpp", "code_mbpp_train_val_prompt", mbpp_row, part=mbpp_validation_part),
    Heldout("code.heldout_humaneval", "code_humaneval_instruct_test", humaneval_row),
)


def read_records(source: Path, file: str) -> list[Record]:
    """Read `file`.jsonl.gz of the folder `source`.

    Raises:
        UltrafuserError: if the folder has no such file.
    """
    path = source / f"{file}.jsonl.gz"
    if not path.is_file():
        raise UltrafuserError(
            f"--source must hold {path.name}, got a folder without it: {source}. Download the data sets "
            "that the README beside this script lists."
        )
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def shuffled(items: Iterable[Any], seed: int | str) -> list[Any]:
    """Return the items in an order that the seed alone decides."""
    order = list(items)
    random.Random(seed).shuffle(order)
    return order


def words(text: str) -> list[str]:
    """Return the words of a text, divided at blank space, in lower case and without punctuation."""
    stripped = (re.sub(r"\W", "", word) for word in text.lower().split())
    return [word for word in stripped if word]


def ngrams(text: str) -> Iterator[str]:
    """Yield the 13-grams of words of a text.

    A word ends at blank space alone: divided at punctuation too, thirteen words are only a line of LaTeX or
    of program text, and rows that merely look alike would count as copies.
    """
    sequence = words(text)
    for start in range(len(sequence) - NGRAM_WORDS + 1):
        yield " ".join(sequence[start : start + NGRAM_WORDS])


@dataclass
class References:
    """Every text that training must not have seen, by its 13-grams and, for the short ones, as a whole."""

    grams: dict[str, str] = field(default_factory=dict)
    wholes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        """Take in all strings inside a record or row that belongs to the file `name`."""
        if isinstance(value, str):
            self.wholes.setdefault(" ".join(words(value)), name)
            for gram in ngrams(value):
                self.grams.setdefault(gram, name)
        elif isinstance(value, dict):
            self.add(name, [*value.keys(), *value.values()])
        elif isinstance(value, list):
            for part in value:
                self.add(name, part)

    def overlap(self, row: Row) -> str | None:
        """Return the file whose text the row repeats, or `None`.

        A row repeats a text if it shares 13 words in a row with it, or if its question is that text apart
        from case and punctuation.
        """
        question = " ".join(words(row.question))
        if question in self.wholes:
            return self.wholes[question]
        found = (self.grams.get(gram) for text in (row.question, row.answer) for gram in ngrams(text))
        return next((name for name in found if name is not None), None)


def load_source(folder: Path, source: Source) -> tuple[list[Row], list[Row]]:
    """Return (rows held out, other rows) of a source, both in shuffled order."""
    if source.row is None:
        return [], shuffled(stdlib_rows(), 0)
    records = source.part(read_records(folder, source.file))
    rows = [source.row(record) for record in shuffled(records, 0)]
    return rows[: source.num_heldout], rows[source.num_heldout :]


def load_heldout(folder: Path, heldout: Heldout) -> list[Row]:
    """Return the rows of a test or validation file that are measured on."""
    records = heldout.part(read_records(folder, heldout.file))
    return [heldout.row(record) for record in shuffled(records, 0)[: heldout.num_rows]]


def clean(rows: Iterable[Row], references: References, seen: set[str]) -> tuple[list[Row], Counter[str]]:
    """Drop rows that are empty, too long, repeated or in a test file, and count them by reason.

    Args:
        rows: the rows of one source.
        references: texts of the held-out rows and the test files.
        seen: questions met so far; grows.
    """
    kept: list[Row] = []
    dropped: Counter[str] = Counter()
    for row in rows:
        if not row.question or not row.answer:
            reason: str | None = "empty"
        elif len(row.answer) > MAX_ANSWER_CHARS:
            reason = "too_long"
        elif row.question in seen:
            reason = "duplicate"
        else:
            overlap = references.overlap(row)
            reason = None if overlap is None else f"overlap:{overlap}"
        seen.add(row.question)
        if reason is None:
            kept.append(row)
        else:
            dropped[reason] += 1
    return kept, dropped


def interleave(parts: list[tuple[list[Row], float]]) -> list[Row]:
    """Merge lists of rows so that a prefix holds them in proportion to their pace while each lasts."""
    placed = [
        ((place + 0.5) / pace, number, row)
        for number, (rows, pace) in enumerate(parts)
        for place, row in enumerate(rows)
    ]
    return [row for _, _, row in sorted(placed, key=lambda item: item[:2])]


def split_domain(
    domain: str, loaded: list[tuple[Source, list[Row]]], references: References
) -> tuple[dict[str, list[Row]], Record]:
    """Divide the rows of a domain between its gate and its train file.

    Args:
        domain: prefix of the output files.
        loaded: each source with its rows, held-out ones left out, in shuffled order.
        references: what the rows must not repeat.

    Returns:
        The rows by output file, and the counts by source.

    Raises:
        UltrafuserError: if a source has fewer rows than the gate file takes of it.
    """
    gate: list[Row] = []
    train: list[tuple[list[Row], float]] = []
    counts: Record = {}
    seen: set[str] = set()
    for source, rows in loaded:
        kept, dropped = clean(rows, references, seen)
        if len(kept) < source.num_gate:
            raise UltrafuserError(
                f"{source.name} must have at least {source.num_gate} usable rows for {domain}.gate, "
                f"got {len(kept)}. Check that the file in --source is the whole data set."
            )
        gate += kept[: source.num_gate]
        rest = kept[source.num_gate :]
        train.append((rest, max(len(rest), 1) if source.pace is None else source.pace))
        counts[source.name] = {
            "read": len(rows),
            "dropped": dict(sorted(dropped.items())),
            "gate": source.num_gate,
            "train": len(rest),
        }
    return {f"{domain}.gate": shuffled(gate, 0), f"{domain}.train": interleave(train)}, counts


def prepare(source: Path, output: Path) -> Record:
    """Read the data sets in `source` and write the row files and `counts.json` into `output`.

    Args:
        source: folder with the `.jsonl.gz` files that the README lists.
        output: folder to write; files of an earlier run are replaced one by one.

    Returns:
        The content of `counts.json`.

    Raises:
        UltrafuserError: if a file is missing or too short.
    """
    files = {heldout.output: load_heldout(source, heldout) for heldout in HELDOUT}
    loaded: dict[str, list[tuple[Source, list[Row]]]] = {domain: [] for domain in DOMAINS}
    for domain, sources in DOMAINS.items():
        for item in sources:
            heldout_rows, rows = load_source(source, item)
            loaded[domain].append((item, rows))
            if item.heldout:
                files[item.heldout] = heldout_rows
    references = References()
    for path in sorted(source.glob("*_test.jsonl.gz")):
        name = path.name.removesuffix(".jsonl.gz")
        if name not in NON_COMMERCIAL:
            references.add(name, read_records(source, name))
    for name, rows in files.items():
        references.add(name, [[row.question, row.answer] for row in rows])
    sources_counts: Record = {}
    for domain, parts in loaded.items():
        split, sources_counts[domain] = split_domain(domain, parts, references)
        files |= split
    counts = {
        "python": platform.python_version(),  # the standard library rows depend on it
        "rows": {name: len(rows) for name, rows in sorted(files.items())},
        "sources": sources_counts,
    }
    for name, rows in files.items():
        with atomic_write(output / f"{name}.jsonl") as path:
            path.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    with atomic_write(output / "counts.json") as path:
        path.write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


def main() -> None:
    """Read the command line, prepare the rows and print the counts."""
    parser = argparse.ArgumentParser(description="Prepare the rows of the text, code and math specialists.")
    parser.add_argument("--source", type=Path, required=True, help="folder with the downloaded data files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the row files and counts.json")
    arguments = parser.parse_args()
    try:
        counts = prepare(arguments.source, arguments.output)
    except UltrafuserError as error:
        parser.exit(2, f"error: {error}\n")
    print(json.dumps(counts, indent=2))


if __name__ == "__main__":
    main()
