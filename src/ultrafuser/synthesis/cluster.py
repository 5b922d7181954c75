"""Asking from many processes and machines, by Ray Data (the extra `ray`).

Ray takes the cluster that `RAY_ADDRESS` names, or this machine alone. Only asking is spread: plans, checks, the sieve
and the book stay in the process that runs the pipeline. Answers come by blocks, so that a run that is killed asks again
what the blocks under way had been answered: up to four times as many as may run at once.
"""

import asyncio
import json
import math
import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.book import Reply
from ultrafuser.synthesis.endpoint import STRUCTURED, Endpoint, EndpointError, Question, UnansweredError
from ultrafuser.synthesis.recipe import EndpointSettings, ModelSettings

MOST = 20_000
"""Questions that are handed to Ray at once; starting its processes takes seconds."""
_FEW = 4
"""Times the share of one process of what may run at once: so few questions are not worth starting processes."""
_TASKS_AT_ONCE = 4
"""Blocks of questions that one process has at once: while the last of one are answered, the next ones are asked."""


class Cluster:
    """Processes that ask.

    Args:
        settings: of the endpoint; its `concurrency` is shared out among the processes.
        num_askers: processes, from 1 to as many as requests may run at once.
        structured: how to ask for JSON first; see `Endpoint`.

    Attributes:
        structured: how it was asked for last.

    Raises:
        UltrafuserError: Ray is not installed, or there are more processes than requests may run at once.
    """

    def __init__(self, settings: EndpointSettings, num_askers: int, structured: str | None) -> None:
        try:
            import ray.data
        except ImportError as error:
            raise UltrafuserError(
                f"asking by Ray needs the package {error.name!r}: pip install 'ultrafuser[ray]'."
            ) from error
        if num_askers > settings.concurrency:
            raise UltrafuserError(
                f"{num_askers} processes are more than the {settings.concurrency} requests that may run at once "
                "(endpoint.concurrency). Ask from fewer, or allow more requests."
            )
        self._data = ray.data
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False  # the pipeline has its own
        context.print_on_execution_start = False
        first = STRUCTURED[0] if structured is None else structured
        self.structured = first if settings.structured == "auto" else settings.structured
        self._num_askers = num_askers
        self._each = settings.concurrency // num_askers
        self._settings = settings

    def ask(
        self, questions: Sequence[tuple[str, Question]], model: ModelSettings
    ) -> Iterator[tuple[str, Reply | UnansweredError | EndpointError]]:
        """Ask, and give answers as they come.

        Args:
            questions: with the key of each, at most `MOST`.
            model: who answers.

        Yields:
            Key, and the answer or why there is none: see `Endpoint.ask`.
        """
        if not questions:
            return
        rows = [{"key": key, "question": json.dumps(asdict(question))} for key, question in questions]
        is_few = len(rows) <= _FEW * self._each
        concurrency = self._settings.concurrency if is_few else self._each
        asker = (
            {**self._settings.model_dump(mode="json"), "concurrency": concurrency},
            self._settings.api_key(),
            model.model_dump(mode="json"),
            self.structured,
        )
        answered: Iterable[dict[str, str]]
        answered = asyncio.run(_asked_here(asker, rows)) if is_few else self._asked_there(asker, rows)
        for row in answered:
            said = json.loads(row["answer"])
            self.structured = max(self.structured, said["structured"], key=STRUCTURED.index)
            if "reply" in said:
                yield row["key"], Reply(**said["reply"])
            elif "unanswered" in said:
                yield row["key"], UnansweredError(said["unanswered"], lost=said["lost"])
            else:
                yield row["key"], EndpointError(said["failed"], lost=said["lost"])

    async def ask_here(self, question: Question, model: ModelSettings) -> Reply:
        """Ask from this process; see `Endpoint.ask`."""
        async with Endpoint(self._settings, self.structured) as endpoint:
            return await endpoint.ask(question, model)

    def _asked_there(self, asker: tuple[Any, ...], rows: list[dict[str, str]]) -> Iterable[dict[str, str]]:
        num_blocks = math.ceil(len(rows) / self._each)
        strategy = self._data.ActorPoolStrategy(
            size=min(self._num_askers, num_blocks),
            max_tasks_in_flight_per_actor=_TASKS_AT_ONCE,
            max_concurrent_calls_per_actor=_TASKS_AT_ONCE,
        )
        data = self._data.from_items(rows, override_num_blocks=num_blocks)
        # It waits most of the time, and so needs next to nothing of a processor.
        settings = {"batch_size": None, "compute": strategy, "num_cpus": 0.01}
        return data.map_batches(_Asker, fn_constructor_args=asker, **settings).iter_rows()


async def _asked_here(asker: tuple[Any, ...], rows: list[dict[str, str]]) -> list[dict[str, str]]:
    batch = {name: [row[name] for row in rows] for name in ("key", "question")}
    one = _Asker(*asker)
    (answers,) = [told async for told in one(batch)]
    await one.close()
    return [dict(zip(answers, values, strict=True)) for values in zip(*answers.values(), strict=True)]


class _Asker:
    """One process."""

    def __init__(
        self, settings: dict[str, Any], api_key: str, model: dict[str, Any], structured: str
    ) -> None:
        self._settings = EndpointSettings.model_validate(settings)
        if self._settings.api_key_variable is not None:
            os.environ[self._settings.api_key_variable] = api_key
        self._model, self._structured = ModelSettings.model_validate(model), structured
        self._endpoint: Endpoint | None = None

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, list[str]]]:
        if self._endpoint is None:
            self._endpoint = Endpoint(self._settings, self._structured)
        questions = [Question(**json.loads(question)) for question in batch["question"]]
        answers = await asyncio.gather(*map(self._answer, questions))
        told = [json.dumps({**answer, "structured": self._endpoint.structured}) for answer in answers]
        yield {"key": list(map(str, batch["key"])), "answer": told}

    async def close(self) -> None:
        """Give connections back."""
        if self._endpoint is not None:
            await self._endpoint.__aexit__(None, None, None)

    async def _answer(self, question: Question) -> dict[str, Any]:
        assert self._endpoint is not None
        try:
            return {"reply": asdict(await self._endpoint.ask(question, self._model))}
        except UnansweredError as error:
            return {"unanswered": str(error), "lost": error.lost}
        except EndpointError as error:
            self._endpoint.limiter.stop(str(error))  # the others would fail likewise
            return {"failed": str(error), "lost": error.lost}
