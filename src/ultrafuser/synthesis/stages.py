"""The stages of UltraChat 2 (paper, section 3.2), from topics to conversations.

Each stage reads items of stages before it and makes items of its own. It knows two things: which questions a
round asks (`plan`), and what their answers make (`make`). Both follow from the book and the recipe alone, so that
an interrupted run ends like one that was not. Rounds go on until there is enough, or answers bring nothing new.
"""

import hashlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pydantic import BaseModel

from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.answers import (
    MAX_CHARACTERS,
    Instruction,
    Instructions,
    SolvedInstruction,
    SolvedInstructions,
    SubTopics,
    Topics,
    UnreadableError,
    read_json,
)
from ultrafuser.synthesis.book import Book, Item, Removed
from ultrafuser.synthesis.prompts import Prompts
from ultrafuser.synthesis.recipe import DomainSettings, StageName, SynthesisRecipe
from ultrafuser.synthesis.sieve import Sieve, tokens_of, words_of
from ultrafuser.synthesis.verification import problem_of

PER_CALL = {"meta_topics": 30, "sub_topics": 20, "instructions": 10, "related": 5}
"""Things asked for in one answer, at most."""
SHOWN = 20
"""Things there are already that a question shows, at most."""


@dataclass(frozen=True, slots=True)
class Call:
    """One question of a round.

    Attributes:
        key: "stage/domain/round/index", unique in a run.
        messages: the conversation that is sent.
        kind: of the answer; None for text.
        context: what making something of the answer needs.
    """

    key: str
    messages: Sequence[dict[str, str]]
    kind: type[BaseModel] | None
    context: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Made:
    """What a round has made."""

    items: list[Item] = field(default_factory=list)
    later: Iterable[
        Item
    ] = ()  # further ones, which are made as they are taken; some may still be removed then
    removed: list[Removed] = field(default_factory=list)
    is_last: bool = True


@dataclass(frozen=True, slots=True)
class Tools:
    """What stages share."""

    recipe: SynthesisRecipe
    book: Book
    prompts: Prompts
    sieve: Sieve
    sandbox: Sandbox | None

    def number(self, *parts: object) -> int:
        """A number below 2**31 that looks random and follows from the seed and the parts."""
        text = "/".join(map(str, (self.recipe.seed, *parts)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**31

    def chosen(self, count: int, among: int, *parts: object) -> set[int]:
        """So many places below `among`, at random by seed and parts."""
        ranked = sorted(range(among), key=lambda place: self.number(*parts, place))
        return set(ranked[:count])


Answer = tuple[str, str] | None
"""Of a call: text, and why it ended; None for one that was given up."""
Answers = AsyncIterable[tuple[Call, Answer]]
"""All calls of a round in the order of its plan, as they are answered."""


class Stage(ABC):
    """One stage.

    Attributes:
        name: of it, and of its items.
        reads: the stages whose items it reads.
        rounds_differ: whether its rounds ask for different things; otherwise for what is still missing.
    """

    name: ClassVar[StageName]
    reads: ClassVar[tuple[StageName, ...]]
    rounds_differ: ClassVar[bool] = False

    def __init__(self, tools: Tools) -> None:
        self.tools = tools

    @abstractmethod
    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """The questions of a round; what `make` has made counts from the next one on."""

    @abstractmethod
    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """What the answers to a round's questions make; all of them are waited for."""

    def read(self, call: Call, text: str, finish: str) -> Any:
        """An answer in its form.

        Raises:
            UnreadableError: it is not what was asked for; then it is asked again, with another seed.
        """
        assert call.kind is not None
        return read_json(text, call.kind)

    def problem(self, call: Call, text: str) -> str | None:
        """What is wrong with an answer that could be read."""
        return None

    def takes_time(self, call: Call) -> bool:
        """Whether `problem` waits for other processes, so that it belongs into a thread."""
        return False

    @abstractmethod
    def wanted(self, domain: str) -> int:
        """How many items the stage is to make."""

    @classmethod
    @abstractmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """How many questions it takes if all goes well."""

    def settings(self, domain: str) -> DomainSettings:
        """Of a domain."""
        return self.tools.recipe.domains[domain]

    def ask(
        self,
        domain: str,
        number: int,
        index: int,
        kind: type[BaseModel],
        context: dict[str, Any],
        **known: Any,
    ) -> Call:
        """A question by the stage's own prompt."""
        text = self.tools.prompts.render(self.name, domain, **known)
        return Call(
            f"{self.name}/{domain}/{number}/{index}", [{"role": "user", "content": text}], kind, context
        )

    def is_last(self, number: int, wanted: int, *, needed: int = 1) -> bool:
        """Whether a round was the last one: enough is there, or enough was tried.

        Args:
            number: of the round, from 0 on.
            wanted: how many are lacking.
            needed: rounds that it takes if all goes well.
        """
        return wanted <= 0 or number + 1 >= needed + self.tools.recipe.rounds - 1


class MetaTopics(Stage):
    """Names of broad topics: given by the recipe, or asked for."""

    name = "meta_topics"
    reads = ()

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """One question for all that are missing; the next round asks for others."""
        settings, book = self.settings(domain), self.tools.book
        wanted = self.wanted(domain) - book.count(self.name, domain)
        if isinstance(settings.meta_topics, int) and wanted > 0:
            known = [item.content["name"] for item in book.items(self.name, domain)]
            count = min(wanted, PER_CALL[self.name])
            yield self.ask(domain, number, 0, Topics, {}, count=count, known=known)

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """Names that are new."""
        settings, book = self.settings(domain), self.tools.book
        if isinstance(settings.meta_topics, list):
            return Made([Item({"name": name}) for name in settings.meta_topics])
        known = {
            "",
            *(_same(item.content["name"]) for item in book.items(self.name, domain)),
        }  # "..." is no name
        wanted = self.wanted(domain) - book.count(self.name, domain)
        made = Made()
        async for call, answer in answers:
            if answer is None:
                continue
            for name in self.read(call, *answer).topics:
                if len(made.items) < wanted and _same(name) not in known:
                    known.add(_same(name))
                    made.items.append(Item({"name": name}))
        needed = math.ceil(settings.num_meta_topics / PER_CALL[self.name])
        made.is_last = self.is_last(number, wanted - len(made.items), needed=needed)
        return made

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return self.settings(domain).num_meta_topics

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        return (
            0
            if isinstance(settings.meta_topics, list)
            else math.ceil(settings.meta_topics / PER_CALL[cls.name])
        )


class SubTopicStage(Stage):
    """Narrower topics, the same number for each meta-topic as far as it goes: name, relevance and use case."""

    name = "sub_topics"
    reads = ("meta_topics",)

    def _missing(self, domain: str) -> dict[int, tuple[int, list[str]]]:
        """Meta-topic -> how many sub-topics it lacks, and names of those it has."""
        book = self.tools.book
        have: dict[int, list[str]] = {place: [] for place in range(book.count("meta_topics", domain))}
        for item in book.items(self.name, domain):
            assert item.parent is not None
            have[item.parent].append(item.content["name"])
        quotas = _shares(self.wanted(domain), len(have))
        return {place: (quota - len(have[place]), have[place]) for place, quota in enumerate(quotas)}

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """A question for each meta-topic that lacks some."""
        index = itertools.count()
        for place, (wanted, known) in self._missing(domain).items():
            if wanted > 0:
                name = self.tools.book.item("meta_topics", domain, place).content["name"]
                count = min(wanted, PER_CALL[self.name])
                yield self.ask(
                    domain, number, next(index), SubTopics, {"parent": place},
                    meta_topic=name, count=count, known=known[-SHOWN:],
                )  # fmt: skip

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """Sub-topics whose names are new in their meta-topic."""
        missing, made = self._missing(domain), Made()
        async for call, answer in answers:
            parent = call.context["parent"]
            wanted, names = missing[parent]
            known = {"", *map(_same, names)}
            for topic in [] if answer is None else self.read(call, *answer).sub_topics:
                if wanted > 0 and _same(topic.name) not in known:
                    known.add(_same(topic.name))
                    wanted -= 1
                    made.items.append(Item(topic.model_dump(), parent))
            missing[parent] = (wanted, names)
        most = math.ceil(self.settings(domain).sub_topics / max(len(missing), 1))
        lacking = sum(wanted for wanted, _ in missing.values())
        made.is_last = self.is_last(number, lacking, needed=math.ceil(most / PER_CALL[self.name]))
        return made

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return self.settings(domain).sub_topics

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        shares = _shares(settings.sub_topics, settings.num_meta_topics)
        return sum(math.ceil(share / PER_CALL[cls.name]) for share in shares)


class _InstructionStage(Stage):
    """What the stages that make instructions have in common: the sieve, and the form of an item."""

    def kind(self, domain: str) -> type[BaseModel]:
        """Of an answer."""
        return SolvedInstructions if self.wants_reference(domain) else Instructions

    def wants_reference(self, domain: str) -> bool:
        """Whether final answers are asked for, too."""
        return self.settings(domain).check == "math"

    def take(self, domain: str, made: Made, answer: BaseModel, parent: int, content: dict[str, Any]) -> bool:
        """Take one instruction, or note why not."""
        said = answer.model_dump()
        place = self.tools.book.count(self.name, domain) + len(made.items)
        finding = self.tools.sieve.take(f"{self.name}/{domain}/{place}", said["instruction"])
        if finding is not None:
            made.removed.append(Removed(finding.reason, finding.detail, said["instruction"]))
            return False
        made.items.append(Item({**said, **content}, parent))
        return True


class InstructionStage(_InstructionStage):
    """What people ask for, the same number for each sub-topic as far as it goes."""

    name = "instructions"
    reads = ("meta_topics", "sub_topics")

    def _missing(self, domain: str) -> dict[int, int]:
        """Sub-topic -> how many instructions it lacks."""
        book = self.tools.book
        quotas = _shares(self.wanted(domain), book.count("sub_topics", domain))
        missing = dict(enumerate(quotas))
        for item in book.items(self.name, domain):
            assert item.parent is not None
            missing[item.parent] -= 1
        return missing

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """A question for every ten that a sub-topic lacks; those of one round do not see each other's answers."""
        book, index = self.tools.book, itertools.count()
        topics = [item.content["name"] for item in book.items("meta_topics", domain)]
        known: dict[int, list[str]] = {}
        if number:
            for item in book.items(self.name, domain):
                assert item.parent is not None
                known[item.parent] = [*known.get(item.parent, [])[1 - SHOWN :], item.content["instruction"]]
        missing = self._missing(domain)
        for topic in book.items("sub_topics", domain):
            assert topic.parent is not None
            counts = _batches(missing[topic.place], PER_CALL[self.name])
            for part, count in enumerate(counts, 1):
                yield self.ask(
                    domain, number, next(index), self.kind(domain), {"parent": topic.place},
                    **topic.content, meta_topic=topics[topic.parent], count=count, part=part, parts=len(counts),
                    known=known.get(topic.place, []), wants_reference=self.wants_reference(domain),
                )  # fmt: skip

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """Instructions that the sieve takes."""
        missing, made = self._missing(domain), Made()
        async for call, answer in answers:
            parent = call.context["parent"]
            for one in [] if answer is None else self.read(call, *answer).instructions:
                if missing[parent] > 0 and self.take(domain, made, one, parent, {"kind": "base"}):
                    missing[parent] -= 1
        made.is_last = self.is_last(number, sum(missing.values()))
        return made

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return base_count(self.settings(domain))

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        shares = _shares(base_count(settings), settings.sub_topics)
        return sum(math.ceil(share / PER_CALL[cls.name]) for share in shares)


class RelatedStage(_InstructionStage):
    """Instructions made in the context of others: strongly related ones, and weakly related ones."""

    name = "related"
    reads = ("meta_topics", "sub_topics", "instructions")

    def _missing(self, domain: str) -> dict[bool, int]:
        """Strongly? -> how many are lacking."""
        missing = dict(zip((True, False), related_counts(self.settings(domain)), strict=True))
        for item in self.tools.book.items(self.name, domain):
            missing[item.content["kind"] == "strongly related"] -= 1
        return missing

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """Questions from instructions at random, each with others of its topic."""
        tools, index = self.tools, itertools.count()
        book = tools.book
        topics = [item.content["name"] for item in book.items("meta_topics", domain)]
        total = book.count("instructions", domain)
        for strongly, wanted in self._missing(domain).items():
            for count in _batches(wanted, PER_CALL[self.name]) if total else []:
                place = next(index)
                # Every instruction is an example about equally often: a walk over all of them, from a place by seed.
                start = tools.number(self.name, domain, number, strongly)
                example = book.item("instructions", domain, (start + place * _stride(total)) % total)
                assert example.parent is not None
                topic = book.item("sub_topics", domain, example.parent)
                assert topic.parent is not None
                near = book.items("instructions", domain, max(example.place - 2, 0), example.place + 3)
                others = [
                    item.content["instruction"]
                    for item in near
                    if item.parent == example.parent and item.place != example.place
                ]
                yield self.ask(
                    domain, number, place, self.kind(domain), {"parent": example.place, "strongly": strongly},
                    meta_topic=topics[topic.parent], name=topic.content["name"], strongly=strongly, others=others,
                    example=example.content["instruction"], count=count,
                    wants_reference=self.wants_reference(domain),
                )  # fmt: skip

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """Instructions that the sieve takes."""
        missing, made = self._missing(domain), Made()
        async for call, answer in answers:
            strongly = call.context["strongly"]
            kind = "strongly related" if strongly else "weakly related"
            for one in [] if answer is None else self.read(call, *answer).instructions:
                if missing[strongly] > 0 and self.take(
                    domain, made, one, call.context["parent"], {"kind": kind}
                ):
                    missing[strongly] -= 1
        made.is_last = self.is_last(number, sum(missing.values()))
        return made

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return sum(related_counts(self.settings(domain)))

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        return sum(math.ceil(count / PER_CALL[cls.name]) for count in related_counts(settings))


class ComplicatedStage(_InstructionStage):
    """All instructions, a chosen share of them rewritten to ask for more; one that cannot be stays as it was."""

    name = "complicated"
    reads = ("instructions", "related", "sub_topics", "meta_topics")

    def kind(self, domain: str) -> type[BaseModel]:
        """Of an answer."""
        return SolvedInstruction if self.wants_reference(domain) else Instruction

    def _sources(self, domain: str) -> Iterator[tuple[str, Item]]:
        for stage in ("instructions", "related"):
            for item in self.tools.book.items(stage, domain):
                yield f"{stage}/{domain}/{item.place}", item

    def _chosen(self, domain: str) -> set[int]:
        total = self.wanted(domain)
        share = self.settings(domain).complicated
        return self.tools.chosen(round(share * total), total, self.name, domain)

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """A question for every chosen one."""
        chosen = self._chosen(domain)
        for place, (_, item) in enumerate(self._sources(domain)):
            if place in chosen:
                yield self.ask(
                    domain, number, place, self.kind(domain), {"place": place},
                    instruction=item.content["instruction"], wants_reference=self.wants_reference(domain),
                )  # fmt: skip

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """All instructions in their final form."""
        book, made, left = self.tools.book, Made(), aiter(answers)
        chosen = self._chosen(domain)
        metas = [item.content["name"] for item in book.items("meta_topics", domain)]
        topics = [
            {"meta_topic": metas[topic.parent or 0], "sub_topic": topic.content["name"]}
            for topic in book.items("sub_topics", domain)
        ]
        parents: list[int] = []  # of base instructions: their sub-topics
        for place, (name, item) in enumerate(self._sources(domain)):
            assert item.parent is not None
            if item.content["kind"] == "base":
                parents.append(item.parent)
            sub_topic = item.parent if item.content["kind"] == "base" else parents[item.parent]
            content = {**item.content, **topics[sub_topic], "complicated": False}
            if place in chosen:
                call, answer = await anext(left)
                assert call.context["place"] == place
                content |= self._rewritten(name, made, call, answer)
            made.items.append(Item(content, sub_topic))
        return made

    def _rewritten(self, name: str, made: Made, call: Call, answer: Answer) -> dict[str, Any]:
        if answer is None:
            return {}
        said = self.read(call, *answer).model_dump()
        finding = self.tools.sieve.take(f"{name}+", said["instruction"], instead_of=name)
        if finding is not None:
            made.removed.append(Removed(finding.reason, finding.detail, said["instruction"]))
            return {}
        return {**said, "complicated": True}

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return sum(self.tools.book.count(stage, domain) for stage in ("instructions", "related"))

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        return round(settings.complicated * settings.instructions)


class ResponseStage(Stage):
    """Conversations: a response to every instruction, and for some of them further questions and responses.

    Even rounds ask for responses, odd ones for what the person says next.
    """

    name = "responses"
    reads = ("complicated",)
    rounds_differ = True

    def _turns(self, domain: str) -> dict[int, int]:
        """Place of an instruction -> turns of its conversation, where they are several."""
        settings, tools = self.settings(domain), self.tools
        total = tools.book.count("complicated", domain)
        chosen = tools.chosen(round(settings.several_turns * total), total, "turns", domain)
        return {place: 2 + tools.number("length", domain, place) % (settings.turns - 1) for place in chosen}

    def _conversations(self, domain: str, number: int) -> Iterator[tuple[Item, list[dict[str, str]] | None]]:
        """Every instruction with its conversation as it is before a round; None for one that is over."""
        turns, book = self._turns(domain), self.tools.book
        for item in book.items("complicated", domain):
            if number >= 2 * turns.get(item.place, 1) - 1:
                yield item, None
                continue
            messages: list[dict[str, str]] | None = [{"role": "user", "content": item.content["instruction"]}]
            keys = [self._key(domain, before, item.place) for before in range(number)]
            for before, answer in enumerate(map(book.answer, keys)):
                if answer is None or messages is None:
                    messages = None
                    break
                role = "user" if before % 2 else "assistant"
                messages.append({"role": role, "content": answer[0].strip()})
            yield item, messages

    def _key(self, domain: str, number: int, place: int) -> str:
        return f"{self.name}/{domain}/{number}/{place}"

    def plan(self, domain: str, number: int) -> Iterator[Call]:
        """A question for every conversation that goes on."""
        prompts = self.tools.prompts
        for item, messages in self._conversations(domain, number):
            if messages is None:
                continue
            if number % 2:
                text = prompts.render("follow_up", domain, messages=messages)
                sent = [{"role": "user", "content": text}]
            else:
                sent = [{"role": "system", "content": prompts.render(self.name, domain)}, *messages]
            reference = item.content.get("reference") if number == 0 else None
            context = {"domain": domain, "reference": reference, "is_question": number % 2 == 1}
            yield Call(self._key(domain, number, item.place), sent, None, context)

    def read(self, call: Call, text: str, finish: str) -> str:
        """A text that is whole, and that the filters take."""
        text = text.strip()
        if not words_of(text):
            raise UnreadableError("nothing in it")
        if len(text) > MAX_CHARACTERS:
            raise UnreadableError(f"{len(text):,} characters")
        if finish == "length":
            raise UnreadableError("cut off: raise max_tokens")
        if finish == "content_filter":
            raise UnreadableError("cut off by the endpoint's filter")
        if (finding := self.tools.sieve.check_response(text)) is not None:
            raise UnreadableError(f"{finding.reason}: {finding.detail}")
        return text

    def problem(self, call: Call, text: str) -> str | None:
        """Code that does not run, or a wrong final answer."""
        if call.context["is_question"]:
            return None
        check = self.settings(call.context["domain"]).check
        earlier = [said["content"] for said in call.messages if said["role"] == "assistant"]
        return problem_of(check, text, call.context["reference"], self.tools.sandbox, earlier)

    def takes_time(self, call: Call) -> bool:
        """See `Stage`."""
        return self.settings(call.context["domain"]).check != "none" and not call.context["is_question"]

    async def make(self, domain: str, number: int, answers: Answers) -> Made:
        """Nothing but in the last round: the conversations, as far as they went."""
        async for _ in answers:
            pass
        turns = self._turns(domain)
        if number < 2 * max(turns.values(), default=1) - 2:
            return Made(is_last=False)
        made = Made()
        made.later = self._made(domain, turns, made.removed)
        return made

    def _made(self, domain: str, turns: Mapping[int, int], removed: list[Removed]) -> Iterator[Item]:
        """The conversations one by one, since all of them are much; what has none is added to those removed."""
        book = self.tools.book
        for item in book.items("complicated", domain):
            rounds = 2 * turns.get(item.place, 1) - 1
            messages = [{"role": "user", "content": item.content["instruction"]}]
            keys = [self._key(domain, before, item.place) for before in range(rounds)]
            reason = ""
            for before, key in enumerate(keys):
                if (answer := book.answer(key)) is None:
                    reason = book.reason(key)
                    break
                messages.append({"role": "user" if before % 2 else "assistant", "content": answer[0].strip()})
            if len(messages) % 2:  # a question without an answer
                messages.pop()
            if messages:
                yield Item({**item.content, "messages": messages}, item.place)
            else:
                removed.append(Removed("no response", reason, item.content["instruction"]))

    def wanted(self, domain: str) -> int:
        """See `Stage`."""
        return self.tools.book.count("complicated", domain)

    @classmethod
    def expected_calls(cls, settings: DomainSettings) -> float:
        """See `Stage`."""
        several = settings.several_turns * settings.instructions
        return settings.instructions + several * settings.turns


def base_count(settings: DomainSettings) -> int:
    """Instructions that are made from topics alone."""
    return settings.instructions - sum(related_counts(settings))


def related_counts(settings: DomainSettings) -> tuple[int, int]:
    """Instructions that are made from others: strongly related ones, and weakly; one at least is made from topics."""
    most = settings.instructions - 1
    strongly = min(round(settings.strongly_related * settings.instructions), most)
    return strongly, min(round(settings.weakly_related * settings.instructions), most - strongly)


def _shares(total: int, parts: int) -> list[int]:
    """As equal as can be."""
    if not parts:
        return []
    return [total // parts + (place < total % parts) for place in range(parts)]


def _batches(total: int, size: int) -> list[int]:
    return [min(size, total - first) for first in range(0, max(total, 0), size)]


def _stride(total: int) -> int:
    """A step that visits all of so many places before it comes back to the first."""
    step = max(round(total * 0.6180339887), 1)
    while math.gcd(step, total) != 1:
        step += 1
    return step


def _same(name: str) -> str:
    return " ".join(tokens_of(name.lstrip("#•- \n").strip("*_ \n"))) if words_of(name) else ""
