"""Fused models inside vLLM, against the native engine: in an environment of its own (`make test-vllm`)."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from conftest import randomise_gate, save_adapter, save_model, tiny_model

from ultrafuser import SpecialistSource, fuse, open_fused, save_fused
from ultrafuser.decoding.engine import FusedDecoder
from ultrafuser.decoding.sampling import SamplingParams as NativeParams
from ultrafuser.modeling.export import with_template

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

SHAPE = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 512}  # heads of 32
PROMPTS = [
    "Hello",
    "Below is an instruction that describes a task.",
    "User: Response: User:",
    "a b c d e f g " * 12,
]


def write(folder, tokenizer, kind, template="tokenizer"):
    """A fused model of two specialists in a folder, in a form that vLLM has to read."""
    root = folder / "parts"
    if kind.startswith("adapters"):
        base = tiny_model("qwen2" if "qwen2" in kind else "llama", seed=1, tied="tied" in kind, **SHAPE)
        at = save_model(root / "base", base, tokenizer)
        targets = "all-linear" if "all" in kind else ["q_proj", "v_proj", "down_proj"]
        adapters = [save_adapter(root / "a", base, seed=1, target_modules=targets), None]
        if "bare" not in kind:
            adapters[1] = save_adapter(root / "b", base, seed=2, r=6, target_modules=targets)
        places = [(at, adapter) for adapter in adapters]
    else:
        second = "qwen2" if "mixed" in kind else "llama"
        models = [tiny_model(seed=1, **SHAPE), tiny_model(second, seed=2, tied=True, **SHAPE)]
        # Qwen's tokenizer class adds a token of its own: so only the first model has a tokenizer.
        tokenizers = [tokenizer, None if "mixed" in kind else tokenizer]
        folders = [root / "0", root / "1"]
        places = [(save_model(*place), None) for place in zip(folders, models, tokenizers, strict=True)]
    sources = {
        name: SpecialistSource(model=model, adapter=adapter, template=template)
        for name, (model, adapter) in zip(("train", "b-2"), places, strict=True)  # awkward names
    }
    fused = fuse(sources, gate_size=16, gate_form="joint" if "mixed" in kind else "shared")
    randomise_gate(fused.model.gate)
    save_fused(fused, folder / "fused", gate_only="gate-only" in kind)
    return str(folder / "fused")


def native(folder, prompts, max_new_tokens, **options):
    """Token ids and log-probabilities of greedy responses by the native engine."""
    fused = open_fused(folder, torch.float32)
    decoder = FusedDecoder(*fused, max_batch=len(prompts))
    params = NativeParams(max_new_tokens=max_new_tokens, logprobs=0, **options)
    count = fused.model.num_specialists
    ids = [decoder.submit([fused.tokenizer(prompt)["input_ids"]] * count, params) for prompt in prompts]
    tokens = {number: [] for number in ids}
    while decoder.num_active or decoder.num_waiting:
        for number, step in decoder.step():
            tokens[number].append((step.token_id, step.logprob))
    return [tokens[number] for number in ids]


@contextmanager
def offline(folder, **options):
    """vLLM over a folder, in this process's children."""
    settings = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "seed": 0, **options}
    llm = vllm.LLM(folder, kv_cache_memory_bytes=2**27, **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def answers(llm, prompts, **settings):
    outputs = llm.generate(prompts, vllm.SamplingParams(temperature=0, **settings), use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def greedy(llm, prompts, max_tokens=24):
    found = []
    for output in answers(llm, prompts, max_tokens=max_tokens, logprobs=0):
        logprobs = [steps[t].logprob for t, steps in zip(output.token_ids, output.logprobs, strict=True)]
        found.append(list(zip(output.token_ids, logprobs, strict=True)))
    return found


def assert_equal(found, expected):
    """Equal tokens, and log-probabilities nearer than anything computed in 16 bits, or left out, would bring them."""
    for ours, theirs in zip(found, expected, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in theirs]
        torch.testing.assert_close(
            torch.tensor([p for _, p in ours]), torch.tensor([p for _, p in theirs]), rtol=0, atol=1e-3
        )


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")


KINDS = [
    "whole",
    "whole, mixed",
    "whole, gate-only",
    "adapters, all",
    "adapters, tied, bare, gate-only",
    "adapters, qwen2",
]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_and_their_probabilities_are_the_native_engines(kind, tmp_path, tokenizer):
    folder = write(tmp_path, tokenizer, kind)
    expected = native(folder, PROMPTS, 24)
    with offline(folder, block_size=32) as llm:
        assert_equal(greedy(llm, PROMPTS), expected)
        again = llm.generate(PROMPTS[-1:], vllm.SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
        assert again[0].num_cached_tokens > 0
        assert list(again[0].outputs[0].token_ids) == [token for token, _ in expected[-1]]


def test_adapters_run_as_whole_specialists_when_told_to(tmp_path, tokenizer):
    folder = write(tmp_path, tokenizer, "adapters, all")
    with offline(folder, hf_overrides={"bank": "whole"}) as llm:
        assert_equal(greedy(llm, PROMPTS), native(folder, PROMPTS, 24))


@pytest.mark.parametrize("kind", ["whole", "adapters, all"])
def test_long_prompts_in_chunks_and_drafts_from_the_context_change_nothing(kind, tmp_path, tokenizer):
    folder = write(tmp_path, tokenizer, kind)
    expected = native(folder, PROMPTS, 24)
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with offline(folder, max_num_batched_tokens=48, max_num_seqs=4, speculative_config=drafts) as llm:
        assert_equal(greedy(llm, PROMPTS), expected)


def test_both_banks_split_over_two_processes(tmp_path, tokenizer, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")
    for kind in ("whole", "adapters, all"):
        folder = write(tmp_path / kind, tokenizer, kind)
        with offline(folder, tensor_parallel_size=2) as llm:
            assert_equal(greedy(llm, PROMPTS), native(folder, PROMPTS, 24))


def test_specialists_with_different_templates_are_refused_and_the_way_out_works(tmp_path, tokenizer):
    folder = write(tmp_path, tokenizer, "whole")
    fused = open_fused(folder)
    fused.model.config.specialists[0]["template"] = "{{ messages }}"
    fused.model.save_pretrained(folder)
    way_out = r"2 different chat templates.*export MODEL -o DIR --template"
    with pytest.raises(ValueError, match=way_out), offline(folder):
        pass
    save_fused(with_template(fused, "alpaca"), tmp_path / "one")
    with offline(str(tmp_path / "one"), dtype="bfloat16") as llm:
        sampling = vllm.SamplingParams(temperature=0, max_tokens=3)
        (output,) = llm.chat([{"role": "user", "content": "Hello"}], sampling, use_tqdm=False)
    assert "### Instruction:" in output.prompt


@pytest.fixture(scope="module")
def served(tmp_path_factory, tokenizer):
    """`ultrafuser serve --engine vllm` on loopback, and the folder that it serves."""
    folder = write(tmp_path_factory.mktemp("served"), tokenizer, "adapters, all")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [
        "--engine",
        "vllm",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--name",
        "tiny",
        "--api-key",
        "k",
    ]
    of_vllm = ["--max-model-len", "256", "--enforce-eager", "--kv-cache-memory-bytes", str(2**27)]
    ultrafuser = Path(sys.executable).with_name("ultrafuser")
    command = [ultrafuser, "serve", folder, *options, "--", *of_vllm]
    log = (Path(folder) / "log").open("w+")
    process = subprocess.Popen(
        command, stdout=log, stderr=log, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            time.sleep(0.2)
            assert process.poll() is None, Path(log.name).read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            except httpx.TransportError:
                continue
        yield folder, url
    finally:
        process.terminate()
        process.wait(60)


def test_the_http_server_answers_openais_client(served):
    folder, url = served
    assert httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "Hello"}).status_code == 401
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60)
    assert [model.id for model in client.models.list()] == ["tiny"]
    fused = open_fused(folder, torch.float32)
    decode = fused.tokenizer.decode
    expected = [token for token, _ in native(folder, ["Hello"], 16)[0]]
    asked = {"model": "tiny", "prompt": "Hello", "max_tokens": 16, "temperature": 0}
    plain = client.completions.create(**asked, logprobs=2)
    assert plain.choices[0].text == decode(expected, skip_special_tokens=True)
    assert len(plain.choices[0].logprobs.token_logprobs) == plain.usage.completion_tokens == len(expected)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True))
    assert streamed == plain.choices[0].text
    stop = plain.choices[0].text[3:5]
    assert client.completions.create(**asked, stop=stop).choices[0].text == streamed[: streamed.index(stop)]
    several = client.completions.create(**{**asked, "temperature": 1.0}, n=3, seed=1)
    assert len({choice.text for choice in several.choices}) == 3
    again = client.completions.create(**{**asked, "temperature": 1.0}, n=3, seed=1)
    assert [c.text for c in again.choices] == [c.text for c in several.choices]


def test_the_http_server_answers_conversations_in_a_schema(served):
    _, url = served
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=60)
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=40,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    text = answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop", text
    assert isinstance(json.loads(text)["ok"], bool)
