"""Servers on this machine that benchmarks ask."""

import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(
    url: str, seconds: float, process: subprocess.Popen[Any], log: Path | None = None
) -> None:
    """Wait for a server that is starting.

    Args:
        url: that it answers with status 200 once it has started.
        seconds: to wait at most.
        process: that it runs in.
        log: that it writes.

    Raises:
        RuntimeError: it has ended, or does not answer in time.
    """
    end, problem = time.monotonic() + seconds, f"does not answer within {seconds:.0f} s"
    while time.monotonic() < end:
        if process.poll() is not None:
            problem = f"has ended while it started, with exit code {process.returncode}"
            break
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    said = "" if log is None else f":\n{log.read_text(errors='replace')[-3000:]}"
    raise RuntimeError(f"{url} {problem}{said}")
