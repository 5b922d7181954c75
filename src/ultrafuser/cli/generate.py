"""`ultrafuser generate`: prompts in, responses out, as JSON lines."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrafuser.cli.opening import (
    DeviceOption,
    DraftModelOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    SpeculateOption,
    open_decoder,
    open_model,
    whether_to_speculate,
)
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import UltrafuserError, located
from ultrafuser.files import atomic_write
from ultrafuser.progress import ProgressBar

if TYPE_CHECKING:
    from ultrafuser.decoding.engine import FusedDecoder, TokenStep
    from ultrafuser.decoding.sampling import SamplingParams
    from ultrafuser.modeling.assembly import FusedModel
    from ultrafuser.training.data import Prompt

MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=0, help="Tokens of a response at most.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, help="0 takes the likeliest token; more samples.")
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0,
        max=1,
        help="Sample among the likeliest tokens that reach this probability together.",
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample among this many of the likeliest tokens; 0: among all.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed gives the same samples.")]
SystemOption = Annotated[
    str | None,
    typer.Option("--system", help="System message for conversations without one.", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="generate")(generate)


def generate(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="What to answer.")] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSON lines with messages, instruction (and input) or prompt; answers in them are left out.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="JSON lines out.", show_default="standard output"
        ),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    min_p: Annotated[
        float,
        typer.Option(
            "--min-p",
            min=0,
            max=1,
            help="Leave out tokens below this share of the likeliest one's probability.",
        ),
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1, tokens already there become less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End a response before this text.")
    ] = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered together.")] = 8,
    speculate: SpeculateOption = None,
    draft_model: DraftModelOption = None,
    system: SystemOption = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Add the text and the gate weights of every token.")
    ] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    json_file: JsonOption = None,
) -> None:
    """Answer one prompt, or a file of them, with a fused model.

    Writes a JSON object a line: index, id (if the row had one), response, tokens (how many, the end token
    included) and finish (end, length or stop); with --weights also specialists, token_texts and gate_weights.
    Sampling, prompt number i (from 0) has the seed --seed + i.

    Example: ultrafuser generate MODEL "What is 7 * 8?" --max-new-tokens 100
    """
    from ultrafuser.decoding.sampling import SamplingParams

    speculates = whether_to_speculate(speculate, draft_model, temperature)
    prompts = _prompts(prompt, input_file, system)
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(stop) if stop is not None else (),
        seed=seed,
    )
    fused = open_model(model, dtype, device)
    requests = _requests(fused, prompts, params)
    decoder = open_decoder(fused, batch_size, speculates, draft_model)
    started = time.perf_counter()
    rows = _answer_all(fused, decoder, prompts, requests, weights)
    seconds = time.perf_counter() - started
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if output is None:
        sys.stdout.write(lines)
    else:
        with atomic_write(output) as temporary:
            temporary.write_text(lines, encoding="utf-8")
    if json_file is not None:
        num_tokens = sum(row["tokens"] for row in rows)
        metrics = {
            "num_prompts": len(rows),
            "num_tokens": num_tokens,
            "time_s": seconds,
            "tokens_per_s": num_tokens / seconds,
        }
        write_metrics(json_file, metrics, provenance(model=model, seed=seed, dtype=str(fused.model.dtype)))


def _prompts(prompt: str | None, input_file: Path | None, system: str | None) -> "list[Prompt]":
    from ultrafuser.training.data import Prompt, read_prompts

    if (prompt is None) == (input_file is None):
        got = "neither" if prompt is None else "both"
        raise UltrafuserError(f"generate needs one of PROMPT and --input FILE, got {got}.")
    if input_file is not None:
        prompts = read_prompts(input_file)
    else:
        assert prompt is not None
        if not prompt.strip():
            raise UltrafuserError("PROMPT must not be empty. Give a question.")
        prompts = [Prompt([{"role": "user", "content": prompt}], None, "the prompt")]
    if system is None:
        return prompts
    opening = {"role": "system", "content": system}
    return [
        asked
        if asked.messages[0]["role"] == "system"
        else Prompt([opening, *asked.messages], asked.id, asked.where)
        for asked in prompts
    ]


def _requests(
    fused: "FusedModel", prompts: "Sequence[Prompt]", params: "SamplingParams"
) -> "list[tuple[Sequence[Sequence[int]], SamplingParams]]":
    """What the engine is asked; a prompt that cannot be read is refused before the first is answered."""
    encoder = fused.model.conversation_encoder(fused.tokenizer)
    requests: list[tuple[Sequence[Sequence[int]], SamplingParams]] = []
    for index, asked in enumerate(prompts):
        with located(asked.where):
            ids = encoder.prompt(asked.messages, max_new_tokens=params.max_new_tokens)
        requests.append((ids, replace(params, seed=params.seed + index)))
    return requests


def _answer_all(
    fused: "FusedModel",
    decoder: "FusedDecoder",
    prompts: "Sequence[Prompt]",
    requests: "Sequence[tuple[Sequence[Sequence[int]], SamplingParams]]",
    weights: bool,
) -> list[dict[str, Any]]:
    rows: dict[int, dict[str, Any]] = {}
    with ProgressBar("Answering") as bar:
        for index, steps in decoder.respond(requests):
            named = {} if prompts[index].id is None else {"id": prompts[index].id}
            rows[index] = {"index": index, **named, **_row(fused, steps, weights)}
            bar.update(len(rows), len(prompts))
    return [rows[index] for index in range(len(prompts))]


def _row(fused: "FusedModel", steps: "Sequence[TokenStep]", weights: bool) -> dict[str, Any]:
    from ultrafuser.decoding.text import token_texts

    row: dict[str, Any] = {
        "response": "".join(step.text for step in steps),
        "tokens": len(steps),
        "finish": steps[-1].finish if steps else "length",
    }
    if weights:
        row["specialists"] = list(fused.model.specialist_names)
        row["token_texts"] = token_texts(fused.tokenizer, [step.token_id for step in steps])
        row["gate_weights"] = [[round(weight, 6) for weight in step.gate_weights] for step in steps]
    return row
