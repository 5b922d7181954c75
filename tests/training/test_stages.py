"""What the stages promise: what is trained, what is left alone, that it helps, and what is written."""

import pytest
import torch
from conftest import randomise_gate, save_model, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file

from ultrafuser.analysis.measure import measure
from ultrafuser.errors import DataError, RecipeError, TemplateError, UltrafuserError
from ultrafuser.modeling import checkpoint
from ultrafuser.modeling.assembly import SpecialistSource, fuse
from ultrafuser.modeling.checkpoint import open_fused, save_fused
from ultrafuser.training.data import load_domain_conversations
from ultrafuser.training.recipe import FusionRecipe, Stage1
from ultrafuser.training.run import encoder_for, start_gate, train
from ultrafuser.training.stages import encode_data, run_stage1


def conversations(toys, part="train"):
    return load_domain_conversations({domain: [file] for domain, file in toys.files(part).items()})


def stage1(fused, toys, folder, **settings):
    encoder = encoder_for(fused)
    data = encode_data(encoder, conversations(toys), "error")
    chosen = {"steps": 4, "examples_per_domain": 4, "learning_rate": 1e-2, "log_every": 1, **settings}
    return run_stage1(fused.model, encoder, data, Stage1(**chosen), folder, seed=0)


def copied(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_stage1_favours_the_specialist_that_knows_the_domain(toys, tmp_path):
    fused = toys.fused()
    bank = copied(fused.model.bank.state_tensors())
    result = stage1(fused, toys, tmp_path, steps=25, examples_per_domain=6)
    assert same(bank, fused.model.bank.state_tensors())
    assert [step for step, _ in result.losses] == list(range(1, 26))
    assert result.losses[-1][1] < 0.6 * result.losses[0][1]
    found = measure(fused.model, encoder_for(fused), conversations(toys, "heldout"))
    for domain in ("letters", "digits"):
        assert found.weights[domain][domain] > 0.75
        assert found.losses["fused"][domain] < found.losses["uniform"][domain] - 0.3


def with_dropout(toys, tmp_path, tokenizer):
    sources = {"letters": SpecialistSource(model=str(toys.folder / "letters"))}
    model = save_model(tmp_path / "gpt2", tiny_model("gpt2", n_embd=32), tokenizer)
    sources["gpt2"] = SpecialistSource(model=model)  # drops 0.1 of everything when it is trained
    return fuse(sources, gate_size=16)


@pytest.mark.parametrize("kind", ["whole", "adapters", "dropout"])
def test_cached_states_change_nothing(toys, tmp_path, tokenizer, kind):
    results, gates = [], []
    for cached in (False, True):
        torch.manual_seed(0)
        fused = with_dropout(toys, tmp_path, tokenizer) if kind == "dropout" else toys.fused(kind)
        bank = copied(fused.model.bank.state_tensors())
        results.append(stage1(fused, toys, tmp_path / str(cached), cache_states=cached))
        assert same(bank, fused.model.bank.state_tensors())
        # All but the last bias: it shifts all scores alike, so that it has no gradient but rounding.
        seen = [p for name, p in fused.model.gate.named_parameters() if name != "networks.0.2.bias"]
        gates.append(torch.cat([p.flatten() for p in seen]))
    assert dict(results[1].losses) == pytest.approx(dict(results[0].losses), abs=1e-6)
    torch.testing.assert_close(gates[0], gates[1], rtol=0, atol=1e-5)
    assert results[0].cache is None
    assert results[1].cache.num_bytes > 0


def test_runs_can_share_cached_states(toys, tmp_path):
    shared = str(tmp_path / "states")
    results = [
        stage1(toys.fused(), toys, tmp_path / str(rate), cache_states=shared, learning_rate=rate)
        for rate in (1e-2, 1e-3)
    ]
    assert results[0].cache.seconds > 0
    assert results[1].cache.seconds == 0
    assert results[0].losses[0] == results[1].losses[0]


def test_no_steps_leave_the_uniform_average(toys, tmp_path):
    fused = toys.fused()
    result = stage1(fused, toys, tmp_path, steps=0, cache_states=True)
    assert result.losses == []
    assert not any(tmp_path.iterdir())
    weights = fused.model(input_ids=torch.tensor([[1, 50, 60]])).gate_weights
    assert torch.equal(weights, torch.full_like(weights, 0.5))


@pytest.mark.parametrize(
    ("bank", "mode", "dtype"),
    [
        ("whole", "full", "float32"),
        ("whole", "lora", "float32"),
        ("adapters", "lora", "float32"),
        ("whole", "full", "bfloat16"),
        ("adapters", "lora", "bfloat16"),
    ],
)
def test_stage2_trains_everything_and_is_saved_whole(toys, tmp_path, bank, mode, dtype):
    stage = {"examples_per_domain": 12, "log_every": 1}  # every row in every step: losses can be compared
    lora = {"lora": {"rank": 2, "alpha": 4}} if (bank, mode) == ("whole", "lora") else {}
    settings = toys.recipe(
        bank,
        dtype=dtype,
        stage1={"steps": 2, "learning_rate": 1e-2, **stage},
        stage2={"steps": 5, "learning_rate": 3e-3, "train": mode, **lora, **stage},
    )
    trained = train(FusionRecipe.model_validate(settings), tmp_path / "run")
    losses = [loss for _, loss in trained.stages["stage2"].losses]
    assert losses[-1] < losses[0] - 0.1

    checkpoint = load_file(tmp_path / "run/checkpoints/stage2/checkpoint-5/trained.safetensors")
    assert {tensor.dtype for tensor in checkpoint.values()} == {torch.float32}
    assert any("gate" in name for name in checkpoint)
    assert any("bank" in name for name in checkpoint)

    with safe_open(tmp_path / "run/model.safetensors", framework="pt") as file:
        names = list(file.keys())
        assert str(file.get_tensor(names[-1]).dtype) == f"torch.{dtype}"
    assert any("lora" in name for name in names) == (bank == "adapters")  # new adapters have been merged
    batch = trained.encoder.collate(trained.data.conversations[:3])
    del batch["labels"]
    with torch.no_grad():
        logits = [m(**batch).logits for m in (trained.fused.model, open_fused(tmp_path / "run").model)]
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)
    with pytest.raises(UltrafuserError, match="no source"):
        trained.fused.model.save_pretrained(tmp_path / "gate", gate_only=True)


def test_what_stage2_cannot_train_is_refused_before_stage1(toys, tmp_path):
    base = {"model": str(toys.folder / "base")}
    for bank, stage2, message, others in (
        ("adapters", {"train": "full"}, "train: full needs whole specialists", {}),
        ("whole", {"train": "lora", "lora": {"target_modules": ["query"]}}, "name no linear layer", {}),
        ("whole", {"train": "lora"}, "nothing to train", {"bank": "adapters", "specialists": {"a": base}}),
    ):
        recipe = FusionRecipe.model_validate({**toys.recipe(bank, stage2=stage2), **others})
        with pytest.raises(UltrafuserError, match=message):
            train(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_gate_can_start_from_another_models(toys, tmp_path, monkeypatch):
    first = toys.fused(gate_form="per_specialist")
    randomise_gate(first.model.gate)
    save_fused(first, tmp_path / "first", gate_only=True)
    monkeypatch.setattr(checkpoint, "open_specialists", None)  # the other model's specialists are not opened
    sources = {"digits": SpecialistSource(model=str(toys.folder / "digits"))}
    sources["base"] = SpecialistSource(model=str(toys.folder / "base"))
    second = fuse(sources, gate_size=16, gate_form="per_specialist")
    start_gate(second.model, str(tmp_path / "first"))
    kept, fresh = second.model.gate.networks
    assert same(kept.state_dict(), first.model.gate.networks[1].state_dict())
    assert not fresh[2].weight.any()
    wide = tiny_model("llama", hidden_size=48)
    wider = {"digits": SpecialistSource(model=save_model(tmp_path / "wide", wide, first.tokenizer))}
    strangers = {"base": sources["base"]}
    for others, form, size in (
        (sources, "joint", 16),
        (sources, "per_specialist", 8),
        (wider, "per_specialist", 16),
        (strangers, "per_specialist", 16),
    ):
        refused = fuse(others, gate_size=size, gate_form=form).model
        with pytest.raises(
            RecipeError, match=r"gate\.start: .* has a per_specialist gate of size 16 over letters"
        ):
            start_gate(refused, str(tmp_path / "first"))


def test_a_shared_gate_starts_one_of_the_same_width_only(toys, tmp_path, tokenizer):
    first = toys.fused()
    randomise_gate(first.model.gate)
    save_fused(first, tmp_path / "first", gate_only=True)
    alone = fuse({"base": SpecialistSource(model=str(toys.folder / "base"))}, gate_size=16).model
    start_gate(alone, str(tmp_path / "first"))
    assert same(alone.gate.state_dict(), first.model.gate.state_dict())
    model = save_model(tmp_path / "wide", tiny_model("llama", hidden_size=48), tokenizer)
    wide = fuse({"wide": SpecialistSource(model=model)}, gate_size=16).model
    with pytest.raises(RecipeError, match=r"cannot start a shared gate of size 16 over wide \(width 48\)"):
        start_gate(wide, str(tmp_path / "first"))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_training_that_breaks_stops_before_it_is_kept(toys, tmp_path, bad):
    fused = toys.fused()

    if bad == "loss":
        fused.model.bank.register_forward_hook(lambda *call: [state * float("nan") for state in call[2]])
    else:
        fused.model.gate.networks[0][2].weight.register_hook(lambda gradient: gradient * float("inf"))
    name = "loss" if bad == "loss" else "grad_norm"
    with pytest.raises(UltrafuserError, match=rf"stage 1: {name} is (nan|inf) at step 1\. Lower"):
        stage1(fused, toys, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_examples_have_to_fit_the_passes(toys, tmp_path):
    fused = toys.fused()
    encoder = encoder_for(fused)
    data = encode_data(encoder, conversations(toys), "error")
    settings = Stage1.model_construct(steps=1, examples_per_domain=4, examples_per_pass=3)  # past the checks
    with pytest.raises(RecipeError, match=r"examples_per_domain \(4\) must be a multiple of"):
        run_stage1(fused.model, encoder, data, settings, tmp_path, seed=0)


def exchange(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_too_long_conversations_are_cut_dropped_or_refused(toys):
    encoder = encoder_for(toys.fused(), max_length=48)
    rows = {
        "letters": [exchange("?", "abc"), exchange("?", "abc " * 40), exchange("? " * 40, "abc")],
        "digits": [exchange("?", "012")],
    }
    cut = encode_data(encoder, rows, "truncate")
    assert dict(cut.domain_sizes) == {"letters": 2, "digits": 1}
    assert dict(cut.truncated) == {"letters": 1}
    assert dict(cut.dropped) == {"letters": 1}
    assert max(len(ids) for row in cut.conversations for ids in row.input_ids) == 48
    dropped = encode_data(encoder, rows, "drop")
    assert dict(dropped.domain_sizes) == {"letters": 1, "digits": 1}
    assert dict(dropped.dropped) == {"letters": 2}
    with pytest.raises(TemplateError, match=r"data\.letters, conversation 2: .*reads at most 48"):
        encode_data(encoder, rows, "error")
    rows["digits"] = [exchange("? " * 40, "012")]
    with pytest.raises(DataError, match=r"data\.digits: all 1 conversations are longer"):
        encode_data(encoder, rows, "truncate")
