"""A specialist comes or goes: the others stay as they were, and so does what applies of the gate."""

import copy

import pytest
import torch
from conftest import randomise_gate, save_adapter, save_model, tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from ultrafuser import SpecialistSource, fuse, open_fused, save_fused
from ultrafuser.errors import CheckpointError, TemplateError, UltrafuserError
from ultrafuser.modeling.configuration import without_sources
from ultrafuser.modeling.membership import add_specialist, drop_specialist

EXACT = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tokenizer):
    """Three models of one width, one of another, and a base with three adapters on it."""
    root = tmp_path_factory.mktemp("sources")
    models = {
        "a": tiny_model(seed=1),
        "b": tiny_model(seed=2, tied=True),
        "c": tiny_model(seed=3),
        "wide": tiny_model(seed=4, hidden_size=48),
    }
    found = {
        name: SpecialistSource(model=save_model(root / name, model, tokenizer), template="alpaca")
        for name, model in models.items()
    }
    base = tiny_model(seed=5)
    folder = save_model(root / "base", base, tokenizer)
    save_model(root / "same-base", base, tokenizer)
    for index, (name, rank) in enumerate({"x": 4, "y": 2, "z": 8}.items()):
        adapter = save_adapter(root / name, base, seed=index, r=rank)
        found[name] = SpecialistSource(model=folder, adapter=adapter, template="ultralm")
    found["bare"] = SpecialistSource(model=str(root / "same-base"))
    found["other-base"] = SpecialistSource(model=found["a"].model, adapter=found["z"].adapter)
    return found


def fused_from(sources, names, form="shared"):
    fused = fuse({name: sources[name] for name in names}, gate_form=form, gate_size=16)
    randomise_gate(fused.model.gate)
    return fused


@torch.no_grad()
def states_of(model):
    ids = IDS.unsqueeze(1).expand(-1, model.num_specialists, -1)
    return dict(zip(model.specialist_names, model.hidden_states(ids), strict=True))


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


BANKS = {"whole": ("a", "b", "c"), "adapters": ("x", "y", "z")}


@pytest.fixture(params=list(BANKS))
def names(request):
    return BANKS[request.param]


@pytest.mark.parametrize("form", ["shared", "per_specialist", "joint"])
def test_added_one_stands_beside_the_others(sources, names, form):
    before = fused_from(sources, names[:2], form)
    states = states_of(before.model)
    larger = add_specialist(before, names[2], sources[names[2]])
    assert larger.model.specialist_names == names
    assert larger.model.config.specialist_names == list(names)
    expected = states_of(fused_from(sources, names).model)
    for name, state in states_of(larger.model).items():
        assert torch.allclose(state, expected[name], **EXACT)
        assert name == names[2] or torch.allclose(state, states[name], **EXACT)
    assert not larger.model.training


def test_dropped_one_leaves_the_others_as_they_were(sources, names):
    before = fused_from(sources, names)
    states = states_of(before.model)
    smaller = drop_specialist(before, names[0])
    assert smaller.model.specialist_names == names[1:]
    for name, state in states_of(smaller.model).items():
        assert torch.allclose(state, states[name], **EXACT)


@pytest.mark.parametrize("form", ["shared", "per_specialist"])
def test_dropping_what_was_added_changes_nothing(sources, names, form):
    before = fused_from(sources, names[:2], form)
    expected = logits_of(before.model)
    after = drop_specialist(add_specialist(before, names[2], sources[names[2]]), names[2])
    assert torch.allclose(logits_of(after.model), expected, **EXACT)


def test_a_shared_gate_is_kept_whole(sources, names):
    before = fused_from(sources, names[:2])
    for after in (add_specialist(before, names[2], sources[names[2]]), drop_specialist(before, names[0])):
        for key, value in before.model.gate.state_dict().items():
            assert torch.equal(after.model.gate.state_dict()[key], value)


def test_a_gate_per_specialist_keeps_the_networks_of_those_that_stay(sources, names):
    before = fused_from(sources, names, "per_specialist")
    smaller = drop_specialist(before, names[1])
    for new, old in ((0, 0), (1, 2)):
        for key, value in before.model.gate.networks[old].state_dict().items():
            assert torch.equal(smaller.model.gate.networks[new].state_dict()[key], value)
    larger = add_specialist(smaller, names[1], sources[names[1]])
    assert larger.model.specialist_names == (names[0], names[2], names[1])
    scores = larger.model.gate.scores([torch.randn(5, size) for size in larger.model.bank.hidden_sizes])
    assert torch.equal(scores[:, 2], torch.zeros(5))


def test_a_joint_gate_starts_anew(sources, names):
    smaller = drop_specialist(fused_from(sources, names, "joint"), names[0])
    with torch.no_grad():
        weights = smaller.model(input_ids=IDS).gate_weights
    assert torch.allclose(weights, torch.full_like(weights, 0.5))


def test_other_widths_need_a_gate_that_allows_them(sources):
    shared = fused_from(sources, ("a", "b"))
    with pytest.raises(UltrafuserError, match=r"gate\.form shared needs equal hidden sizes"):
        add_specialist(shared, "wide", sources["wide"])
    larger = add_specialist(fused_from(sources, ("a", "b"), "per_specialist"), "wide", sources["wide"])
    assert larger.model.bank.hidden_sizes == [32, 32, 48]
    assert logits_of(larger.model).shape == (2, 9, 320)


def test_the_bare_base_may_join_its_adapters_under_another_name(sources):
    before = fused_from(sources, ("x", "y"))
    larger = add_specialist(before, "bare", sources["bare"])
    state = states_of(larger.model)["bare"]
    plain = tiny_model(seed=5)
    with torch.no_grad():
        assert torch.allclose(state, plain.get_decoder()(IDS).last_hidden_state, **EXACT)


def test_works_on_what_was_trained_in_memory(sources, names, tmp_path):
    before = fused_from(sources, names[:2])
    with torch.no_grad():  # as stage 2 leaves a model: other weights, and no sources that could tell them
        for tensor in before.model.bank.state_tensors().values():
            tensor.mul_(1.2)
    before.model.config = without_sources(before.model.config)
    trained = states_of(before.model)
    if names == BANKS["adapters"]:  # whose base is no longer the one that further adapters stand on
        with pytest.raises(CheckpointError, match="is not the base"):
            add_specialist(before, names[2], sources[names[2]])
        after = drop_specialist(before, names[1])
    else:
        after = add_specialist(before, names[2], sources[names[2]])
    save_fused(after, tmp_path / "model")
    opened = states_of(open_fused(tmp_path / "model").model)
    assert torch.allclose(opened[names[0]], trained[names[0]], **EXACT)


def test_adapters_trained_on_their_own_base_are_kept(sources):
    before = fused_from(sources, ("x", "y"))
    with torch.no_grad():
        for parameter in before.model.bank.lora_parameters():
            parameter.mul_(1.5)
    before.model.config = without_sources(before.model.config)
    trained = states_of(before.model)
    after = states_of(add_specialist(before, "z", sources["z"]).model)
    assert torch.allclose(after["x"], trained["x"], **EXACT)
    assert torch.allclose(after["y"], trained["y"], **EXACT)


def test_the_result_can_be_saved_gate_only_and_opened(sources, names, tmp_path):
    larger = add_specialist(fused_from(sources, names[:2]), names[2], sources[names[2]])
    save_fused(larger, tmp_path / "gate", gate_only=True)
    opened = open_fused(tmp_path / "gate")
    assert torch.allclose(logits_of(opened.model), logits_of(larger.model), **EXACT)


def test_the_original_still_answers(sources, names):
    before = fused_from(sources, names[:2])
    expected = logits_of(before.model)
    add_specialist(before, names[2], sources[names[2]])
    drop_specialist(before, names[0])
    assert torch.equal(logits_of(before.model), expected)


def test_generation_settings_are_kept_apart(sources, names):
    before = fused_from(sources, names)
    before.model.generation_config.max_new_tokens = 7
    smaller = drop_specialist(before, names[0])
    assert smaller.model.generation_config.max_new_tokens == 7
    smaller.model.generation_config.max_new_tokens = 9
    assert before.model.generation_config.max_new_tokens == 7


def test_refusals(sources, names):
    fused = fused_from(sources, names[:2])
    with pytest.raises(
        UltrafuserError, match="is a specialist 'a' already" if names[0] == "a" else "already"
    ):
        add_specialist(fused, names[0], sources[names[2]])
    with pytest.raises(UltrafuserError, match=f"no specialist 'q'; there are {names[0]}, {names[1]}"):
        drop_specialist(fused, "q")
    with pytest.raises(UltrafuserError, match="at least 1 must stay"):
        drop_specialist(drop_specialist(fused, names[0]), names[1])
    with pytest.raises(UltrafuserError, match="starting with a letter"):
        add_specialist(fused, "7", sources[names[2]])


def test_refuses_an_adapter_on_another_base(sources):
    with pytest.raises(CheckpointError, match=r"is not the base .* \(\d+ tensors differ, first: .*whole"):
        add_specialist(fused_from(sources, ("x", "y")), "other", sources["other-base"])


def test_refuses_another_vocabulary_by_name(sources, tmp_path):
    other = copy.deepcopy(tiny_tokenizer())
    other.add_tokens(AddedToken("<new>"))
    folder = save_model(tmp_path / "other", tiny_model(seed=9), other)
    with pytest.raises(CheckpointError, match=r"specialist d has another vocabulary .*'<new>'"):
        add_specialist(fused_from(sources, ("a", "b")), "d", SpecialistSource(model=folder))


def test_refuses_a_template_that_cannot_be_aligned(sources):
    source = SpecialistSource(model=sources["c"].model, template="{{ messages[0]['content'] }}")
    with pytest.raises(TemplateError, match="cannot be aligned"):
        add_specialist(fused_from(sources, ("a", "b")), "c", source)
