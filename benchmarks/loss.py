"""Peak memory and time of the chunked fused cross-entropy against the formulas it replaces.

Every method computes the loss of R response tokens under the fused distribution and its gradients: to the hidden
states of all specialists, to the gate, and (case `trained`) to the heads.

    plain     logits of every specialist (N, R, V), their weighted sum (R, V), `F.cross_entropy`
    product   scaled hidden states times the heads, (R, V) once, `F.cross_entropy`
    torch     the same inputs through `F.linear_cross_entropy` in chunks; it takes one head, so separate heads are
              concatenated first, in every pass, as a library must that is handed N of them
    chunked   `ultrafuser.fusion.fused_cross_entropy`

Memory is what a fresh process needs beyond its inputs: growth of the peak resident set on a CPU, peak allocation on
a GPU. Time is forward and backward, in turns, after a check that all methods agree.

    python benchmarks/loss.py                                the cases of the paper's training, minutes on two cores
    python benchmarks/loss.py --case separate/frozen --repeats 2 --threads 1
"""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import Clock, Timing, time_interleaved
from torch import Tensor
from torch.nn import functional as F

from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import UltrafuserError
from ultrafuser.fusion import Head, fused_cross_entropy, fused_logits, scale_hidden_states
from ultrafuser.fusion.loss import CHUNK_TOKENS

CASES = ("separate/frozen", "separate/trained", "shared/frozen", "shared/trained")
"""<heads>/<training>: N heads as in whole specialists or one as in adapters; heads with or without gradients."""

MAIN_CASE = "separate/trained"
"""What `memory_ratio` and `time_ratio` stand for: stage 2 on whole specialists, where the chunked loss gains least."""

CHECK_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is computed. R tokens, V vocabulary, H hidden size, N specialists."""

    case: str
    num_tokens: int
    vocab_size: int
    hidden_size: int
    num_specialists: int
    chunk_tokens: int
    dtype: torch.dtype
    device: str
    threads: int


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Tensors of a problem: hidden states N x (R, H), gate scores (R, N), heads 1 or N x (V, H), labels (R,)."""

    problem: Problem
    hidden_states: list[Tensor]
    gate_scores: Tensor
    heads: list[Head]
    labels: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "Inputs":
        """Random inputs; the hidden states are scaled so that losses stay near log(V)."""
        torch.set_num_threads(problem.threads)
        torch.manual_seed(0)
        heads, _, training = problem.case.partition("/")
        settings: dict[str, Any] = {"dtype": problem.dtype, "device": problem.device}
        tokens, count = problem.num_tokens, problem.num_specialists
        weights = [
            torch.randn(problem.vocab_size, problem.hidden_size, **settings).requires_grad_(
                training == "trained"
            )
            for _ in range(count if heads == "separate" else 1)
        ]
        width = problem.hidden_size
        states = [
            torch.randn(tokens, width, **settings).div_(width**0.5).requires_grad_() for _ in range(count)
        ]
        return cls(
            problem=problem,
            hidden_states=states,
            gate_scores=torch.randn(tokens, count, device=problem.device).requires_grad_(),
            heads=[Head(weight) for weight in weights],
            labels=torch.randint(problem.vocab_size, (tokens,), device=problem.device),
        )

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that gets a gradient."""
        every = [self.gate_scores, *self.hidden_states, *(head.weight for head in self.heads)]
        return [leaf for leaf in every if leaf.requires_grad]


def plain(inputs: Inputs, weights: Tensor) -> Tensor:
    """The formula as it is written: all specialists' logits at once."""
    heads = inputs.heads * (inputs.problem.num_specialists // len(inputs.heads))
    specialist_logits = [
        state @ head.weight.t() for state, head in zip(inputs.hidden_states, heads, strict=True)
    ]
    fused = reduce(torch.add, (weights[:, [j]] * logits for j, logits in enumerate(specialist_logits)))
    return F.cross_entropy(fused, inputs.labels)


def product(inputs: Inputs, weights: Tensor) -> Tensor:
    """One product of scaled hidden states and heads: (tokens x vocabulary) is held, but not N times."""
    return F.cross_entropy(fused_logits(inputs.hidden_states, weights, inputs.heads).float(), inputs.labels)


def torch_chunked(inputs: Inputs, weights: Tensor) -> Tensor:
    """PyTorch's own chunked linear cross-entropy, with its default choice of chunks."""
    factors, heads = scale_hidden_states(inputs.hidden_states, weights, inputs.heads)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(
        torch.cat(factors, -1), torch.cat(heads, -1), inputs.labels, options=options
    )


def chunked(inputs: Inputs, weights: Tensor) -> Tensor:
    """What training uses."""
    return fused_cross_entropy(
        inputs.hidden_states, weights, inputs.heads, inputs.labels, chunk_tokens=inputs.problem.chunk_tokens
    )


METHODS: dict[str, Callable[[Inputs, Tensor], Tensor]] = {
    "plain": plain,
    "product": product,
    "chunked": chunked,
}
if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
    METHODS["torch"] = torch_chunked


def forward_backward(inputs: Inputs, method: str) -> tuple[Tensor, list[Tensor]]:
    """One pass; returns the loss and the gradients of `inputs.leaves`, which are left without any."""
    loss = METHODS[method](inputs, inputs.gate_scores.softmax(-1))
    loss.backward()
    gradients = []
    for leaf in inputs.leaves:
        assert leaf.grad is not None
        gradients.append(leaf.grad)
        leaf.grad = None
    return loss.detach(), gradients


def largest_difference(problem: Problem) -> dict[str, float]:
    """How far each method's gradients are from the plain formula's, on a few tokens.

    Returns:
        method -> largest difference over the largest gradient, the worst of all leaves.
    """
    inputs = Inputs.of(replace(problem, num_tokens=CHECK_TOKENS, chunk_tokens=CHECK_TOKENS // 3))
    expected = forward_backward(inputs, "plain")[1]
    differences = {}
    for method in METHODS:
        pairs = zip(expected, forward_backward(inputs, method)[1], strict=True)
        differences[method] = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return differences


def peak_memory_bytes(problem: Problem, method: str) -> int:
    """What one pass needs beyond its inputs, gradients included; to be run in a fresh process."""
    inputs = Inputs.of(problem)
    if problem.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward(inputs, method)
        return torch.cuda.max_memory_allocated() - before
    before = _peak_resident_bytes()
    forward_backward(inputs, method)
    return _peak_resident_bytes() - before


def _peak_resident_bytes() -> int:
    """High-water mark of this process; a new one starts with its parent's, which holds no inputs."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_memory(problems: Sequence[Problem]) -> dict[tuple[str, str], int]:
    """Peak bytes by (case, method), each in a process of its own."""
    jobs = [(problem, method) for problem in problems for method in METHODS]
    peaks = {}
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["ultrafuser.fusion"])  # imported once; every child starts from there
    for problem, method in track(jobs, "memory", transient=True):
        with ProcessPoolExecutor(1, mp_context=server) as pool:
            peaks[problem.case, method] = pool.submit(peak_memory_bytes, problem, method).result()
    return peaks


def measure_time(problems: Sequence[Problem], repeats: int, clock: Clock) -> dict[tuple[str, str], Timing]:
    """Timings by (case, method); methods of a case take turns."""
    timings = {}
    for problem in problems:
        inputs = Inputs.of(problem)
        work = {
            method: lambda inputs=inputs, method=method: forward_backward(inputs, method)
            for method in METHODS
        }
        for method, timing in time_interleaved(work, repeats, 0, clock, f"time {problem.case}").items():
            timings[problem.case, method] = timing
    return timings


def metrics_of(
    cases: Sequence[str], peaks: dict[tuple[str, str], int], timings: dict[tuple[str, str], Timing]
) -> dict[str, float]:
    """Metric name -> number: ratios of the chunked loss to the others, per case and for the main case."""
    metrics: dict[str, float] = {}
    for case in cases:
        for method in METHODS:
            metrics[f"peak_bytes/{case}/{method}"] = peaks[case, method]
            metrics[f"time_s/{case}/{method}"] = timings[case, method].median_s
        for suffix, other in (("", "plain"), ("_to_product", "product"), ("_to_torch", "torch")):
            if other in METHODS:
                memory = peaks[case, "chunked"] / peaks[case, other]
                metrics[f"memory_ratio{suffix}/{case}"] = memory
                metrics[f"time_ratio{suffix}/{case}"] = timings[case, "chunked"].ratio_to(
                    timings[case, other]
                )
    if MAIN_CASE in cases:
        metrics["memory_ratio"] = metrics[f"memory_ratio/{MAIN_CASE}"]
        metrics["time_ratio"] = metrics[f"time_ratio/{MAIN_CASE}"]
    return metrics


def table_of(
    cases: Sequence[str],
    peaks: dict[tuple[str, str], int],
    timings: dict[tuple[str, str], Timing],
    differences: dict[str, dict[str, float]],
) -> Table:
    """One row per case and method; ratios are to the plain formula of the same case."""
    table = Table(
        "case", "method", "peak MB", "x plain", "median s", "min-max", "x plain", "gradients off by"
    )
    for case in cases:
        for method in METHODS:
            timing = timings[case, method]
            table.add_row(
                case,
                method,
                f"{peaks[case, method] / 1e6:.0f}",
                f"{peaks[case, method] / peaks[case, 'plain']:.3f}",
                f"{timing.median_s:.2f}",
                f"{min(timing.durations_s):.2f}-{max(timing.durations_s):.2f}",
                f"{timing.ratio_to(timings[case, 'plain']):.3f}",
                f"{differences[case][method]:.1e}",
                end_section=method == list(METHODS)[-1],
            )
    return table


def main(
    case: Annotated[list[str], typer.Option(help="Which case; may be given several times.")] = list(CASES),  # noqa: B006
    tokens: Annotated[int, typer.Option(min=CHECK_TOKENS, help="R, response tokens.")] = 4096,
    vocab_size: Annotated[int, typer.Option(min=2, help="V.")] = 49_152,
    hidden_size: Annotated[int, typer.Option(min=1, help="H.")] = 576,
    specialists: Annotated[int, typer.Option(min=1, help="N.")] = 3,
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")] = CHUNK_TOKENS,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU where there is one.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
    clock: Annotated[
        Clock, typer.Option(help="Elapsed time, or processor time on a busy machine.")
    ] = Clock.WALL,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write metrics and provenance here.")
    ] = None,
) -> None:
    """Peak memory and time of the chunked fused cross-entropy against the plain formula."""
    unknown = [name for name in case if name not in CASES]
    if unknown:
        raise UltrafuserError(f"--case must be one of {', '.join(CASES)}, got {unknown[0]!r}.")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = [
        Problem(
            case=name,
            num_tokens=tokens,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_specialists=specialists,
            chunk_tokens=chunk_tokens,
            dtype=getattr(torch, dtype),
            device=device,
            threads=threads,
        )
        for name in case
    ]
    load = os.getloadavg()[0]
    peaks = measure_memory(problems)
    differences = {problem.case: largest_difference(problem) for problem in problems}
    timings = measure_time(problems, repeats, clock)
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table_of(case, peaks, timings, differences))
    console.print(
        f"R {tokens}, V {vocab_size}, H {hidden_size}, N {specialists}, {dtype} on {device}, {threads} threads, "
        f"chunks of {chunk_tokens}, {clock} clock, {repeats} rounds in turns, load {load:.1f} at the start"
    )
    if json_file is not None:
        settings = {"tokens": tokens, "vocab_size": vocab_size, "hidden_size": hidden_size,
                    "specialists": specialists, "chunk_tokens": chunk_tokens, "dtype": dtype, "device": device,
                    "threads": threads, "repeats": repeats, "clock": str(clock), "load": load}  # fmt: skip
        write_metrics(
            json_file, metrics_of(case, peaks, timings), provenance(**settings, main_case=MAIN_CASE)
        )


if __name__ == "__main__":
    typer.run(main)
