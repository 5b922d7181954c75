"""What a server counts, for Prometheus."""

import functools
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ultrafuser.decoding.engine import TokenStep


class ServerMetrics:
    """Counters of one server.

    Args:
        specialists: their names.
        num_requests: gives how many are running, and how many are waiting.
    """

    def __init__(self, specialists: Sequence[str], num_requests: Callable[[], tuple[int, int]]) -> None:
        self._registry = CollectorRegistry()
        self._responses = Counter(
            "ultrafuser_responses", "Responses by HTTP status.", ["status"], registry=self._registry
        )
        self._prompt_tokens = Counter(
            "ultrafuser_prompt_tokens",
            "Tokens of prompts, as the first specialist reads them.",
            registry=self._registry,
        )
        self._tokens = Counter("ultrafuser_tokens", "Tokens that were generated.", registry=self._registry)
        self._first_token = Histogram(
            "ultrafuser_time_to_first_token_seconds",
            "From the request to its first token.",
            registry=self._registry,
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
        )
        requests = Gauge(
            "ultrafuser_requests",
            "Responses that are decoded, and those that wait for it or to be sent.",
            ["state"],
            registry=self._registry,
        )
        requests.labels("running").set_function(lambda: num_requests()[0])
        requests.labels("waiting").set_function(lambda: num_requests()[1])
        mean = Gauge(
            "ultrafuser_mean_gate_weight",
            "Mean gate weight over all tokens that the gate decided on.",
            ["specialist"],
            registry=self._registry,
        )
        self._weight_sums = dict.fromkeys(specialists, 0.0)
        self._num_tokens = 0
        for name in specialists:
            mean.labels(name).set_function(functools.partial(self._mean_weight, name))

    def _mean_weight(self, specialist: str) -> float:
        return self._weight_sums[specialist] / max(self._num_tokens, 1)

    def responded(self, status: int) -> None:
        """Count a response."""
        self._responses.labels(str(status)).inc()

    def read(self, num_tokens: int) -> None:
        """Count a prompt."""
        self._prompt_tokens.inc(num_tokens)

    def said(self, steps: Sequence[TokenStep], *, gated: bool) -> None:
        """Count generated tokens, and who they came from, where that was left to the gate."""
        self._tokens.inc(len(steps))
        if not gated:
            return
        self._num_tokens += len(steps)
        for step in steps:
            for name, weight in zip(self._weight_sums, step.gate_weights, strict=True):
                self._weight_sums[name] += weight

    def began(self, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._first_token.observe(seconds)

    def text(self) -> bytes:
        """Everything, in Prometheus' form."""
        return generate_latest(self._registry)
