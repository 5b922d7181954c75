"""Runs the stages: asks every question of a round that has no answer yet, then makes of the answers what they make."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
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
_LOOKED_UP = 500
"""Calls whose answers are looked for in the book at once."""
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
        try:
            asyncio.run(self._run())
        except ExceptionGroup as group:
            raise _first(group) from group

    async def _run(self) -> None:
        book = self.tools.book
        async with Endpoint(self._recipe.endpoint, book.noted("structured")) as endpoint:
            for stage in self._stages:
                for domain, settings in self._recipe.domains.items():
                    while (number := book.next_round(stage.name, domain)) is not None:
                        title = f"{stage.name.replace('_', ' ')}, {domain}" + (
                            f", round {number + 1}" if number else ""
                        )
                        with ProgressBar(title) as bar:
                            expected = max(round(stage.expected_calls(settings)), 1)
                            await self._ask(endpoint, stage, domain, number, bar, expected)
                        calls = stage.plan(domain, number)
                        made = stage.make(domain, number, self._answered(calls))
                        book.finish_round(
                            stage.name, domain, number, made.items, made.removed, is_last=made.is_last
                        )

    async def _ask(
        self, endpoint: Endpoint, stage: Stage, domain: str, number: int, bar: ProgressBar, expected: int
    ) -> None:
        """Get an answer to every question of a round that has none."""
        book, done = self.tools.book, 0
        waiting = self._unanswered(stage.plan(domain, number))

        async def work() -> None:
            nonlocal done
            for call in waiting:  # one iterator for all workers: each takes the next
                await self._answer(endpoint, stage, call)
                done += 1
                bar.update(done, max(expected, done))
                if endpoint.structured != book.noted("structured"):
                    book.note("structured", endpoint.structured)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._recipe.endpoint.concurrency):
                group.create_task(work())

    def _unanswered(self, calls: Iterator[Call]) -> Iterator[Call]:
        while batch := list(itertools.islice(calls, _LOOKED_UP)):
            missing = set(self.tools.book.unanswered([call.key for call in batch]))
            yield from (call for call in batch if call.key in missing)

    def _answered(self, calls: Iterator[Call]) -> Iterator[tuple[Call, tuple[str, str] | None]]:
        while batch := list(itertools.islice(calls, _LOOKED_UP)):
            yield from zip(batch, self.tools.book.answers(call.key for call in batch), strict=True)

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
