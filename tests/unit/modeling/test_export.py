"""Every form of a fused model says the same, and each is opened by what it is meant for."""

import pytest
import torch
from conftest import randomise_gate, save_adapter, save_model, tiny_model
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultrafuser import SpecialistSource, fuse, open_fused
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.configuration import without_sources
from ultrafuser.modeling.export import EXPORT_FORMS, as_whole, export

EXACT = {"rtol": 1e-5, "atol": 1e-5}
IDS = torch.randint(4, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    return save_model(tmp_path_factory.mktemp("base"), tiny_model(seed=1), tokenizer)


@pytest.fixture(scope="module")
def fused(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = AutoModelForCausalLM.from_pretrained(base)
    sources = {
        "a": SpecialistSource(
            model=base, adapter=save_adapter(folder / "a", model, seed=1), template="alpaca"
        ),
        "b": SpecialistSource(model=base, adapter=save_adapter(folder / "b", model, seed=2)),
        "bare": SpecialistSource(model=base),
    }
    fused = fuse(sources, gate_size=16)
    randomise_gate(fused.model.gate)
    return fused


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS).logits


def size_of(folder):
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("form", ["self-contained", "gate-only", "whole"])
def test_fused_forms_say_the_same(fused, tmp_path, form):
    export(fused, tmp_path / "out", form)
    opened = open_fused(tmp_path / "out")
    assert torch.allclose(logits_of(opened.model), logits_of(fused.model), **EXACT)
    assert opened.model.config.bank == ("whole" if form == "whole" else "adapters")
    assert opened.model.config.gate_only == (form == "gate-only")


def test_forms_turn_into_each_other_and_back(fused, tmp_path):
    export(fused, tmp_path / "gate", "gate-only")
    export(open_fused(tmp_path / "gate"), tmp_path / "all", "self-contained")
    export(open_fused(tmp_path / "all"), tmp_path / "again", "gate-only")
    assert torch.equal(logits_of(open_fused(tmp_path / "again").model), logits_of(fused.model))
    export(open_fused(tmp_path / "all"), tmp_path / "whole", "whole")
    export(open_fused(tmp_path / "whole"), tmp_path / "whole-gate", "gate-only")
    assert torch.allclose(
        logits_of(open_fused(tmp_path / "whole-gate").model), logits_of(fused.model), **EXACT
    )
    assert size_of(tmp_path / "gate") < size_of(tmp_path / "all") < size_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["a", "b", "bare"])
def test_one_specialist_is_a_plain_model(fused, base, tmp_path, name):
    export(fused, tmp_path / "out", "specialist", name)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base)
    source = next(member for member in fused.model.config.members if member.name == name)
    reference = plain if source.adapter is None else PeftModel.from_pretrained(plain, source.adapter)
    assert type(opened) is type(plain)
    assert torch.allclose(logits_of(opened), logits_of(reference), **EXACT)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == source.template
    assert fused.tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template


def test_one_adapter_is_what_peft_opens(fused, base, tmp_path):
    export(fused, tmp_path / "out", "adapter", "b")
    plain = AutoModelForCausalLM.from_pretrained(base)
    ours = logits_of(PeftModel.from_pretrained(plain, tmp_path / "out"))
    export(fused, tmp_path / "whole", "specialist", "b")
    assert torch.allclose(ours, logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), **EXACT)


def test_whole_specialists_are_left_as_they_are(fused):
    whole = as_whole(fused)
    assert as_whole(whole) is whole


@pytest.mark.parametrize("form", EXPORT_FORMS)
def test_refuses_a_folder_in_use_and_leaves_it_alone(fused, tmp_path, form):
    (tmp_path / "mine.txt").write_text("mine")
    name = "a" if form in ("specialist", "adapter") else None
    with pytest.raises(UltrafuserError, match="must be new or empty"):
        export(fused, tmp_path, form, name)
    with pytest.raises(UltrafuserError, match="must be new or empty"):
        export(fused, tmp_path / "mine.txt", form, name)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_used(fused, tmp_path):
    export(fused, tmp_path, "gate-only")
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("specialist", None, r"needs the name of a specialist \(a, b, bare\)"),
        ("adapter", None, "needs the name"),
        ("whole", "a", "Leave the name out"),
        ("adapter", "bare", "no adapter of its own"),
        ("specialist", "q", "no specialist 'q'"),
        ("zip", None, "form must be one of self-contained, "),
    ],
)
def test_refuses_without_writing(fused, tmp_path, form, name, message):
    with pytest.raises(UltrafuserError, match=message):
        export(fused, tmp_path / "out", form, name)
    assert list(tmp_path.iterdir()) == []


def test_refuses_gate_only_for_specialists_without_sources(fused, tmp_path):
    whole = as_whole(fused)
    whole.model.config = without_sources(whole.model.config)
    with pytest.raises(UltrafuserError, match="no source"):
        export(whole, tmp_path / "out", "gate-only")
    assert not (tmp_path / "out").exists()
