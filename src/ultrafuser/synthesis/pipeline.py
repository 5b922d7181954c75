"""Runs the stages: asks every question of a round that has no answer yet, then makes of the answers what they make."""

import asyncio
import gc
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltrafuserError
from ultrafuser.progress import ProgressBar
from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.answers import UnreadableError, schema_of
from ultrafuser.synthesis.book import Book, Reply
from ultrafuser.synthesis.cluster import MOST, Cluster
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

    @contextmanager
    def promise(self, call: Call, model: ModelSettings) -> Iterator[None]:
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
        num_askers: processes that ask, spread by Ray; None asks from this one.

    Attributes:
        tools: what stages share.

    Raises:
        UltrafuserError: the folder belongs to another recipe or is in use, or there is no sandbox.
    """

    def __init__(
        self,
        recipe: SynthesisRecipe,
        folder: str | Path,
        *,
        unsandboxed: bool = False,
        num_askers: int | None = None,
    ) -> None:
        self._recipe, self._num_askers = recipe, num_askers
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
        structured = self.tools.book.noted("structured")
        if self._num_askers is not None:
            await self._ask_all(Cluster(self._recipe.endpoint, self._num_askers, structured))
            return
        async with Endpoint(self._recipe.endpoint, structured) as endpoint:
            await self._ask_all(endpoint)

    async def _ask_all(self, asked: Endpoint | Cluster) -> None:
        for stage in self._stages:
            while lines := self._next_lines(stage):
                await self._ask(asked, stage, lines)

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

    async def _ask(self, asked: Endpoint | Cluster, stage: Stage, lines: "list[_Line]") -> None:
        """Get an answer to every question of a round that has none, and make of the answers what they make."""
        book, number, done = self.tools.book, lines[0].number, 0
        domains = [line.domain for line in lines]
        expected = sum(stage.expected_calls(self._recipe.domains[domain]) for domain in domains)
        waiting = ((line, call) for line in lines for call in line.unanswered())
        title = f"{stage.name.replace('_', ' ')}, {', '.join(domains)}"

        def finish(line: _Line, call: Call) -> None:
            nonlocal done
            line.finish(call)
            done += 1
            bar.update(done, max(round(expected), done, 1))
            if asked.structured != book.noted("structured"):
                book.note("structured", asked.structured)

        async def work(endpoint: Endpoint) -> None:
            for line, call in waiting:  # one iterator for all workers: each takes the next
                await self._answer(endpoint, stage, call)
                finish(line, call)

        with ProgressBar(title + (f", round {number + 1}" if number else "")) as bar:
            async with asyncio.TaskGroup() as group:
                if isinstance(asked, Cluster):
                    group.create_task(self._answer_by_cluster(asked, stage, waiting, finish))
                else:
                    for _ in range(2 * self._recipe.endpoint.concurrency):  # some ask, others read and check
                        group.create_task(work(asked))
                for line in lines:
                    made = await stage.make(line.domain, number, line.answers())
                    book.finish_round(
                        stage.name, line.domain, number, made.items, made.removed, is_last=made.is_last
                    )

    async def _answer(self, endpoint: Endpoint, stage: Stage, call: Call) -> None:
        """Ask until there is an answer that can be read, or until it was asked often enough."""
        model = self._recipe.model_for(stage.name)
        while (question := self._question(stage, call)) is not None:
            with self._account.promise(call, model):
                try:
                    reply: Reply | RefusedError = await endpoint.ask(question, model)
                except RefusedError as error:
                    reply = error
            if await self._take(stage, call, reply):
                return

    async def _answer_by_cluster(
        self,
        cluster: Cluster,
        stage: Stage,
        waiting: "Iterator[tuple[_Line, Call]]",
        finish: "Callable[[_Line, Call], None]",
    ) -> None:
        """The same for all calls of a round, many at a time; what could not be read comes again with the next ones."""
        model = self._recipe.model_for(stage.name)
        while batch := list(itertools.islice(waiting, MOST)):
            asked: dict[str, tuple[_Line, Call]] = {}
            questions: list[tuple[str, Question]] = []
            again: list[tuple[_Line, Call]] = []
            with ExitStack() as promises:
                for place, (line, call) in enumerate(batch):
                    if (question := self._question(stage, call)) is None:
                        finish(line, call)
                        continue
                    try:
                        promises.enter_context(self._account.promise(call, model))
                    except BudgetError:
                        if not questions:
                            raise
                        again = batch[place:]  # when these are paid, more may be left than it seems
                        break
                    asked[call.key] = (line, call)
                    questions.append((call.key, question))
                answers = cluster.ask(questions, model)
                while (found := await asyncio.to_thread(next, answers, None)) is not None:
                    line, call = asked[found[0]]
                    if await self._take(stage, call, found[1]):
                        finish(line, call)
                    else:
                        again.append((line, call))
            waiting = itertools.chain(again, waiting)

    def _question(self, stage: Stage, call: Call) -> Question | None:
        """What to ask next; None where it was asked often enough, and the call is given up."""
        problems = self.tools.book.problems(call.key)
        if len(problems) >= self._recipe.readings:
            self._give_up(stage, call, len(problems), problems[-1])
            return None
        schema = None if call.kind is None else schema_of(call.kind)
        return Question(call.messages, schema, self.tools.number("answer", call.key, len(problems)))

    async def _take(self, stage: Stage, call: Call, reply: Reply | RefusedError) -> bool:
        """Check an answer and write it down; whether the call is over."""
        book, model = self.tools.book, self._recipe.model_for(stage.name)
        reading = len(book.problems(call.key))
        if isinstance(reply, RefusedError):
            self._give_up(stage, call, reading, str(reply))
            return True
        try:
            stage.read(call, reply.text, reply.finish)
            problem = await self._problem(stage, call, reply.text)
        except UnreadableError as error:
            problem = str(error)
        book.record(call.key, stage.name, model.model, reading, reply, problem)
        self._account.spend(model, reply.input_tokens, reply.output_tokens)
        return problem is None

    def _give_up(self, stage: Stage, call: Call, readings: int, reason: str) -> None:
        model = self._recipe.model_for(stage.name).model
        self.tools.book.give_up(call.key, stage.name, model, readings, reason)

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
