"""Decoding with real prompts: fused specialists against one specialist, plain and speculative.

All variants answer the same questions in turns, in one process: questions of the demo's held-out conversations of all
three domains. Timed is a response from its first token to its last, so not the prompt.

    hf          one specialist, its adapter merged, under Hugging Face's `generate`
    one/BANK    the same specialist in our engine, as a bank of its own
    adapters    the specialists as adapters over one base, one token a step
    whole       the specialists merged into models of their own, one token a step
    BANK+       with speculation, by the best drafter that can be had here (on a CPU the favoured specialist in 8 bits)
    adapters+lookup, whole+specialist
                with the drafter that needs no copies: the context, or the favoured specialist itself

Beside the time stand the drafts, and what a token has to read at least (the weights, a pass at a time) as a share of
the machine's copy bandwidth: decoding is bound by reading, so a share far below one is overhead.

    ultrafuser demo --no-chat -o runs/demo
    python benchmarks/decode.py runs/demo --dtype bfloat16

`--shape 1b` (or 7b) puts random weights of that size in the specialists' place, which is enough to time plain decoding
on a GPU: `--shape 7b --device cuda --dtype bfloat16`. Drafts of random models are never right, so their speculative
rows say nothing; what speculation would give follows from the printed costs of passes and an acceptance measured on
real models.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from conversations import DOMAINS, heldout
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import Clock, time_interleaved
from transformers import AutoModelForCausalLM, LlamaConfig, StoppingCriteria

from ultrafuser import FusedModel, open_fused
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.decoding.backbones import Backbone, Slots, open_backbone
from ultrafuser.decoding.conversation import DecodingStats
from ultrafuser.decoding.engine import FusedDecoder
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.decoding.speculation import DrafterKind, SpeculationParams
from ultrafuser.modeling.assembly import model_from_tensors
from ultrafuser.modeling.configuration import SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.export import as_whole
from ultrafuser.modeling.membership import drop_specialist
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder

COPY_BYTES = 256 * 2**20
BATCHES = [1, 8]
ROWS = [1, 2, 4, 6, 8, 12]
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "tie_word_embeddings": True},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip

Prompts = Sequence[Sequence[Sequence[int]]]
"""Token ids by prompt and specialist."""


@dataclass
class Tally:
    """What a variant has done in one domain: seconds after the first tokens, and the tokens that came in them."""

    seconds: float = 0.0
    tokens: int = 0

    @property
    def token_s(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens


class EngineVariant:
    """A fused model (or one specialist) in our engine."""

    def __init__(self, fused: FusedModel, batch: int, drafter: DrafterKind | None = None) -> None:
        speculation = None if drafter is None else SpeculationParams(drafter=drafter)
        self._decoder = FusedDecoder(*fused, max_batch=batch, speculation=speculation)
        self._num = fused.model.num_specialists
        bank = fused.model.bank
        models = 1 if isinstance(bank, AdapterSpecialists) else self._num
        self.pass_bytes = sum(parameter.nbytes for parameter in bank.parameters()) / models
        weights = sum(parameter.numel() for parameter in bank.parameters()) / models
        self.draft_bytes = self.pass_bytes if drafter == "specialist" else weights  # a byte each in 8 bits
        self.stats: DecodingStats = self._decoder.stats

    def answer(self, prompts: Prompts, max_new_tokens: int, clock: Clock) -> Tally:
        """Answer prompts together."""
        params = SamplingParams(max_new_tokens=max_new_tokens)
        for prompt in prompts:
            self._decoder.submit(prompt[: self._num], params)
        self._decoder.step()
        start, tokens = clock.now_s(), 0
        while self._decoder.num_active:
            tokens += len(self._decoder.step())
        return Tally(clock.now_s() - start, tokens)


class HuggingFaceVariant:
    """One specialist as a plain model under `generate`."""

    def __init__(self, fused: FusedModel) -> None:
        model = fused.model
        name = model.specialist_names[0]
        architecture = model.bank.architectures()[0]
        plain = model_from_tensors(architecture, model.bank.merged_tensors(name), model.dtype)
        self._model = plain.to(model.device)
        self._end, self._pad = model.config.end_token_id, model.config.pad_token_id
        self.pass_bytes = sum(parameter.nbytes for parameter in self._model.parameters())

    def answer(self, prompts: Prompts, max_new_tokens: int, clock: Clock) -> Tally:
        """Answer prompts together, padded on the left."""
        rows = [torch.tensor(prompt[0]) for prompt in prompts]
        ids = torch.nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=self._pad, padding_side="left"
        )
        mask = torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True, padding_side="left"
        )
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        watch = _Watch(clock)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=self._end, pad_token_id=self._pad, stopping_criteria=[watch],
            )  # fmt: skip
        responses = out[:, ids.shape[1] :].tolist()
        lengths = [row.index(self._end) + 1 if self._end in row else len(row) for row in responses]
        return Tally(watch.times[-1] - watch.times[0], sum(lengths) - len(lengths))


class _Watch(StoppingCriteria):
    """Notes when each token came; stops nothing."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.times = clock, list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(self._clock.now_s())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def questions(encoder: ConversationEncoder, domain: str, count: int) -> Prompts:
    """Prompts of the demo's held-out conversations of one domain."""
    return [encoder.prompt(messages[:-1]) for messages in heldout(domain)[:count]]


def random_specialists(fused: FusedModel, shape: str) -> FusedModel:
    """Whole specialists of random weights in the place of a fused model's, with its tokenizer and device."""
    old, settings = fused.model.config, SHAPES[shape]
    architecture = LlamaConfig(
        vocab_size=old.vocab_size, bos_token_id=old.bos_token_id, eos_token_id=old.end_token_id, **settings
    )
    with fused.model.device:
        models = {
            member.name: AutoModelForCausalLM.from_config(architecture, dtype=fused.model.dtype)
            for member in old.members
        }
    members = [SpecialistConfig(name=name, model_config=architecture.to_dict()) for name in models]
    config = UltraFuserConfig(
        specialists=members,
        end_token_id=old.end_token_id,
        pad_token_id=old.pad_token_id,
        bos_token_id=old.bos_token_id,
    )
    model = UltraFuserForCausalLM(config, WholeSpecialists(models)).to(fused.model.device)
    return FusedModel(model.eval(), fused.tokenizer)


def one_of(fused: FusedModel) -> FusedModel:
    """The first specialist alone, in a bank of the same kind."""
    for name in fused.model.specialist_names[1:]:
        fused = drop_specialist(fused, name)
    return fused


def variant_names(banks: Sequence[str]) -> list[str]:
    """The names of all variants over these banks."""
    plainest = {"adapters": "adapters+lookup", "whole": "whole+specialist"}
    return ["hf", *(n for bank in banks for n in (f"one/{bank}", bank, f"{bank}+", plainest[bank]))]


def open_variants(fused: FusedModel, batch: int, only: Sequence[str] | None) -> dict[str, Any]:
    """Variants by name: all, or those named and what they are compared with."""
    banks = {"whole": as_whole(fused)}
    if isinstance(fused.model.bank, AdapterSpecialists):
        banks = {"adapters": fused, **banks}
    variants: dict[str, Any] = {"hf": HuggingFaceVariant(fused)}
    for name in variant_names(list(banks))[1:]:
        bank, _, drafter = name.removeprefix("one/").partition("+")
        baseline = name in (bank, f"one/{bank}")  # the plain fused model, too: a speedup is over it
        if only is not None and name not in only and not (baseline and any(bank in other for other in only)):
            continue
        model = one_of(banks[bank]) if name.startswith("one/") else banks[bank]
        kind = cast(DrafterKind, drafter if drafter else "auto") if "+" in name else None
        variants[name] = EngineVariant(model, batch, kind)
    return variants


def copy_bytes_per_s(clock: Clock, device: torch.device) -> float:
    """Bytes that a large copy reads and writes in a second, with the threads that are set."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    timing = time_interleaved({"copy": lambda: target.copy_(source)}, 7, 1, clock, "copy bandwidth")["copy"]
    return 2 * COPY_BYTES / timing.median_s


def pass_costs(fused: FusedModel, clock: Clock) -> dict[str, float]:
    """What limits speculation: a pass of K rows, and one of the 8-bit copy, over one of one row; 256 positions in."""
    bank: Any = as_whole(one_of(fused)).model.bank
    backbone = open_backbone(bank.models[0])
    draft = backbone.quantized(0)
    slots, start = Slots([0]), torch.tensor([[256]])

    def reading(model: Backbone, rows: int) -> Callable[[], object]:
        ids = torch.arange(100, 100 + rows, device=model.device).view(1, 1, rows)
        return torch.inference_mode()(lambda: model.read(ids, slots, start))

    reading(backbone, 256 + max(ROWS))()
    work = {f"pass_ratio/rows{rows}": reading(backbone, rows) for rows in ROWS}
    if draft is not None:
        work["pass_ratio/draft"] = reading(draft, 1)
    timings = time_interleaved(work, 9, 2, clock, "passes")
    return {name: timing.ratio_to(timings["pass_ratio/rows1"]) for name, timing in timings.items()}


def measure(
    variants: dict[str, Any], prompts: dict[str, Prompts], batch: int, max_new_tokens: int, clock: Clock
) -> dict[str, dict[str, Tally]]:
    """Tallies by variant and domain; the first round of all variants is not counted."""
    tallies: dict[str, dict[str, Tally]] = {name: defaultdict(Tally) for name in variants}
    rounds = [
        (domain, rows[start : start + batch])
        for start in range(0, max(map(len, prompts.values())), batch)
        for domain, rows in prompts.items()
    ]
    for index, (domain, rows) in enumerate(track([rounds[0], *rounds], "answering", transient=True)):
        for name, variant in variants.items():
            run = variant.answer(rows, max_new_tokens if index else 16, clock)
            if index:
                tallies[name][domain].seconds += run.seconds
                tallies[name][domain].tokens += run.tokens
            elif isinstance(variant, EngineVariant):
                vars(variant.stats).update(vars(DecodingStats()))
    return tallies


def report(
    variants: dict[str, Any], tallies: dict[str, dict[str, Tally]], batch: int, copy: float, console: Console
) -> dict[str, float]:
    """Print the table; give the metrics."""
    metrics: dict[str, float] = {}
    columns = [
        "variant",
        "ms per token",
        "over one",
        *DOMAINS,
        "over hf",
        "accepted",
        "drafted",
        "MB read",
        "of copy",
    ]
    table = Table(*columns, title=f"batch {batch}")

    def ratio(name: str, other: str, domains: Sequence[str] = DOMAINS) -> float:
        pairs = [tallies[name][d].token_s / tallies[other][d].token_s for d in domains]
        return sum(pairs) / len(pairs)

    for name, variant in variants.items():
        bank, _, drafter = name.removeprefix("one/").partition("+")
        one = f"one/{bank}" if bank != "hf" else next(n for n in variants if n.startswith("one/"))
        token_s = sum(tally.token_s for tally in tallies[name].values()) / len(DOMAINS)
        cells = [
            f"{1e3 * token_s:.1f}",
            f"{ratio(name, one):.2f}",
            *(f"{ratio(name, one, [d]):.2f}" for d in DOMAINS),
        ]
        cells.append(f"{ratio(name, 'hf'):.2f}")
        metrics[f"token_s/{name}/batch{batch}"] = token_s
        passes, draft_read = 1.0 / batch, 0.0
        if isinstance(variant, EngineVariant):
            stats = variant.stats
            passes = stats.passes / stats.tokens
            draft_read = stats.draft_passes / stats.tokens * variant.draft_bytes
            accepted = stats.accepted / stats.drafted if stats.drafted else None
            cells += (
                [f"{accepted:.2f}", f"{stats.drafted / stats.drafts:.1f}"]
                if accepted is not None
                else ["", ""]
            )
            mode = (drafter or "speculative") if "+" in name else "plain"
            if not name.startswith("one/"):
                key = f"{bank}/{mode}/batch{batch}"
                metrics[f"time_ratio/{key}"] = ratio(name, one)
                metrics[f"time_ratio_to_hf_generate/{key}"] = ratio(name, "hf")
                metrics |= {f"time_ratio/{key}/{d}": ratio(name, one, [d]) for d in DOMAINS}
            if accepted is not None:
                suffix = f"/{drafter}" if drafter else ""
                metrics[f"acceptance/{bank}{suffix}/batch{batch}"] = accepted
                metrics[f"drafted/{bank}{suffix}/batch{batch}"] = stats.drafted / stats.drafts
                metrics[f"accepted/{bank}{suffix}/batch{batch}"] = stats.accepted / stats.drafts
                metrics[f"speedup/{bank}{suffix}/batch{batch}"] = ratio(bank, name)
        else:
            cells += ["", ""]
        read = passes * variant.pass_bytes + draft_read
        metrics[f"read_bytes/{name}/batch{batch}"] = read
        table.add_row(name, *cells, f"{read / 1e6:.0f}", f"{read / token_s / copy:.0%}")
    console.print(table)
    return metrics


def main(
    model: Annotated[str, typer.Argument(help="A fused model: a folder that train or demo made.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    batch: Annotated[list[int], typer.Option(min=1, help="Conversations at once.")] = BATCHES,
    rows: Annotated[int, typer.Option(min=1, help="Questions of each domain.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    shape: Annotated[str | None, typer.Option(help="Random weights of this size: 1b or 7b.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only: Annotated[list[str] | None, typer.Option(help="Variants to run; all if none.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    clock: Annotated[Clock, typer.Option(help="Elapsed time, or processor time.")] = Clock.WALL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Time a token of fused specialists against one specialist's."""
    torch.set_num_threads(threads)
    console = Console(width=None if Console().is_terminal else 130)
    load = os.getloadavg()[0]
    fused = open_fused(model, getattr(torch, dtype))
    fused.model.to(device)
    adapters = isinstance(fused.model.bank, AdapterSpecialists) and shape is None
    known = variant_names(["adapters", "whole"] if adapters else ["whole"])
    if only is not None and (unknown := set(only) - set(known)):
        raise typer.BadParameter(
            f"--only must be among {', '.join(known)}, got {', '.join(sorted(unknown))}."
        )
    copy = copy_bytes_per_s(clock, fused.model.device)
    encoder = fused.model.conversation_encoder(fused.tokenizer)
    prompts = {domain: questions(encoder, domain, rows) for domain in DOMAINS}
    if shape is not None:
        fused = random_specialists(fused, shape)
    metrics = {"copy_bytes_per_s": copy, **pass_costs(fused, clock)}
    console.print(", ".join(f"{name} {ratio:.2f}" for name, ratio in metrics.items() if "pass" in name))
    for size in batch:
        variants = open_variants(fused, size, only)
        tallies = measure(variants, prompts, size, max_new_tokens, clock)
        metrics |= report(variants, tallies, size, copy, console)
    console.print(
        f"{dtype}, {threads} threads, {clock} clock, load {load:.1f} at the start, copy {copy / 1e9:.1f} GB/s"
    )
    if json_file is not None:
        settings = {"model": model, "dtype": dtype, "rows": rows, "max_new_tokens": max_new_tokens,
                    "threads": threads, "clock": str(clock), "load": load, "shape": shape,
                    "device": device}  # fmt: skip
        write_metrics(json_file, metrics, provenance(**settings))


if __name__ == "__main__":
    typer.run(main)
