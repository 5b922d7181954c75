"""Servers on this machine that benchmarks ask."""

import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(
    url: str, seconds: float, explanation: Callable[[], str | None], log: Path | None = None
) -> None:
    """Wait for a server that is starting.

    Args:
        url: that it answers with status 200 once it has started.
        seconds: to wait at most.
        explanation: why it never will, if it is known by now.
        log: that it writes.

    Raises:
        RuntimeError: it has ended, or does not answer in time.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (problem := explanation()) is not None:
            raise RuntimeError(f"the server ended while it started:\n{problem}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    said = "" if log is None else f":\n{log.read_text(errors='replace')[-3000:]}"
    raise RuntimeError(f"{url} does not answer within {seconds:.0f} s{said}")
