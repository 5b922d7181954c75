"""Whether the ways of decoding give the reference's tokens, with real prompts and real specialists.

For the questions of the demo's held-out conversations of all three domains, responses are decoded

    reference     the obvious loop (with a cache)
    generate      by `UltraFuserForCausalLM.generate`
    engine        by `FusedDecoder`, several conversations at a time
    + int8        the same with drafts by 8-bit copies of the specialists
    + lookup      adapters: with drafts from the context
    + specialist  whole specialists: with drafts by the favoured one
    sampled       by `FusedDecoder` with temperature 0.8, top-p 0.95 and a seed; against the reference with the same

and compared token by token. What is done is kept in a JSONL file, behind the settings: started again with the same
settings, the script goes on behind it.

    ultrafuser demo --no-chat -o runs/demo
    python benchmarks/exact.py runs/demo --work runs/exact.jsonl
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from conversations import DOMAINS
from decode import BATCHES, questions
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ultrafuser import FusedModel, open_fused
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.decoding import FusedDecoder, SamplingParams, SpeculationParams, reference_tokens
from ultrafuser.decoding.speculation import DrafterKind
from ultrafuser.modeling.export import as_whole

SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)


def by_reference(fused: FusedModel, prompts: list[Any], params: list[SamplingParams]) -> Iterator[list[int]]:
    """Responses of the slow loop."""
    for prompt, settings in zip(prompts, params, strict=True):
        yield reference_tokens(fused.model, prompt, settings, use_cache=True)


def by_generate(fused: FusedModel, prompts: list[Any], params: list[SamplingParams]) -> Iterator[list[int]]:
    """Responses of the model's own `generate`."""
    for prompt, settings in zip(prompts, params, strict=True):
        length = max(map(len, prompt))
        pad = [[0] * (length - len(ids)) + list(ids) for ids in prompt]
        mask = [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompt]
        first = torch.tensor([prompt[0]])
        with torch.inference_mode():
            out = fused.model.generate(
                input_ids=first, attention_mask=torch.ones_like(first), specialist_input_ids=torch.tensor([pad]),
                specialist_attention_mask=torch.tensor([mask]), max_new_tokens=settings.max_new_tokens, do_sample=False,
            )  # fmt: skip
        yield out[0, first.shape[1] :].tolist()


def by_engine(
    fused: FusedModel, prompts: list[Any], params: list[SamplingParams], drafter: DrafterKind | None = None
) -> Iterator[list[int]]:
    """Responses of the engine."""
    speculation = None if drafter is None else SpeculationParams(drafter=drafter)
    decoder = FusedDecoder(*fused, max_batch=BATCHES[-1], speculation=speculation)
    answers = dict(decoder.respond(zip(prompts, params, strict=True)))
    for index in range(len(prompts)):
        yield [step.token_id for step in answers[index]]


def drafters(bank: str) -> tuple[DrafterKind, ...]:
    """Who can draft for a bank."""
    return ("int8", "lookup") if bank == "adapters" else ("int8", "specialist")


def responses(
    fused: FusedModel, bank: str, prompts: list[Any], max_new_tokens: int
) -> dict[str, list[list[int]]]:
    """Responses to some prompts, by way of decoding."""
    greedy = [SamplingParams(max_new_tokens=max_new_tokens)] * len(prompts)
    sampled = [replace(SAMPLED, max_new_tokens=max_new_tokens, seed=seed) for seed in range(len(prompts))]
    return {
        "reference": list(by_reference(fused, prompts, greedy)),
        "generate": list(by_generate(fused, prompts, greedy)),
        "engine": list(by_engine(fused, prompts, greedy)),
        **{f"+ {who}": list(by_engine(fused, prompts, greedy, who)) for who in drafters(bank)},
        "reference sampled": list(by_reference(fused, prompts, sampled)),
        "sampled": list(by_engine(fused, prompts, sampled)),
    }


def main(
    model: Annotated[str, typer.Argument(help="A fused model: a folder that train or demo made.")],
    work: Annotated[Path, typer.Option(help="JSONL file that keeps what is done.")],
    bank: Annotated[str, typer.Option(help="adapters, or whole to merge them first.")] = "adapters",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rows: Annotated[int, typer.Option(min=1, help="Questions of each domain.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = torch.get_num_threads(),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Count the responses that are the reference's."""
    torch.set_num_threads(threads)
    console = Console(width=None if Console().is_terminal else 100)
    fused = open_fused(model, getattr(torch, dtype))
    fused = as_whole(fused) if bank == "whole" else fused
    encoder = fused.model.conversation_encoder(fused.tokenizer)
    prompts = [prompt for domain in DOMAINS for prompt in questions(encoder, domain, rows)]
    size = BATCHES[-1]
    settings = {"model": model, "bank": bank, "dtype": dtype, "rows": rows, "max_new_tokens": max_new_tokens}
    if not work.exists():
        work.write_text(json.dumps(settings) + "\n")
    begun, *lines = work.read_text().splitlines()
    if json.loads(begun) != settings:
        raise typer.BadParameter(
            f"--work {work} is of a run with other settings: {begun}. Name another file."
        )
    done = [json.loads(line) for line in lines]
    for start in track(range(len(done) * size, len(prompts), size), "decoding"):
        found = responses(fused, bank, prompts[start : start + size], max_new_tokens)
        with work.open("a") as file:
            file.write(json.dumps(found) + "\n")
        done.append(found)
    table = Table(
        "way", "equal", "responses", "tokens", title=f"{bank}, {dtype}, {max_new_tokens} tokens at most"
    )
    metrics: dict[str, float] = {}
    for way in ("generate", "engine", *(f"+ {who}" for who in drafters(bank)), "sampled"):
        truth = "reference sampled" if way == "sampled" else "reference"
        pairs = [pair for block in done for pair in zip(block[way], block[truth], strict=True)]
        equal = sum(found == expected for found, expected in pairs)
        table.add_row(way, str(equal), str(len(pairs)), str(sum(len(expected) for _, expected in pairs)))
        metrics[f"equal/{way}"], metrics[f"responses/{way}"] = equal, len(pairs)
    console.print(table)
    if json_file is not None:
        write_metrics(json_file, metrics, provenance(**settings, threads=threads))


if __name__ == "__main__":
    typer.run(main)
