"""Fixtures and builders that several test folders share; everything is built on the spot, without a network."""

import copy
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ultrafuser.fusion import Gate
from ultrafuser.fusion.gate import GateForm
from ultrafuser.modeling.assembly import FusedModel, SpecialistSource, fuse
from ultrafuser.modeling.configuration import SpecialistConfig, UltraFuserConfig
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, SpecialistBank

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
        vocab_size=vocab_size,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=3,
        pad_token_id=0,
        **given,
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
    from peft import LoraConfig, get_peft_model  # slow to import, and few tests need it

    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
        **lora,
    }
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


def random_adapter(base: PreTrainedModel, *, seed: int = 0, **lora: Any) -> Adapter:
    """An adapter in memory that changes the logits; of a base that has not been folded yet."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
    adapter = Adapter.initial(base, config, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in adapter.weights.items()
    }
    return Adapter(config, weights)


def randomise_gate(gate: Gate, seed: int = 0) -> Gate:
    """Give a gate random weights that make a difference, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in gate.parameters():
            scale = 1.5 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return gate


def fused_over(
    bank: SpecialistBank, *, gate_form: GateForm = "shared", trained: bool = True
) -> UltraFuserForCausalLM:
    """A fused model over specialists in memory; its gate is random, or as it starts."""
    config = UltraFuserConfig(
        specialists=[
            SpecialistConfig(name=name, model_config=architecture.to_dict())
            for name, architecture in zip(bank.names, bank.architectures(), strict=True)
        ],
        bank="adapters" if isinstance(bank, AdapterSpecialists) else "whole",
        gate_form=gate_form,
        gate_size=16,
        end_token_id=3,
        pad_token_id=0,
        bos_token_id=1,
    )
    model = UltraFuserForCausalLM(config, bank).eval()
    if trained:
        randomise_gate(model.gate)
    return model


def favour(model: UltraFuserForCausalLM, index: int) -> None:
    """Saturate a per_specialist or joint gate, so that its weights are exactly one-hot."""
    with torch.no_grad():
        for position, network in enumerate(model.gate.networks):
            network[2].weight.zero_()
            network[2].bias.fill_(200.0 if position == index else 0.0)
            if model.gate.form == "joint":
                network[2].bias.copy_(200.0 * torch.eye(model.num_specialists)[index])


TOY_ALPHABETS = {"letters": "abcd ", "digits": "0123,"}


@dataclass(frozen=True)
class Toys:
    """Two whole specialists, each good at one of two toy domains, a base with two adapters, and the data.

    Attributes:
        folder: `letters` and `digits` (models), `base`, `base-letters` and `base-digits` (adapters on it),
            and `<domain>.train.jsonl`, `<domain>.heldout.jsonl`.
    """

    folder: Path

    def sources(self, bank: str = "whole") -> dict[str, dict[str, str]]:
        """The specialists of a recipe."""
        if bank == "whole":
            return {name: {"model": str(self.folder / name)} for name in TOY_ALPHABETS}
        base = str(self.folder / "base")
        return {n: {"model": base, "adapter": str(self.folder / f"base-{n}")} for n in TOY_ALPHABETS}

    def files(self, part: str = "train") -> dict[str, str]:
        """Domain -> file."""
        return {name: str(self.folder / f"{name}.{part}.jsonl") for name in TOY_ALPHABETS}

    def recipe(self, bank: str = "whole", **settings: Any) -> dict[str, Any]:
        """A fusion recipe of a few quick steps in float32; `settings` replace whole sections."""
        stage = {"examples_per_domain": 4, "log_every": 1}
        mode = "full" if bank == "whole" else "lora"
        return {
            "specialists": self.sources(bank),
            "data": self.files(),
            "heldout": self.files("heldout"),
            "gate": {"size": 16},
            "dtype": "float32",
            "stage1": {"steps": 6, "learning_rate": 1e-2, **stage},
            "stage2": {"steps": 4, "learning_rate": 1e-3, "train": mode, **stage},
            **settings,
        }

    def fused(self, bank: str = "whole", **options: Any) -> FusedModel:
        """The specialists under a fresh gate, in float32."""
        sources = {name: SpecialistSource(**source) for name, source in self.sources(bank).items()}
        torch.manual_seed(0)  # the gate's start
        return fuse(sources, gate_size=16, dtype=torch.float32, **options)

    def write_recipe(self, path: Path, bank: str = "whole", **settings: Any) -> str:
        """Write `recipe` as YAML."""
        path.write_text(yaml.safe_dump(self.recipe(bank, **settings), sort_keys=False))
        return str(path)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Toys:
    folder = tmp_path_factory.mktemp("toys")
    base = tiny_model("llama", seed=9)
    save_model(folder / "base", base, tokenizer)
    for seed, (name, alphabet) in enumerate(TOY_ALPHABETS.items(), start=1):
        choice = random.Random(seed)
        answers = ["".join(choice.choices(alphabet, k=choice.randint(4, 16))) for _ in range(16)]
        rows = [{"messages": _exchange(f"{name} {number}?", answer)} for number, answer in enumerate(answers)]
        for part, chosen in (("train", rows[:12]), ("heldout", rows[12:])):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (folder / f"{name}.{part}.jsonl").write_text(text)
        model = tiny_model("llama", seed=seed)
        _learn(model, tokenizer, [row["messages"] for row in rows[:12]])
        save_model(folder / name, model, tokenizer)
        save_adapter(folder / f"base-{name}", base, seed=seed)
    return Toys(folder)


def _exchange(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: list[Any]) -> None:
    """Fit a model to a handful of conversations."""
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(25):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def chi_square(counts: Counter, probabilities: dict[tuple[int, ...], float]) -> tuple[float, float]:
    """Pearson's statistic, and what it stays below in all but one of 100,000 cases.

    Outcomes expected fewer than 5 times are one; the bound is Wilson and Hilferty's (1931), 4.265 being the normal
    quantile.
    """
    total = counts.total()
    likely = {key: total * p for key, p in probabilities.items() if total * p >= 5}
    rest = total - sum(likely.values())
    statistic = sum((counts[key] - mean) ** 2 / mean for key, mean in likely.items())
    statistic += (total - sum(counts[key] for key in likely) - rest) ** 2 / max(rest, 5)
    freedom = len(likely)  # cells, the rest among them, less one
    spread = 2 / (9 * freedom)
    return statistic, freedom * (1 - spread + 4.265 * math.sqrt(spread)) ** 3
