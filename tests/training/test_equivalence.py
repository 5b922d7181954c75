"""Trainings that have to come out the same: against plain loops, however a step is cut, on two processes."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import save_adapter
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from ultrafuser.modeling.checkpoint import open_fused
from ultrafuser.training.data import BalancedBatchSampler, MicroBatchSampler, load_domain_conversations
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe, Stage1, Stage2, read_recipe
from ultrafuser.training.run import encoder_for, specialize, train
from ultrafuser.training.stages import encode_data, fresh_adapter, run_stage1, run_stage2

STEPS, PER_DOMAIN, RATE = 4, 4, 1e-2
STAGE = {"steps": STEPS, "examples_per_domain": PER_DOMAIN, "learning_rate": RATE, "log_every": 1}


def encoded(fused, toys):
    files = {domain: [file] for domain, file in toys.files().items()}
    return encode_data(encoder_for(fused), load_domain_conversations(files), "error")


def rows_of(data, balanced=True):
    """The batches that a training sees, uncut."""
    sampler = BalancedBatchSampler(
        data.domain_sizes, examples_per_domain=PER_DOMAIN, num_batches=STEPS, balanced=balanced
    )
    return [[data.conversations[row] for row in batch] for batch in sampler]


def plain_loop(parameters, batches, loss_of):
    """What the trainer has to amount to: AdamW, cosine schedule, clipped gradients."""
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, STEPS)
    losses = {}
    for step, batch in enumerate(batches, start=1):
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[step] = loss.item()
    return losses


def flat(gate):
    """All that has a say: the last bias adds the same to every score, so its gradient is rounding noise."""
    return torch.cat([p.detach().flatten() for p in list(gate.parameters())[:-1]])


def plain_stage1(toys, balanced=True):
    fused = toys.fused()
    encoder, data = encoder_for(fused), encoded(fused, toys)
    fused.model.bank.requires_grad_(False)

    def loss_of(rows):
        batch = encoder.collate(rows)
        labels = batch.pop("labels")
        return F.cross_entropy(fused.model(**batch).logits.flatten(0, 1), labels.flatten())

    losses = plain_loop(list(fused.model.gate.parameters()), rows_of(data, balanced), loss_of)
    return losses, flat(fused.model.gate)


@pytest.fixture(scope="module")
def plain(toys):
    return plain_stage1(toys)


def trained_stage1(toys, folder, **settings):
    fused = toys.fused()
    chosen = Stage1(**{**STAGE, **settings})
    result = run_stage1(fused.model, encoder_for(fused), encoded(fused, toys), chosen, folder, seed=0)
    return dict(result.losses), flat(fused.model.gate)


@pytest.mark.parametrize(
    "settings", [{}, {"examples_per_pass": 1}, {"examples_per_pass": 2, "cache_states": True}], ids=str
)
def test_stage1_is_the_plain_loop(toys, tmp_path, plain, settings):
    losses, gate = trained_stage1(toys, tmp_path, **settings)
    assert losses == pytest.approx(plain[0], abs=1e-5)
    torch.testing.assert_close(gate, plain[1], rtol=0, atol=1e-5)


def test_unbalanced_stage1_is_the_plain_loop(toys, tmp_path, plain):
    expected = plain_stage1(toys, balanced=False)
    losses, gate = trained_stage1(toys, tmp_path, balanced=False, examples_per_pass=2)
    assert losses == pytest.approx(expected[0], abs=1e-5)
    torch.testing.assert_close(gate, expected[1], rtol=0, atol=1e-5)
    assert losses != pytest.approx(plain[0], abs=1e-3)


def test_processes_share_every_batch():
    batches = BalancedBatchSampler({"a": 5, "b": 11}, examples_per_domain=8, num_batches=3)
    lengths = [row * 7 % 13 for row in range(16)]
    cut = MicroBatchSampler(batches, num_parts=4, lengths=lengths)  # two processes, two passes each
    shards = [list(BatchSamplerShard(cut, num_processes=2, process_index=p)) for p in range(2)]
    assert [len(shard) for shard in shards] == [6, 6]
    for step, batch in enumerate(batches):
        seen = [part for shard in shards for part in shard[2 * step : 2 * step + 2]]
        assert sorted(row for part in seen for row in part) == sorted(batch)
        assert all(sum(row < 5 for row in part) == len(part) / 2 for part in seen)


def test_two_processes_train_what_one_does(toys, tmp_path):
    recipe = toys.write_recipe(
        tmp_path / "recipe.yaml",
        stage1={**STAGE, "examples_per_pass": 1, "cache_states": True},
        stage2={**STAGE, "learning_rate": 1e-3},
    )
    (tmp_path / "command.py").write_text("from ultrafuser.cli import main\nmain()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [str(tmp_path / "command.py"), "train", recipe, "-o", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*launch, *command], stdout=subprocess.PIPE, text=True, env=environment) as two:
        one = train(read_recipe(recipe, FusionRecipe), tmp_path / "one")
        output, _ = two.communicate()
    assert two.returncode == 0
    assert output.count("The fused model is in") == 1, output  # one process speaks
    for name in ("stage1", "stage2"):
        folder = tmp_path / "two/checkpoints" / name / f"checkpoint-{STEPS}"
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
        assert losses == pytest.approx(dict(one.stages[name].losses), abs=1e-5)
    other = open_fused(tmp_path / "two").model
    torch.testing.assert_close(flat(other.gate), flat(one.fused.model.gate), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("bank", "mode"), [("whole", "full"), ("adapters", "lora")])
def test_gradient_checkpointing_changes_nothing(toys, tmp_path, bank, mode):
    losses = []
    for checkpointing in (False, True):
        fused = toys.fused(bank)
        settings = Stage2(
            steps=2, examples_per_domain=2, learning_rate=1e-3, log_every=1, train=mode,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        calls = count_calls(fused.model)
        folder = tmp_path / str(checkpointing)
        result = run_stage2(fused.model, encoder_for(fused), encoded(fused, toys), settings, folder, seed=0)
        losses.append((dict(result.losses), calls[0]))
    assert losses[1][0] == pytest.approx(losses[0][0], abs=1e-6)
    assert losses[1][1] == 2 * losses[0][1]  # every layer ran a second time


def count_calls(model):
    """How often an attention layer's input norm runs."""
    calls = [0]

    def count(*_):
        calls[0] += 1

    for name, module in model.bank.named_modules():
        if name.endswith("layers.0.input_layernorm"):
            module.register_forward_hook(count)
    return calls


def response_batch(rows):
    """Encoded conversations as plain Hugging Face input: labels on response tokens only."""
    length = max(len(row.input_ids[0]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        tokens = row.input_ids[0]
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        labels[index, torch.tensor(row.response_positions[0]) + 1] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def specialize_recipe(toys, **settings):
    start = {"model": str(toys.folder / "base"), "data": toys.files(), "dtype": "float32", "stage": STAGE}
    return SpecializeRecipe.model_validate({**start, **settings})


def plain_specialize(model, batches):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return plain_loop(parameters, batches, lambda rows: model(**response_batch(rows)).loss)


@pytest.mark.parametrize("start", ["fresh", "adapter"])
def test_lora_specialize_is_the_plain_peft_loop(toys, tmp_path, start):
    base = AutoModelForCausalLM.from_pretrained(toys.folder / "base", dtype=torch.float32)
    if start == "adapter":
        begin = save_adapter(tmp_path / "begin", base, seed=3)
        recipe = specialize_recipe(toys, adapter=begin)
    else:  # the same start for PEFT: our A, and B zero
        recipe = specialize_recipe(toys, lora={"rank": 4, "alpha": 8})
        adapter = fresh_adapter(base, recipe.lora, recipe.model, recipe.seed)
        begin = save_adapter(tmp_path / "begin", base, target_modules="all-linear")
        reference = PeftModel.from_pretrained(copy.deepcopy(base), begin, is_trainable=True)
        state = {f"base_model.model.{name}": tensor for name, tensor in adapter.weights.items()}
        set_peft_model_state_dict(reference, state)
    if start == "adapter":
        reference = PeftModel.from_pretrained(copy.deepcopy(base), begin, is_trainable=True)

    trained = specialize(recipe, tmp_path / "run")
    expected = plain_specialize(reference, rows_of(trained.data))
    assert dict(trained.stages["specialize"].losses) == pytest.approx(expected, abs=1e-4)

    # The result is a folder that PEFT opens; it is written in bfloat16.
    reopened = PeftModel.from_pretrained(base, tmp_path / "run/adapter").eval()
    batch = response_batch(trained.data.conversations[:3])
    with torch.no_grad():
        logits = reopened(**batch).logits
        theirs = reference(**batch).logits
        del batch["labels"]
        ours = trained.fused.model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], ours[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[real], theirs[real], rtol=0, atol=0.2)


def test_full_specialize_is_the_plain_loop(toys, tmp_path):
    trained = specialize(specialize_recipe(toys, train="full"), tmp_path / "run")
    reference = AutoModelForCausalLM.from_pretrained(toys.folder / "base", dtype=torch.float32)
    expected = plain_specialize(reference, rows_of(trained.data))
    assert dict(trained.stages["specialize"].losses) == pytest.approx(expected, abs=1e-4)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    for name, tensor in reopened.state_dict().items():
        torch.testing.assert_close(tensor, reference.state_dict()[name], rtol=0, atol=1e-3)
    assert "lm_head.weight" in load_file(tmp_path / "run/model/model.safetensors")


def test_a_full_specialist_keeps_the_template_that_it_was_trained_in(toys, tmp_path):
    specialize(specialize_recipe(toys, train="full", template="alpaca"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    assert "### Instruction:" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )


def test_a_constant_rate_is_warmed_up_to(toys, tmp_path):
    stage = {**STAGE, "schedule": "constant", "warmup_steps": 2, "steps": 3, "save_every": 1}
    specialize(specialize_recipe(toys, train="full", stage=stage), tmp_path / "run")
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-3/trainer_state.json").read_text())
    rates = [
        entry["learning_rate"] / stage["learning_rate"] for entry in state["log_history"] if "loss" in entry
    ]
    assert rates == pytest.approx([0.0, 0.5, 1.0])
