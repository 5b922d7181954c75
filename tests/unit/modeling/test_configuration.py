"""The fused configuration: what it holds, survives and refuses."""

import pytest
from conftest import tiny_model
from transformers import AutoConfig, LlamaConfig

from ultrafuser import UltraFuserConfig
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.configuration import SpecialistConfig


def test_written_and_read_is_the_same(tmp_path):
    members = [
        SpecialistConfig(name="text", model="org/text", model_revision="abc", template="{{ bos_token }}"),
        SpecialistConfig(name="code", adapter="org/code", model_config=tiny_model("qwen2").config.to_dict()),
    ]
    config = UltraFuserConfig(
        specialists=members, bank="adapters", gate_form="joint", gate_size=64, gate_only=True, end_token_id=3
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is UltraFuserConfig
    assert config.members == members
    assert again.members[0] == members[0]
    assert again.members[1].adapter == "org/code"
    assert again.members[1].architecture().to_dict() == members[1].architecture().to_dict()
    assert again.specialist_names == ["text", "code"]
    assert again.num_specialists == 2
    kept = ("bank", "gate_form", "gate_size", "gate_only", "end_token_id", "eos_token_id")
    assert [getattr(again, key) for key in kept] == ["adapters", "joint", 64, True, 3, 3]
    assert (again.pad_token_id, again.bos_token_id, again.tie_word_embeddings) == (None, None, False)


def test_defaults_are_the_papers_gate():
    config = UltraFuserConfig(specialists=[{"name": "a"}])
    assert (config.bank, config.gate_form, config.gate_size, config.gate_only) == (
        "whole",
        "shared",
        512,
        False,
    )
    assert UltraFuserConfig().specialists == []  # transformers makes empty ones


def test_an_architecture_comes_back_as_its_own_class():
    settings = tiny_model("llama", tied=True).config.to_dict()
    architecture = SpecialistConfig(name="a", model_config=settings).architecture()
    assert type(architecture) is LlamaConfig
    assert architecture.hidden_size == 32
    assert architecture.tie_word_embeddings


@pytest.mark.parametrize(
    ("model_config", "message"),
    [
        (None, "specialist a: model_config is missing"),
        (
            {"model_type": "mine"},
            "architecture 'mine' is not one that transformers ships. Remote code is never run",
        ),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, "Remote code is never run"),
        ({}, "architecture None"),
    ],
)
def test_architectures_that_are_not_built_in_are_refused(model_config, message):
    with pytest.raises(UltrafuserError, match=message):
        SpecialistConfig(name="a", model_config=model_config).architecture()


@pytest.mark.parametrize("name", ["0", "1code", "a.b", "a b", "", "_a", "é"])
def test_names_that_cannot_prefix_tensors_are_refused(name):
    with pytest.raises(UltrafuserError, match="starting with a letter"):
        UltraFuserConfig(specialists=[{"name": name}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"specialists": [{"name": "a"}, {"name": "b"}, {"name": "a"}]},
            r"may stand once, got \['a', 'b', 'a'\]",
        ),
        ({"bank": "expert"}, "bank must be one of whole, adapters, got 'expert'"),
        ({"specialists": [{"name": "a", "modle": "x"}]}, "may have adapter, .*template, got name, modle"),
        ({"specialists": [{"model": "x"}]}, "each needs a name"),
    ],
)
def test_settings_that_are_not_valid_are_refused(settings, message):
    with pytest.raises(UltrafuserError, match=message):
        UltraFuserConfig(**settings)
