"""The pipeline of `ultrafuser synth`: how near it comes to what a server allows, and its sieve at full size.

Throughput: a whole run against a server on loopback that takes 200 ms for every answer. A stage waits for the one
before it, and a further round for the first; the ideal is that of each such step's questions always the allowed number
is asked at once. `throughput_fraction` is the ideal time over the time it took, planning, sieving and bookkeeping
included; `slots_used_fraction` is the same without allowing for the waiting, as if all questions had been known at
once. `of_bare_fraction` compares with what a loop that does nothing but send and read bytes gets from the same server
at the same time instead of with the ideal.

Sieve: generated instructions (words of Python's manual at random), among them planted copies of which words were
changed until they share as little with their original as was drawn, from 0.1 below the threshold to 1, and planted
texts of benchmarks (thirteen words in a row of one, or a shorter one whole); each is given to the sieve as in a run.
Overlaps are counted here, not by the sieve. `recall/A-B` is of copies whose overlap is at least A and below B; below
the threshold, `removed/A-B` are those that were removed all the same.

    python benchmarks/synth.py --benchmarks FOLDER
"""

import asyncio
import itertools
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, NamedTuple

import aiohttp
import typer
from loopback import free_port, wait_until_it_answers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.synthesis.pipeline import Pipeline
from ultrafuser.synthesis.recipe import FilterSettings, SynthesisRecipe
from ultrafuser.synthesis.sieve import LEAST_WORDS_OF_PART, Sieve, benchmark_texts, words_of

DUPLICATES, CONTAMINATED = 0.05, 0.005
"""Shares that are planted."""
BAND, BANDS_BELOW = 0.05, 2
"""Width of a band of overlaps, and how many of them are planted below the threshold."""


@contextmanager
def server(latency_s: float, faults: float = 0.0) -> Iterator[str]:
    """The canned endpoint on a free port of loopback."""
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("chat_server.py"))]
    with subprocess.Popen(
        [*command, str(port), str(faults), str(latency_s)], stdout=subprocess.PIPE
    ) as process:
        try:
            wait_until_it_answers(f"http://127.0.0.1:{port}/asked", 30, process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


async def bare(url: str, calls: int, concurrency: int) -> float:
    """Seconds that so many calls take a client that does nothing else."""
    body = json.dumps({"model": "canned", "messages": [{"role": "user", "content": "word " * 150}]}).encode()
    left = iter(range(calls))
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def work() -> None:
            for _ in left:
                headers = {"content-type": "application/json"}
                async with session.post(f"{url}/chat/completions", data=body, headers=headers) as response:
                    await response.read()

        start = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return time.perf_counter() - start


def throughput(instructions: int, concurrency: int, latency_s: float) -> dict[str, float]:
    """A whole run at the paper's proportions; the metrics."""
    shares = {"text": (30, 1100, 100 / 310), "code": (21, 407, 100 / 310), "math": (21, 80, 110 / 310)}
    domains = {}
    for name, (meta, sub, share) in shares.items():
        count = round(share * instructions)
        scale = instructions / 310_000
        metas = max(round(meta * scale), 3)
        domains[name] = {
            "meta_topics": metas, "sub_topics": max(round(sub * scale), metas), "instructions": count
        }  # fmt: skip
    with server(latency_s) as url, tempfile.TemporaryDirectory() as folder:
        recipe = SynthesisRecipe.model_validate(
            {
                "endpoint": {"base_url": url, "api_key_variable": None, "concurrency": concurrency},
                "model": {"model": "canned"},
                "domains": domains,
                "filters": {"languages": None},
            }
        )
        pipeline = Pipeline(recipe, folder)
        start = time.perf_counter()
        pipeline.run()
        took_s = time.perf_counter() - start
        keys = pipeline.tools.book.keys()
        steps = Counter((key.split("/")[0], key.split("/")[2]) for key in keys)
        pipeline.close()
        bare_s = asyncio.run(bare(url, len(keys), concurrency))
    ideal_s = sum(math.ceil(calls / concurrency) * latency_s for calls in steps.values())
    return {
        "calls": len(keys),
        "steps": len(steps),
        "ideal_s": ideal_s,
        "took_s": took_s,
        "calls_per_s": len(keys) / took_s,
        "throughput_fraction": ideal_s / took_s,
        "slots_used_fraction": len(keys) * latency_s / concurrency / took_s,
        "bare_fraction": math.ceil(len(keys) / concurrency) * latency_s / bare_s,
        "of_bare_fraction": ideal_s / took_s * bare_s / (math.ceil(len(keys) / concurrency) * latency_s),
    }


class Planted(NamedTuple):
    """A generated instruction.

    Attributes:
        kind: "new", "copy" or "contaminated".
        text: of it.
        original: number of the one that it is a copy of.
        overlap: with that one.
    """

    kind: str
    text: str
    original: int = -1
    overlap: float = 0.0


def overlap_of(some: Sequence[str], others: Sequence[str]) -> float:
    """Jaccard similarity of pairs of words, counted without the sieve."""
    a, b = set(itertools.pairwise(some)), set(itertools.pairwise(others))
    return len(a & b) / len(a | b)


def instructions_of(count: int, benchmarks: Sequence[str], seed: int, threshold: float) -> Iterator[Planted]:
    """Generated instructions; no two are copies of the same."""
    choice = random.Random(seed)
    words = sorted({word for text in topics.values() for word in words_of(text) if word.isalpha()})
    rows = [
        row
        for row in (words_of(text) for path in benchmarks for text in benchmark_texts(path))
        if len(row) >= LEAST_WORDS_OF_PART
    ]
    earlier: list[tuple[int, list[str]]] = []
    for number in range(count):
        drawn = choice.random()
        text = choice.choices(words, k=choice.randint(15, 45))
        if drawn < DUPLICATES and earlier:
            original, said = earlier.pop(choice.randrange(len(earlier)))
            wanted = choice.uniform(threshold - BANDS_BELOW * BAND, 1)
            copied, overlap = list(said), 1.0
            # One word after another, side by side, changes the overlap by the least. The last change may go too far.
            place = choice.randrange(len(said))
            while overlap > wanted:
                copied[place] = choice.choice(words)
                place = (place + 1) % len(said)
                overlap = overlap_of(said, copied)
            yield Planted("copy", " ".join(copied), original, overlap)
        elif drawn < DUPLICATES + CONTAMINATED and rows:
            row = choice.choice(rows)
            start = choice.randrange(max(len(row) - 12, 1))
            yield Planted("contaminated", " ".join([*text[:10], *row[start : start + 13], *text[10:]]))
        else:
            if len(text) >= 30:
                earlier.append((number, text))
            yield Planted("new", " ".join(text))


def sieve(count: int, benchmarks: Sequence[str], seed: int) -> dict[str, float]:
    """Give the sieve so many instructions; the metrics.

    A planted copy counts where its original was taken, and where it was not removed as of another language.
    """
    settings = FilterSettings(benchmarks=list(benchmarks))
    start = time.perf_counter()
    one = Sieve(settings)
    read_s = time.perf_counter() - start
    generated = list(instructions_of(count, benchmarks, seed, settings.near_duplicate))
    found: list[str] = []
    start = time.perf_counter()
    for number, planted in enumerate(track(generated, "sieving")):
        finding = one.take(str(number), planted.text)
        found.append("taken" if finding is None else finding.reason)
    took_s = time.perf_counter() - start
    metrics = {
        "instructions": count,
        "benchmarks_s": read_s,
        "dedup_s": read_s + took_s,
        "dedup_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "of_another_language": found.count("language"),
    }
    metrics |= near_duplicates(generated, found, settings.near_duplicate)
    contaminated = [
        reason for planted, reason in zip(generated, found, strict=True) if planted.kind == "contaminated"
    ]
    if contaminated:
        metrics["contaminated"] = len(contaminated)
        metrics["contamination_recall"] = contaminated.count("benchmark") / len(contaminated)
        metrics["contamination_false"] = found.count("benchmark") - contaminated.count("benchmark")
    return metrics


def near_duplicates(generated: Sequence[Planted], found: Sequence[str], threshold: float) -> dict[str, float]:
    """Recall and precision of what was removed as said before, in all and by overlap."""
    flagged = [reason in ("duplicate", "near duplicate") for reason in found]
    right = sum(
        flag and one.kind == "copy" and one.overlap >= threshold
        for flag, one in zip(flagged, generated, strict=True)
    )
    copies = [
        (one.overlap, flagged[number])
        for number, one in enumerate(generated)
        if one.kind == "copy" and found[one.original] == "taken" and found[number] != "language"
    ]
    above = [flag for overlap, flag in copies if overlap >= threshold]
    metrics: dict[str, float] = {
        "duplicates": len(above),
        "duplicate_recall": sum(above) / max(len(above), 1),
        "duplicate_precision": right / max(sum(flagged), 1),
    }
    for band in range(-BANDS_BELOW, round((1 - threshold) / BAND)):
        low, high = threshold + band * BAND, threshold + (band + 1) * BAND
        flags = [flag for overlap, flag in copies if low <= overlap < high]
        name = f"{low:.2f}-{high:.2f}"
        metrics[f"copies/{name}"] = len(flags)
        if band < 0:
            metrics[f"removed/{name}"] = sum(flags)
        else:
            metrics[f"recall/{name}"] = sum(flags) / max(len(flags), 1)
    return metrics


def main(
    benchmarks: Annotated[
        Path | None,
        typer.Option(help="Folder of benchmark files, *test*.jsonl.gz; none are planted without."),
    ] = None,
    instructions: Annotated[int, typer.Option(min=100, help="For the sieve.")] = 300_000,
    run_instructions: Annotated[int, typer.Option(min=0, help="Of the run; 0 leaves it out.")] = 3000,
    concurrency: Annotated[int, typer.Option(min=1)] = 32,
    latency_s: Annotated[float, typer.Option(min=0.001)] = 0.2,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Measure throughput and sieve."""
    metrics = throughput(run_instructions, concurrency, latency_s) if run_instructions else {}
    files = [] if benchmarks is None else sorted(map(str, benchmarks.glob("*test*.jsonl.gz")))
    metrics |= sieve(instructions, files, seed)
    table = Table("", "", show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)
    if json_file is not None:
        settings = {"concurrency": concurrency, "latency_s": latency_s, "seed": seed,
                    "benchmarks": json.dumps([Path(file).name for file in files])}  # fmt: skip
        write_metrics(json_file, metrics, provenance(**settings))


if __name__ == "__main__":
    typer.run(main)
