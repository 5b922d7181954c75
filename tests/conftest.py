"""Fixtures and builders that several test folders share; everything is built on the spot, without a network."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ultrafuser.fusion import Gate

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens with BOS, EOS, padding and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = ["Below is an instruction that describes a task. User: Assistant: Response: [INST] [/INST]"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},  # biases on q, k and v
    "gpt_neox": {"hidden_size": 48, "intermediate_size": 64},  # LayerNorm with biases, another width
    "gpt2": {"n_embd": 40, "n_layer": 2, "n_head": 4, "n_positions": 256},  # no nn.Linear but the head
    "cohere": {"num_key_value_heads": 2, "logit_scale": 0.25},
    "phi": {},  # a head with a bias
}


def tiny_model(
    architecture: str = "llama", *, seed: int = 0, tied: bool = False, vocab_size: int = 320, **settings: Any
) -> PreTrainedModel:
    """A random two-layer float32 model whose logits are of size 1 to 10, in evaluation mode."""
    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    given = {**({} if architecture == "gpt2" else common), **ARCHITECTURES.get(architecture, {}), **settings}
    config = CONFIG_MAPPING[architecture](
        vocab_size=vocab_size, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=3, pad_token_id=0, **given
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:  # norms stay near 1, biases near 0
                parameter.copy_(0.2 * noise + ("norm" in name or "ln_" in name) * ("weight" in name))
    return model.eval()


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> str:
    """Write a model folder as a user would have it."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: PreTrainedModel, *, seed: int = 0, **lora: Any) -> str:
    """Write a LoRA adapter folder with PEFT itself; B is not zero, so the adapter changes the logits."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **lora}
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


def randomise_gate(gate: Gate, seed: int = 0) -> Gate:
    """Give a gate random weights that make a difference, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return gate
