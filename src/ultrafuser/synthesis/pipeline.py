"""Runs the stages: asks every question of a round that has no answer yet, then makes of the answers what they make."""

import asyncio
import gc
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ultrafuser.errors import UltrafuserError
from ultrafuser.progress import ProgressBar
from ultrafuser.sandbox import Sandbox
from ultrafuser.synthesis.answers import UnreadableError, schema_of
from ultrafuser.synthesis.book import MODEL_OF, Book, Reply
from ultrafuser.synthesis.budget import Account, BudgetError, most_tokens
from ultrafuser.synthesis.cluster import MOST, Cluster
from ultrafuser.synthesis.endpoint import Endpoint, EndpointError, Question, UnansweredError
from ultrafuser.synthesis.prompts import Prompts
from ultrafuser.synthesis.recipe import SynthesisRecipe
from ultrafuser.synthesis.refusals import Refusals, Unanswered
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
_SIMPLE = [{"role": "user", "content": "Answer with one word, any."}]
_FIRST = 200
"""Questions of a stage and domain that are handed to Ray at once as long as none of them is answered."""
_PLANNED = 10
"""Calls that are planned and looked for in the book at once: more would keep answers that have come waiting."""


def settings_of(recipe: SynthesisRecipe, prompts: Prompts) -> dict[str, Any]:
    """Everything that a result depends on, by name; what may change between two parts of a run is not in it."""
    settings = recipe.model_dump(
        mode="json", exclude={"endpoint", "budget", "embedding", "prompts", "stages", "model", "unanswered"}
    )
    filters = settings.pop("filters")
    filters["benchmarks"] = sorted(
        hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in filters["benchmarks"]
    )
    models = {}
    for stage in STAGES:
        models[f"{MODEL_OF}{stage.name}"] = recipe.model_for(stage.name).model_dump(
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
            self._account, self._has_run = Account(recipe.budget), False
            for spent in book.spent():
                self._account.spend(recipe.model_for(spent.stage), spent.input_tokens, spent.output_tokens)  # type: ignore[arg-type]
            self._take_up(Tools(recipe, book, prompts, Sieve(recipe.filters), sandbox))
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
        if self._has_run:  # the sieve may have taken what never came into the book
            self._take_up(replace(self.tools, sieve=Sieve(self._recipe.filters)))
        self._has_run = True
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
        endpoint, structured = self._recipe.endpoint, self.tools.book.noted(self._structured_at)
        if endpoint.structured != "auto":
            structured = None
        if self._num_askers is not None:
            await self._run_stages(Cluster(endpoint, self._num_askers, structured))
            return
        async with Endpoint(endpoint, structured) as asked:
            await self._run_stages(asked)

    @property
    def _structured_at(self) -> str:
        """Name under which the book has what the endpoint knows of JSON; a run may go on at another."""
        return f"structured at {self._recipe.endpoint.base_url}"

    async def _run_stages(self, asked: Endpoint | Cluster) -> None:
        for stage in self._stages:
            while lines := self._next_lines(stage):
                await self._run_round(asked, stage, lines)

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

    async def _run_round(self, asked: Endpoint | Cluster, stage: Stage, lines: "list[_Line]") -> None:
        """Get an answer to every question of a round that has none, and make of the answers what they make."""
        number = lines[0].number
        domains = [line.domain for line in lines]
        calls = {domain: stage.expected_calls(self._recipe.domains[domain]) for domain in domains}
        expected = sum(calls.values())
        find_out = partial(self._find_out, asked, stage)
        self._refusals = Refusals(stage, number, calls, self._recipe.unanswered, self.tools.book, find_out)
        title = f"{stage.name.replace('_', ' ')}, {', '.join(domains)}"

        def finish(line: _Line, call: Call) -> None:
            line.finish(call)
            done = sum(line.num_over for line in lines)
            bar.update(done, max(round(expected), done))
            if self._recipe.endpoint.structured == "auto" and asked.structured != self.tools.book.noted(
                self._structured_at
            ):
                self.tools.book.note(self._structured_at, asked.structured)

        with ProgressBar(title + (f", round {number + 1}" if number else "")) as bar:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._ask(asked, stage, lines, finish))
                for line in lines:
                    made = await stage.make(line.domain, number, line.answers())
                    items = itertools.chain(made.items, made.later)
                    self.tools.book.finish_round(
                        stage.name, line.domain, number, items, made.removed, is_last=made.is_last
                    )

    async def _ask(
        self, asked: Endpoint | Cluster, stage: Stage, lines: "list[_Line]", finish: "_Finish"
    ) -> None:
        """Ask what has no answer; what is refused once more, and then give it up, or end the run."""
        of = {line.domain: line for line in lines}

        async def ask(waiting: Iterator[tuple[_Line, Call]]) -> None:
            if isinstance(asked, Cluster):
                await self._ask_cluster(asked, stage, waiting, finish)
            else:
                await self._ask_endpoint(asked, stage, waiting, finish)

        await ask((line, call) for line in lines for call in line.unanswered())
        await ask((of[one.domain], one.call) for one in self._refusals.once_more())
        book, model = self.tools.book, self._recipe.model_for(stage.name).model
        for domain, call, reason in await self._refusals.given_up():
            book.give_up(call.key, stage.name, model, len(book.problems(call.key)), reason)
            finish(of[domain], call)

    async def _find_out(self, asked: Endpoint | Cluster, stage: Stage) -> None:
        """See whether the endpoint answers anybody.

        Raises:
            EndpointError: it does not.
        """
        call, model = Call(f"{stage.name}/-", _SIMPLE, None), self._recipe.model_for(stage.name)
        ask = asked.ask_here if isinstance(asked, Cluster) else asked.ask
        for is_last in (False, True):  # one refusal may be chance
            await self._account.room(call, model)
            with self._account.promise(call, model):
                try:
                    reply = await ask(Question(_SIMPLE, None, int(is_last)), model)
                except (UnansweredError, EndpointError) as error:
                    self._spend(stage, call, lost=error.lost)
                    if isinstance(error, EndpointError):
                        raise
                    if is_last:
                        raise EndpointError(
                            f"not even the simplest question is answered: {error}. Mend the server, or what the recipe "
                            f"says of it or of the model of the stage {stage.name}, and run the same command again; "
                            "nothing is lost."
                        ) from error
                else:
                    self._spend(stage, call, reply.input_tokens, reply.output_tokens, lost=reply.lost)
                    return

    def _spend(
        self, stage: Stage, call: Call, input_tokens: int = 0, output_tokens: int = 0, *, lost: int
    ) -> None:
        """Write down what was paid for other things than answers, and what lost attempts may have cost."""
        model = self._recipe.model_for(stage.name)
        most_read, most_written = most_tokens(call, model)
        read, written = input_tokens + lost * most_read, output_tokens + lost * most_written
        if read or written:
            self.tools.book.spend(stage.name, model.model, read, written)
            self._account.spend(model, read, written)

    async def _ask_endpoint(
        self, endpoint: Endpoint, stage: Stage, waiting: "Iterator[tuple[_Line, Call]]", finish: "_Finish"
    ) -> None:
        errors: list[UltrafuserError] = []

        async def work() -> None:
            try:
                for line, call in waiting:  # one iterator for all workers: each takes the next
                    await self._answer(endpoint, stage, line, call, finish)
            except UltrafuserError as error:
                errors.append(error)
                endpoint.limiter.stop(str(error))  # what is under way is paid for: it ends as it does

        async with asyncio.TaskGroup() as workers:
            for _ in range(2 * self._recipe.endpoint.concurrency):  # some ask, others read and check
                workers.create_task(work())
        if errors:
            raise errors[0]

    async def _ask_cluster(
        self, cluster: Cluster, stage: Stage, waiting: "Iterator[tuple[_Line, Call]]", finish: "_Finish"
    ) -> None:
        """Many at a time; what could not be read, or was refused, comes again with the next ones."""
        model = self._recipe.model_for(stage.name)
        while batch := self._batch(stage, waiting):
            again: list[tuple[_Line, Call]] = []

            async def check(line: _Line, call: Call, again: list[tuple[_Line, Call]] = again) -> None:
                if await self._check(stage, call):
                    finish(line, call)
                else:
                    again.append((line, call))

            asked: dict[str, tuple[_Line, Call]] = {}
            unanswered: list[Unanswered] = []
            failure: EndpointError | None = None
            questions: list[tuple[str, Question]] = []
            with ExitStack() as promises:
                async with asyncio.TaskGroup() as checks:
                    for place, (line, call) in enumerate(batch):
                        if self.tools.book.unchecked(call.key) is not None:
                            checks.create_task(check(line, call))
                            continue
                        if (question := self._question(stage, line, call)) is None:
                            continue
                        try:
                            promises.enter_context(self._account.promise(call, model))
                        except BudgetError:
                            if not questions:
                                raise
                            again += batch[place:]  # when these are paid, more may be left than it seems
                            break
                        asked[call.key] = (line, call)
                        questions.append((call.key, question))
                    answers = cluster.ask(questions, model)
                    while (found := await asyncio.to_thread(next, answers, None)) is not None:
                        line, call = asked[found[0]]
                        if isinstance(found[1], UnansweredError):
                            unanswered.append(Unanswered(line.domain, call, str(found[1])))
                            self._spend(stage, call, lost=found[1].lost)
                        elif isinstance(found[1], EndpointError):
                            failure = found[1]
                            self._spend(stage, call, lost=failure.lost)
                        else:
                            self._receive(stage, call, found[1])
                            checks.create_task(check(line, call))
            if failure is not None:
                raise failure
            await self._refusals.refused(unanswered)
            waiting = itertools.chain(again, waiting)

    def _batch(self, stage: Stage, waiting: "Iterator[tuple[_Line, Call]]") -> "list[tuple[_Line, Call]]":
        """What Ray is given at once: not many of a domain of which it may be that no answer can be read."""
        batch: list[tuple[_Line, Call]] = []
        counts: Counter[str] = Counter()
        answered: set[str] = set()
        for line, call in waiting:
            batch.append((line, call))
            counts[line.domain] += 1
            if counts[line.domain] == _FIRST and self.tools.book.num_answered(stage.name, line.domain):
                answered.add(line.domain)
            if len(batch) >= MOST or (counts[line.domain] >= _FIRST and line.domain not in answered):
                break
        return batch

    async def _answer(
        self, endpoint: Endpoint, stage: Stage, line: "_Line", call: Call, finish: "_Finish"
    ) -> None:
        """Ask until there is an answer that can be read, or until it was asked often enough."""
        model = self._recipe.model_for(stage.name)
        while True:
            if self.tools.book.unchecked(call.key) is None:
                if (question := self._question(stage, line, call)) is None:
                    return
                await self._account.room(call, model)
                try:
                    with self._account.promise(call, model):
                        reply = await endpoint.ask(question, model)
                        self._receive(stage, call, reply)
                except UnansweredError as error:
                    self._spend(stage, call, lost=error.lost)
                    await self._refusals.refused([Unanswered(line.domain, call, str(error))])
                    return
                except EndpointError as error:
                    self._spend(stage, call, lost=error.lost)
                    raise
            if await self._check(stage, call):
                break
        finish(line, call)

    def _question(self, stage: Stage, line: "_Line", call: Call) -> Question | None:
        """What to ask next; None where it was asked often enough, and the call is given up at the end of the round."""
        problems = self.tools.book.problems(call.key)
        most = self._recipe.readings
        if len(problems) >= most and self._recipe.unanswered < 1:
            most *= self.tools.book.times_to_read(stage.name, line.domain)
        if len(problems) >= most:
            self._refusals.unreadable(Unanswered(line.domain, call, problems[-1]))
            return None
        schema = None if call.kind is None else schema_of(call.kind)
        return Question(call.messages, schema, self.tools.number("answer", call.key, len(problems)))

    def _receive(self, stage: Stage, call: Call, reply: Reply) -> None:
        """Write an answer down, which may then wait for being looked at."""
        model = self._recipe.model_for(stage.name)
        self.tools.book.receive(call.key, stage.name, model.model, reply)
        self._account.spend(model, reply.input_tokens, reply.output_tokens)
        self._spend(stage, call, lost=reply.lost)
        self._refusals.answered()

    async def _check(self, stage: Stage, call: Call) -> bool:
        """Look at an answer that has come; whether the call is over."""
        book, model = self.tools.book, self._recipe.model_for(stage.name)
        reply = book.unchecked(call.key)
        assert reply is not None
        try:
            stage.read(call, reply.text, reply.finish)
            problem = await self._problem(stage, call, reply.text)
        except UnreadableError as error:
            problem = str(error)
        book.record(call.key, stage.name, model.model, len(book.problems(call.key)), reply, problem)
        return problem is None

    async def _problem(self, stage: Stage, call: Call, text: str) -> str | None:
        if stage.takes_time(call):
            return await asyncio.to_thread(stage.problem, call, text)
        return stage.problem(call, text)

    def _take_up(self, tools: Tools) -> None:
        """Go on from what the book has."""
        self.tools = tools
        self._stages: list[Stage] = [stage(tools) for stage in STAGES]
        self._remember()

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

    Attributes:
        num_over: calls that are over.
    """

    def __init__(self, book: Book, domain: str, number: int, plan: Iterator[Call]) -> None:
        self.domain, self.number, self.num_over = domain, number, 0
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
        self.num_over += 1
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


_Finish = Callable[[_Line, Call], None]


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
