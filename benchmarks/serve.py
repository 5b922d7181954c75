"""A fused model behind vLLM against one specialist behind vLLM, over HTTP, at several numbers of clients.

Three servers run side by side on loopback and are asked in turns, so that whatever else the machine does meets all of
them alike:

    one       the first specialist as a plain model
    adapters  the specialists as adapters over one base (for models of adapters)
    whole     the specialists as whole models, adapters merged

Each client asks questions of the demo's held-out conversations one after the other and wants just `--max-new-tokens`
tokens for each, with its end token ignored, so all servers do the same work. Beside that, `--exact` asks every server
of fused specialists greedy questions and compares their tokens with the native engine's.

It runs in the environment of `make vllm`:

    .venv-vllm/bin/python benchmarks/serve.py runs/demo --dtype bfloat16
    .venv-vllm/bin/python benchmarks/serve.py runs/demo --dtype float32 --exact 30 --clients 1
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from conversations import first_questions
from loopback import free_port, wait_until_it_answers
from openai import AsyncOpenAI, OpenAI
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ultrafuser import FusedModel, open_fused
from ultrafuser.cli.report import provenance, write_metrics
from ultrafuser.decoding.engine import FusedDecoder, TokenStep
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.modeling.export import export
from ultrafuser.modeling.specialists import AdapterSpecialists

CLIENTS = [1, 8, 32]
START_S = 900.0
"""Seconds that a server may take to start; the first one compiles."""


def questions(count: int) -> list[str]:
    """So many, again from the first on where there are not enough."""
    return list(islice(cycle(first_questions()), count))


@contextmanager
def server(model: str, dtype: str, log: Path, options: Sequence[str]) -> Iterator[str]:
    """`vllm serve` on a free port of loopback; gives its address."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", "m", "--dtype", dtype, "--max-model-len", "1024"]
    command += ["--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(2**30), *options]
    with log.open("w") as out:
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_it_answers(f"{url}/health", START_S, process, log)
        yield f"{url}/v1"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def throughput(url: str, clients: int, each: int, max_new_tokens: int) -> float:
    """Generated tokens a second, with so many clients that ask so many questions each."""

    async def client(api: AsyncOpenAI, asked: Sequence[str]) -> int:
        tokens = 0
        for question in asked:
            answer = await api.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=max_new_tokens,
                extra_body={"ignore_eos": True},
            )
            if answer.usage is None or answer.usage.completion_tokens != max_new_tokens:
                raise RuntimeError(f"{max_new_tokens} tokens were wanted, {answer.usage} came")
            tokens += answer.usage.completion_tokens
        return tokens

    async def everybody() -> float:
        asked = questions(clients * each)
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as api:
            start = time.perf_counter()
            counts = await asyncio.gather(*(client(api, asked[i::clients]) for i in range(clients)))
            return sum(counts) / (time.perf_counter() - start)

    return asyncio.run(everybody())


def native_steps(fused: FusedModel, asked: Sequence[str], max_new_tokens: int) -> list[list[TokenStep]]:
    """The native engine's greedy responses, each by itself."""
    encoder = fused.model.conversation_encoder(fused.tokenizer)
    params = SamplingParams(max_new_tokens=max_new_tokens, logprobs=0)
    responses = []
    for question in track(asked, "native engine"):
        decoder = FusedDecoder(*fused, max_batch=1)
        prompt = encoder.prompt([{"role": "user", "content": question}])
        responses.append([step for _, steps in decoder.respond([(prompt, params)]) for step in steps])
    return responses


def compare(url: str, asked: Sequence[str], expected: list[list[TokenStep]], limit: int) -> tuple[int, float]:
    """Responses of equal tokens, and the largest difference of a log-probability before tokens differ."""
    api = OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    equal, difference = 0, 0.0
    for question, steps in zip(track(asked, "vLLM"), expected, strict=True):
        answer: Any = api.chat.completions.create(
            model="m", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=limit,
            logprobs=True, extra_body={"return_token_ids": True},
        ).choices[0]  # fmt: skip
        tokens = list(answer.token_ids)
        equal += tokens == [step.token_id for step in steps]
        for token, entry, step in zip(tokens, answer.logprobs.content, steps, strict=False):
            if token != step.token_id or step.logprob is None:
                break
            difference = max(difference, abs(entry.logprob - step.logprob))
    return equal, difference


def main(
    model: Annotated[str, typer.Argument(help="A fused model whose specialists read one chat template.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "bfloat16",
    clients: Annotated[list[int], typer.Option(min=1, help="Clients at once.")] = CLIENTS,
    each: Annotated[int, typer.Option(min=1, help="Questions that a client asks in a round.")] = 2,
    rounds: Annotated[
        int,
        typer.Option(
            min=1,
            help="A multiple of three, so that each server comes first equally often; one more does not count.",
        ),
    ] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    exact: Annotated[int, typer.Option(min=0, help="Questions to compare with the native engine.")] = 0,
    eager: Annotated[bool, typer.Option("--eager", help="Without torch.compile.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write metrics and provenance.")] = None,
) -> None:
    """Compare the throughput of fused specialists with one specialist's."""
    console = Console(width=None if Console().is_terminal else 110)
    options = ["--enforce-eager"] if eager else []
    fused = open_fused(model, getattr(torch, dtype))
    metrics: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        root = Path(scratch)
        export(fused, root / "one", "specialist", fused.model.specialist_names[0])
        whole = ["--hf-overrides", json.dumps({"bank": "whole"})]
        planned = {"one": (str(root / "one"), []), "whole": (model, whole)}
        if isinstance(fused.model.bank, AdapterSpecialists):
            planned["adapters"] = (model, [])
        urls = {}
        for name, (folder, more) in planned.items():
            with console.status(f"starting {name}"):
                log = root / f"{name}.log"
                urls[name] = running.enter_context(server(folder, dtype, log, [*options, *more]))
        if exact:
            asked = questions(exact)
            expected = native_steps(fused, asked, max_new_tokens)
            for name in planned.keys() - {"one"}:
                equal, difference = compare(urls[name], asked, expected, max_new_tokens)
                metrics |= {f"equal/{name}": equal, f"responses/{name}": exact}
                metrics[f"logprob_difference/{name}"] = difference
                console.print(
                    f"{name}: {equal} of {exact} responses equal, log-probabilities within {difference:.1e}"
                )
        table = Table("server", "clients", "tokens/s", "over one", "from", "to")
        for count in clients:
            found: dict[str, list[float]] = {name: [] for name in planned}
            for index in track(range(rounds + 1), f"{count} clients"):
                names = list(planned)
                for name in names[index % len(names) :] + names[: index % len(names)]:  # none is always first
                    tokens_per_s = throughput(urls[name], count, each, max_new_tokens)
                    if index:
                        found[name].append(tokens_per_s)
            for name, values in found.items():
                ratios = [a / b for a, b in zip(values, found["one"], strict=True)]
                spread = [f"{ratio:.2f}" for ratio in (median(ratios), min(ratios), max(ratios))]
                table.add_row(name, str(count), f"{median(values):.1f}", *spread)
                metrics[f"tokens_per_s/{name}/clients{count}"] = median(values)
                if name != "one":
                    metrics[f"throughput_ratio/{name}/clients{count}"] = median(ratios)
                    metrics[f"throughput_ratio_min/{name}/clients{count}"] = min(ratios)
                    metrics[f"throughput_ratio_max/{name}/clients{count}"] = max(ratios)
        console.print(table)
    if json_file is not None:
        settings = {"model": model, "dtype": dtype, "each": each, "rounds": rounds, "eager": eager,
                    "max_new_tokens": max_new_tokens}  # fmt: skip
        write_metrics(json_file, metrics, provenance(**settings))


if __name__ == "__main__":
    typer.run(main)
