"""`mixed_precision`: specialists compute in bfloat16 while everything that is trained stays float32."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ultrafuser.errors import RecipeError
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.training.data import load_domain_conversations
from ultrafuser.training.recipe import FusionRecipe, SpecializeRecipe, Stage2, TuningSettings
from ultrafuser.training.run import encoder_for, specialize, train
from ultrafuser.training.stages import computes_in_bfloat16, encode_data, prepare_specialists, run_stage2

STEPS = 4
STAGE = {"steps": STEPS, "examples_per_domain": 4, "learning_rate": 3e-3, "log_every": 1}
KINDS = [("whole", "full"), ("whole", "lora"), ("adapters", "lora")]


class Watch:
    """Types of what attention puts out and of gate weights, while a model trains."""

    def __init__(self, model):
        self.products, self.weights = set(), set()
        for name, module in model.bank.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_hook(lambda *call: self.products.add(call[2][0].dtype))
        model.gate.register_forward_hook(lambda *call: self.weights.add(call[2].dtype))


def stage2(toys, folder, bank, mode, precision, **settings):
    fused = toys.fused(bank)
    watch = Watch(fused.model)
    chosen = Stage2(**{**STAGE, "train": mode, "mixed_precision": precision, **settings})
    encoder = encoder_for(fused)
    files = {domain: [file] for domain, file in toys.files().items()}
    data = encode_data(encoder, load_domain_conversations(files), "error")
    losses = dict(run_stage2(fused.model, encoder, data, chosen, folder, seed=0).losses)
    return fused.model, losses, watch


@pytest.mark.parametrize(("bank", "mode"), KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_trains_float32_weights_to_nearly_the_same(toys, tmp_path, bank, mode, checkpointing):
    model, exact, watch = stage2(toys, tmp_path / "none", bank, mode, "none")
    assert watch.products == {torch.float32}
    settings = {"gradient_checkpointing": checkpointing}
    mixed, rough, watch = stage2(toys, tmp_path / "mixed", bank, mode, "bfloat16", **settings)
    assert watch.products == {torch.bfloat16}
    assert watch.weights == {torch.float32}
    assert rough == pytest.approx(exact, rel=0.02)
    assert rough != exact
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    state = load_file(tmp_path / f"mixed/checkpoint-{STEPS}/training_state.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    begun = toys.fused(bank).model
    prepare_specialists(begun, mode, None, seed=0)
    start = {name: parameter for name, parameter in begun.bank.named_parameters() if parameter.requires_grad}
    moved = 0
    for name, before in start.items():
        steps = [(end.bank.get_parameter(name) - before).flatten() for end in (model, mixed)]
        if bool(steps[0].any()):  # layers without an adapter have a part in the joined ones, which stays zero
            assert nn.functional.cosine_similarity(*steps, dim=0) > 0.7, (
                name
            )  # signs of tiny gradients differ
            moved += 1
    assert moved >= 4


def test_the_model_comes_back_without_autocast(toys, tmp_path):
    model, _, _ = stage2(toys, tmp_path, "whole", "full", "bfloat16")
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        assert torch.equal(
            model(input_ids=ids).logits, UltraFuserForCausalLM.forward(model, input_ids=ids).logits
        )
    assert "forward" not in vars(model)


def recipe(toys, bank="whole", **settings):
    mode = "full" if bank == "whole" else "lora"
    stage = {**STAGE, "train": mode, "mixed_precision": "bfloat16", "save_every": 2}
    content = toys.recipe(bank, stage1={**STAGE, "steps": 2}, stage2=stage, heldout={}, **settings)
    return FusionRecipe.model_validate(content)


@pytest.mark.parametrize(
    ("bank", "dtype"), [("whole", "float32"), ("whole", "bfloat16"), ("adapters", "bfloat16")]
)
def test_a_whole_run_and_its_resume(toys, tmp_path, bank, dtype):
    """Stage 2 computes in bfloat16 though the same model went through stage 1 before; a resume changes nothing."""
    watch = []
    settings = recipe(toys, bank, dtype=dtype)
    whole = train(settings, tmp_path / "whole", on_stage=lambda name, t: watch.append(Watch(t.fused.model)))
    assert watch[0].products == {torch.bfloat16}
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / f"killed/checkpoints/stage2/checkpoint-{STEPS}")
    resumed = train(settings, tmp_path / "killed", resume=True)
    assert resumed.stages["stage2"].losses == whole.stages["stage2"].losses
    for name, tensor in resumed.fused.model.state_dict().items():
        assert torch.equal(tensor, whole.fused.model.state_dict()[name]), name
    trained = load_file(tmp_path / f"whole/checkpoints/stage2/checkpoint-{STEPS}/trained.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert {str(p.dtype) for p in whole.fused.model.bank.parameters()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("precision", ["none", "bfloat16"])
def test_steps_too_small_for_bfloat16_add_up(toys, tmp_path, precision):
    """Also when the recipe's dtype is bfloat16: what AdamW moves is float32."""
    stage = {**STAGE, "learning_rate": 1e-6, "mixed_precision": precision}
    settings = {"model": str(toys.folder / "base"), "data": toys.files(), "train": "full", "stage": stage}
    trained = specialize(SpecializeRecipe.model_validate(settings), tmp_path / "run")
    start = trained.fused.model.bank.models[0].get_parameter("model.layers.0.mlp.up_proj.weight").float()
    moved = load_file(tmp_path / f"run/checkpoints/checkpoint-{STEPS}/trained.safetensors")
    step = (moved["bank.models.0.model.layers.0.mlp.up_proj.weight"] - start).abs()
    large = start.abs() > 0.1  # where bfloat16 knows steps of 5e-4
    assert large.any()
    assert (step[large] > 1e-7).float().mean() > 0.9
    assert step[large].max() < 1e-5


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_specialize_in_bfloat16_is_nearly_the_same(toys, tmp_path, mode):
    losses = []
    for precision in ("none", "bfloat16"):
        stage = {**STAGE, "mixed_precision": precision}
        settings = {"model": str(toys.folder / "base"), "data": toys.files(), "train": mode, "stage": stage}
        chosen = SpecializeRecipe.model_validate({**settings, "dtype": "float32"})
        trained = specialize(chosen, tmp_path / precision)
        losses.append(dict(trained.stages["specialize"].losses))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1] != losses[0]


@pytest.mark.parametrize(
    ("has_gpu", "able", "choice", "expected"),
    [
        (False, False, "auto", False),
        (False, False, "bfloat16", True),
        (True, True, "auto", True),
        (True, True, "none", False),
        (True, True, "bfloat16", True),
        (True, False, "auto", False),
        (True, False, "bfloat16", None),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_that_can(monkeypatch, has_gpu, able, choice, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    settings = TuningSettings(steps=1, examples_per_domain=1, mixed_precision=choice)
    if expected is None:
        with pytest.raises(RecipeError, match=r"mixed_precision: bfloat16 needs a GPU .*, got Old GPU"):
            computes_in_bfloat16(settings)
    else:
        assert computes_in_bfloat16(settings) == expected
