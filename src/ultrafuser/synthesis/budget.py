"""What a run has spent, and what it may."""

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from ultrafuser.errors import UltrafuserError
from ultrafuser.synthesis.recipe import Budget, ModelSettings
from ultrafuser.synthesis.stages import Call

_FEWEST_BYTES_PER_TOKEN = 3.0
"""Of UTF-8, in a request whose tokens nobody has counted yet: a promise must not be too small in any language."""


class BudgetError(UltrafuserError):
    """The next request could cost more than is left."""


class Account:
    """What was spent, and what requests that are under way may cost.

    Args:
        budget: limits of both together.

    Attributes:
        tokens: spent so far, read and written.
        money: spent so far, in the currency of the prices.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.tokens, self.money = 0, 0.0
        self._promised_tokens, self._promised_money, self._num_promised = 0, 0.0, 0
        self._waiting: list[asyncio.Event] = []

    async def room(self, call: Call, model: ModelSettings) -> None:
        """Wait until a request can be promised: those under way hardly ever cost what they may.

        Raises:
            BudgetError: it cannot, and nothing is under way.
        """
        while (problem := self._problem(call, model)) is not None:
            if not self._num_promised:
                raise BudgetError(problem)
            released = asyncio.Event()
            self._waiting.append(released)
            await released.wait()

    @contextmanager
    def promise(self, call: Call, model: ModelSettings) -> Iterator[None]:
        """Set aside what a request may cost, as long as the block lasts.

        Raises:
            BudgetError: so much is not left.
        """
        if (problem := self._problem(call, model)) is not None:
            raise BudgetError(problem)
        tokens, money = _most(call, model)
        self._promised_tokens += tokens
        self._promised_money += money
        self._num_promised += 1
        try:
            yield
        finally:
            self._promised_tokens -= tokens
            self._promised_money -= money
            self._num_promised -= 1
            while self._waiting:
                self._waiting.pop().set()

    def spend(self, model: ModelSettings, input_tokens: int, output_tokens: int) -> None:
        """Note what an answer has cost."""
        self.tokens += input_tokens + output_tokens
        self.money += cost(model, input_tokens, output_tokens)

    def _problem(self, call: Call, model: ModelSettings) -> str | None:
        """Why a request cannot be promised."""
        tokens, money = _most(call, model)
        limit, most = self._budget.tokens, self._budget.money
        if limit is not None and self.tokens + self._promised_tokens + tokens > limit:
            return (
                f"budget.tokens is {limit:,}, and {self.tokens:,} are spent; the next request may need {tokens:,} "
                "more. Raise it, and run the same command again; nothing is lost."
            )
        if most is not None and self.money + self._promised_money + money > most:
            return (
                f"budget.money is {most:,.2f}, and {self.money:,.2f} is spent; the next request may cost "
                f"{money:,.4f} more. Raise it, and run the same command again; nothing is lost."
            )
        return None


def cost(model: ModelSettings, input_tokens: float, output_tokens: float) -> float:
    """In the currency of the price; 0 where there is none."""
    if model.price is None:
        return 0.0
    return (model.price.input * input_tokens + model.price.output * output_tokens) / 1e6


def most_tokens(call: Call, model: ModelSettings) -> tuple[int, int]:
    """Tokens that a request may read and write at most, about."""
    num_bytes = sum(len(message["content"].encode()) for message in call.messages)
    return math.ceil(num_bytes / _FEWEST_BYTES_PER_TOKEN), model.max_tokens


def _most(call: Call, model: ModelSettings) -> tuple[int, float]:
    """Tokens of both kinds, and money, that a request may cost at most, about."""
    read, written = most_tokens(call, model)
    return read + written, cost(model, read, written)
