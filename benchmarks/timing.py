"""Interleaved timing, which both benchmarks share: rounds over all variants, so that load meets all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from rich.progress import track


class Clock(StrEnum):
    """What is read around a piece of work.

    wall: elapsed time. cpu: processor time of this process (all its threads), which other programs on the machine
    lengthen less; with one thread on an idle machine both agree. On a GPU only wall means anything.
    """

    WALL = "wall"
    CPU = "cpu"

    def now_s(self) -> float:
        """Seconds; only differences mean anything."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() if self is Clock.WALL else time.process_time()


@dataclass(frozen=True)
class Timing:
    """Repeated durations of one piece of work, in seconds, in the order of the rounds."""

    durations_s: list[float]

    @property
    def median_s(self) -> float:
        """Median duration."""
        return statistics.median(self.durations_s)

    def quantile_s(self, share: float) -> float:
        """The duration that `share` of the repeats do not exceed, `share` in [0, 1]."""
        ordered = sorted(self.durations_s)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    def ratio_to(self, other: "Timing") -> float:
        """Median over the rounds of this duration over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.durations_s, other.durations_s, strict=True))


def time_interleaved(
    work: Mapping[str, Callable[[], object]], repeats: int, warm_up: int, clock: Clock, title: str
) -> dict[str, Timing]:
    """Time several pieces of work in turns.

    Args:
        work: name -> what is timed.
        repeats: timed rounds; each runs every piece once.
        warm_up: rounds before them that are not timed.
        clock: what is read.
        title: beside the progress bar.

    Returns:
        name -> Timing, with `repeats` durations each.
    """
    durations: dict[str, list[float]] = {name: [] for name in work}
    for round_index in track(range(warm_up + repeats), title, transient=True):
        for name, run in work.items():
            start_s = clock.now_s()
            run()
            elapsed_s = clock.now_s() - start_s
            if round_index >= warm_up:
                durations[name].append(elapsed_s)
    return {name: Timing(values) for name, values in durations.items()}
