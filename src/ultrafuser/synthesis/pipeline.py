"""Runs the stages: asks every question of a round that has no answer yet, then makes of the answers what they make."""

import asyncio
import gc
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltrafuserError
from ultrafuser.progress import ProgressBar
from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.answers import UnreadableError, schema_of
from ultrafuser.synthesis.book import Book
from ultrafuser.synthesis.endpoint import Endpoint, Question, RefusedError
from ultrafuser.synthesis.prompts import Prompts
from ultrafuser.synthesis.recipe import ModelSettings, SynthesisRecipe
from ultrafuser.synthesis.sieve import Sieve
from ultrafuser.synthesis.stages import (
    Answer,
    Call,
    ComplicatedStage,
    InstructionStage,
    MetaTopics,
    RelatedStage,
    ResponseStage,
    Stage,
    SubTopicStage,
    Tools,
)

STAGES: tuple[type[Stage], ...] = (
    MetaTopics,
    SubTopicStage,
    InstructionStage,
    RelatedStage,
    ComplicatedStage,
    ResponseStage,
)
_PLANNED = 10
"""Calls that are planned and looked for in the book at once: more would keep answers that have come waiting."""
CHARACTERS_PER_TOKEN = 4.0


class BudgetError(UltrafuserError):
    """The next request could cost more than is left."""


@dataclass(slots=True)
class Account:
    """What was spent, and what requests that are under way may cost at most.

    Args:
        recipe: with the budget and the prices.
        tokens: spent so far, read and written.
        money: spent so far, in the currency of the prices.
        promised_tokens: that requests under way may cost at most.
        promised_money: likewise.
    """

    recipe: SynthesisRecipe
    tokens: int = 0
    money: float = 0.0
    promised_tokens: int = 0
    promised_money: float = 0.0

    @asynccontextmanager
    async def promise(self, call: Call, model: ModelSettings) -> AsyncIterator[None]:
        """Set aside what a request may cost, as long as the block lasts.

        Raises:
            BudgetError: so much is not left.
        """
        budget = self.recipe.budget
        read = sum(len(message["content"]) for message in call.messages) / CHARACTERS_PER_TOKEN
        tokens = int(read) + model.max_tokens
        money = cost(model, read, model.max_tokens)
        if budget.tokens is not None and self.tokens + self.promised_tokens + tokens > budget.tokens:
            raise BudgetError(
                f"budget.tokens is {budget.tokens:,}, and {self.tokens:,} are spent; the next request may need "
                f"{tokens:,} more. Raise it, and run the same command again; nothing is lost."
            )
        if budget.money is not None and self.money + self.promised_money + money > budget.money:
            raise BudgetError(
                f"budget.money is {budget.money:,.2f}, and {self.money:,.2f} is spent; the next request may cost "
                f"{money:,.4f} more. Raise it, and run the same command again; nothing is lost."
            )
        self.promised_tokens += tokens
        self.promised_money += money
        try:
            yield
        finally:
            self.promised_tokens -= tokens
            self.promised_money -= money

    def spend(self, model: ModelSettings, input_tokens: int, output_tokens: int) -> None:
        """Note what an answer has cost."""
        self.tokens += input_tokens + output_tokens
        self.money += cost(model, input_tokens, output_tokens)


def cost(model: ModelSettings, input_tokens: float, output_tokens: float) -> float:
    """In the currency of the price; 0 where there is none."""
    if model.price is None:
        return 0.0
    return (model.price.input * input_tokens + model.price.output * output_tokens) / 1e6


def settings_of(recipe: SynthesisRecipe, prompts: Prompts) -> dict[str, Any]:
    """Everything that a result depends on, by name; what may change between two parts of a run is not in it."""
    settings = recipe.model_dump(
        mode="json", exclude={"endpoint", "budget", "embedding", "prompts", "stages", "model"}
    )
    filters = settings.pop("filters")
    filters["benchmarks"] = sorted(Path(path).name for path in filters["benchmarks"])
    models = {}
    for stage in STAGES:
        models[f"model of {stage.name}"] = recipe.model_for(stage.name).model_dump(
            mode="json", exclude={"price"}
        )
    domains = {f"domains.{name}": value for name, value in settings.pop("domains").items()}
    return {**settings, **domains, "order of domains": list(recipe.domains), "filters": filters, **models,
            "prompts": prompts.texts()}  # fmt: skip


class Pipeline:
    """A run in a folder.

    Args:
        recipe: what is wanted.
        folder: of the book; a run that stopped there goes on.
        unsandboxed: let code in answers run even where there is no sandbox to be had.

    Attributes:
        tools: what stages share.

    Raises:
        UltrafuserError: the folder belongs to another recipe or is in use, or there is no sandbox.
    """

    def __init__(self, recipe: SynthesisRecipe, folder: str | Path, *, unsandboxed: bool = False) -> None:
        self._recipe = recipe
        prompts = Prompts(recipe)
        runs_code = any(domain.check == "code" for domain in recipe.domains.values())
        sandbox = Sandbox(unsandboxed=unsandboxed) if runs_code else None
        book = Book.open(folder, settings_of(recipe, prompts))
        try:
            self.tools = Tools(recipe, book, prompts, Sieve(recipe.filters), sandbox)
            self._stages = [stage(self.tools) for stage in STAGES]
            self._account = Account(recipe)
            for spent in book.spent():
                self._account.spend(recipe.model_for(spent.stage), spent.input_tokens, spent.output_tokens)  # type: ignore[arg-type]
            self._remember()
        except BaseException:
            book.close()
            raise

    def close(self) -> None:
        """Let go of the book."""
        self.tools.book.close()

    def run(self) -> None:
        """Ask and make until all is there.

        Raises:
            UltrafuserError: the endpoint or the budget does not allow to go on; the same call goes on later.
        """
        # Looking for garbage among all that libraries and sieve hold takes long, and no answer is read meanwhile.
        gc.collect()
        gc.freeze()
        try:
            asyncio.run(self._run())
        except ExceptionGroup as group:
            raise _first(group) from group
        finally:
            gc.unfreeze()

    async def _run(self) -> None:
        async with Endpoint(self._recipe.endpoint, self.tools.book.noted("structured")) as endpoint:
            for stage in self._stages:
                while lines := self._next_lines(stage):
                    await self._ask(endpoint, stage, lines)

    def _next_lines(self, stage: Stage) -> "list[_Line]":
        """The next round of every domain that has not finished a stage; nobody is a round ahead of another, so that an
        interrupted run takes what is new in the same order as one that was not.
        """
        rounds = {domain: self.tools.book.next_round(stage.name, domain) for domain in self._recipe.domains}
        number = min((number for number in rounds.values() if number is not None), default=None)
        if number is None:
            return []
        return [
            _Line(self.tools.book, domain, number, stage.plan(domain, number))
            for domain, at in rounds.items()
            if at == number
        ]

    async def _ask(self, endpoint: Endpoint, stage: Stage, lines: "list[_Line]") -> None:
        """Get an answer to every question of a round that has none, and make of the answers what they make."""
        book, number, done = self.tools.book, lines[0].number, 0
        domains = [line.domain for line in lines]
        expected = sum(stage.expected_calls(self._recipe.domains[domain]) for domain in domains)
        waiting = ((line, call) for line in lines for call in line.unanswered())
        title = f"{stage.name.replace('_', ' ')}, {', '.join(domains)}"

        async def work() -> None:
            nonlocal done
            for line, call in waiting:  # one iterator for all workers: each takes the next
                await self._answer(endpoint, stage, call)
                line.finish(call)
                done += 1
                bar.update(done, max(round(expected), done, 1))
                if endpoint.structured != book.noted("structured"):
                    book.note("structured", endpoint.structured)

        with ProgressBar(title + (f", round {number + 1}" if number else "")) as bar:
            async with asyncio.TaskGroup() as group:
                for _ in range(
                    2 * self._recipe.endpoint.concurrency
                ):  # while some ask, others read and check
                    group.create_task(work())
                for line in lines:
                    made = await stage.make(line.domain, number, line.answers())
                    book.finish_round(
                        stage.name, line.domain, number, made.items, made.removed, is_last=made.is_last
                    )

    async def _answer(self, endpoint: Endpoint, stage: Stage, call: Call) -> None:
        """Ask until there is an answer that can be read, or until it was asked often enough."""
        book, model = self.tools.book, self._recipe.model_for(stage.name)
        schema = None if call.kind is None else schema_of(call.kind)
        problem = ""
        for reading in range(book.readings(call.key), self._recipe.readings):
            question = Question(call.messages, schema, self.tools.number("answer", call.key, reading))
            async with self._account.promise(call, model):
                try:
                    reply = await endpoint.ask(question, model)
                except RefusedError as error:
                    book.give_up(call.key, stage.name, model.model, reading, str(error))
                    return
            try:
                stage.read(call, reply.text, reply.finish)
                found = await self._problem(stage, call, reply.text)
            except UnreadableError as error:
                found = str(error)
            book.record(call.key, stage.name, model.model, reading, reply, found)
            self._account.spend(model, reply.input_tokens, reply.output_tokens)
            if found is None:
                return
            problem = found
        book.give_up(call.key, stage.name, model.model, self._recipe.readings, problem)

    async def _problem(self, stage: Stage, call: Call, text: str) -> str | None:
        if stage.runs_code(call):
            return await asyncio.to_thread(stage.problem, call, text)
        return stage.problem(call, text)  # a verifier of final answers wants the main thread

    def _remember(self) -> None:
        """Tell the sieve what was taken before this run."""
        book, sieve = self.tools.book, self.tools.sieve
        for domain in self._recipe.domains:
            sources = []
            for stage in ("instructions", "related"):
                for item in book.items(stage, domain):
                    sources.append(f"{stage}/{domain}/{item.place}")
                    sieve.remember(sources[-1], item.content["instruction"])
            for item in book.items("complicated", domain):
                if item.content["complicated"]:
                    sieve.remember(f"{sources[item.place]}+", item.content["instruction"])


class _Line:
    """The calls of a round in one domain: asked in any order, given back in the order of the plan.

    Args:
        book: that the answers are in.
        domain: of the calls.
        number: of the round.
        plan: the calls.
    """

    def __init__(self, book: Book, domain: str, number: int, plan: Iterator[Call]) -> None:
        self.domain, self.number = domain, number
        self._book, self._plan = book, plan
        self._waiting: deque[Call] = deque()
        self._over: set[str] = set()
        self._is_complete = False
        self._changed = asyncio.Event()

    def unanswered(self) -> Iterator[Call]:
        """Calls that have no answer yet, planned as they are taken."""
        while batch := list(itertools.islice(self._plan, _PLANNED)):
            missing = set(self._book.unanswered([call.key for call in batch]))
            for call in batch:
                self._waiting.append(replace(call, messages=()))  # an answer is read without them
                if call.key in missing:
                    yield call
                else:
                    self.finish(call)
        self._is_complete = True
        self._changed.set()

    def finish(self, call: Call) -> None:
        """Note that a call is over."""
        self._over.add(call.key)
        if self._waiting[0].key == call.key:
            self._changed.set()

    async def answers(self) -> AsyncIterator[tuple[Call, Answer]]:
        """Every call with its answer, as soon as those before it have theirs."""
        while self._waiting or not self._is_complete:
            while self._waiting and self._waiting[0].key in self._over:
                call = self._waiting.popleft()
                self._over.remove(call.key)
                yield call, self._book.answer(call.key)
                await asyncio.sleep(0)  # what is asked goes on meanwhile
            if self._waiting or not self._is_complete:
                self._changed.clear()
                await self._changed.wait()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that the others follow from: one for the user, if there is one."""
    leaves: list[BaseException] = []

    def collect(error: BaseException) -> None:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                collect(inner)
        else:
            leaves.append(error)

    collect(group)
    return next((error for error in leaves if isinstance(error, UltrafuserError)), leaves[0])
