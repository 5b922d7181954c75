"""`ultrafuser generate`: prompts in, responses out, as JSON lines."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultrafuser.cli.opening import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    open_model,
)
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.errors import TemplateError, UltrafuserError
from ultrafuser.files import atomic_write
from ultrafuser.progress import ProgressBar

if TYPE_CHECKING:
    from ultrafuser.modeling.assembly import FusedModel
    from ultrafuser.modeling.templates import ConversationEncoder
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


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; see `ultrafuser.decoding.stream.stream_tokens`."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def for_generate(self) -> dict[str, Any]:
        """The same for `generate` of the model (without the seed, which is torch's)."""
        if self.temperature == 0:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


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
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts answered together.")] = 8,
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
    included) and finish (end or length); with --weights also specialists, token_texts and gate_weights.

    Example: ultrafuser generate MODEL "What is 7 * 8?" --max-new-tokens 100
    """
    prompts = _prompts(prompt, input_file, system)
    fused = open_model(model, dtype, device)
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    started = time.perf_counter()
    rows = _answer_all(fused, prompts, sampling, batch_size, weights)
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


def _answer_all(
    fused: "FusedModel", prompts: "Sequence[Prompt]", sampling: Sampling, batch_size: int, weights: bool
) -> list[dict[str, Any]]:
    import torch

    encoder = fused.model.conversation_encoder(fused.tokenizer)
    for asked in prompts:  # refused before the first is answered, not hours later
        try:
            encoder.prompt(asked.messages, max_new_tokens=sampling.max_new_tokens)
        except TemplateError as error:
            raise TemplateError(f"{asked.where}: {error}") from error
    torch.manual_seed(sampling.seed)
    rows: list[dict[str, Any]] = []
    with ProgressBar("Answering") as bar:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            for asked, answer in zip(batch, _answer(fused, encoder, batch, sampling, weights), strict=True):
                named = {} if asked.id is None else {"id": asked.id}
                rows.append({"index": len(rows), **named, **answer})
            bar.update(len(rows), len(prompts))
    return rows


def _answer(
    fused: "FusedModel",
    encoder: "ConversationEncoder",
    batch: "Sequence[Prompt]",
    sampling: Sampling,
    weights: bool,
) -> Iterator[dict[str, Any]]:
    """The answers to one batch of prompts, in order."""
    import torch

    model = fused.model
    inputs = encoder.batch_prompts(
        [asked.messages for asked in batch], max_new_tokens=sampling.max_new_tokens
    )
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    with torch.inference_mode():
        if sampling.max_new_tokens == 0:
            generated = inputs["input_ids"][:, :0]
        else:
            sequences = model.generate(**inputs, **sampling.for_generate())
            generated = sequences[:, inputs["input_ids"].shape[1] :]
        gate_weights = _gate_weights(fused, inputs, generated) if weights else None
    for index, ids in enumerate(generated.tolist()):
        ended = encoder.end_token_id in ids
        length = ids.index(encoder.end_token_id) + 1 if ended else len(ids)
        answer: dict[str, Any] = {
            "response": encoder.decode(ids),
            "tokens": length,
            "finish": "end" if ended else "length",
        }
        if gate_weights is not None:
            answer |= _weights_of(fused, ids[:length], gate_weights[index, :length].tolist())
        yield answer


def _gate_weights(fused: "FusedModel", inputs: dict[str, Any], generated: Any) -> Any:
    """Gate weights, (B, R, N), of tokens that were generated: `generate` does not hand them out."""
    import torch

    model = fused.model
    prompt = inputs["specialist_input_ids"]
    batch_size, num_specialists, prompt_length = prompt.shape
    num_tokens = generated.shape[1]
    if num_tokens == 0:
        return torch.zeros(batch_size, 0, num_specialists)
    read = generated[:, None, :-1].expand(-1, num_specialists, -1)
    positions = torch.arange(prompt_length - 1, prompt_length - 1 + num_tokens, device=prompt.device)
    states = model.hidden_states(
        torch.cat([prompt, read], dim=-1),
        torch.cat([inputs["specialist_attention_mask"], torch.ones_like(read)], dim=-1),
        positions.expand(batch_size, num_specialists, -1),
    )
    return model.gate(states)


def _weights_of(fused: "FusedModel", ids: list[int], gate_weights: list[list[float]]) -> dict[str, Any]:
    from ultrafuser.decoding.stream import token_texts

    return {
        "specialists": list(fused.model.specialist_names),
        "token_texts": token_texts(fused.tokenizer, ids),
        "gate_weights": [[round(weight, 6) for weight in weights] for weights in gate_weights],
    }
