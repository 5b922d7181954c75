import pytest
import torch
from conftest import fused_over, tiny_model

from ultrafuser.modeling.specialists import WholeSpecialists
from ultrafuser.modeling.templates import EncodedConversation
from ultrafuser.training.inputs import _summary, describe_files, describe_specialists, describe_tokens


def summary(tensor):
    return list(_summary(tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_no_single_change_goes_unseen(dtype):
    tensor = torch.linspace(-3, 3, 50_003).to(dtype)
    before = summary(tensor)
    assert summary(tensor.clone()) == before
    assert sum(len(part) for part in before) < 50_000  # though most values are in no sample
    for index in (0, 1, 77, 25_000, 50_001, 50_002):
        changed = tensor.clone()
        changed[index] = ~changed[index] if dtype == torch.bool else changed[index] + 1
        assert summary(changed) != before


def test_values_that_change_places_are_seen():
    tensor = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
    assert summary(tensor.roll(1, dims=0)) != summary(tensor)
    assert summary(tensor.flip(0)) != summary(tensor)


def test_views_are_as_good_as_their_copies():
    tensor = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    for view in (tensor[1:], tensor[3], tensor[:, 2:7], tensor.T, tensor[0, 1:3], tensor[5:5], tensor[2, 3]):
        assert summary(view) == summary(view.clone().contiguous())


def fused(**settings):
    return fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model(seed=2, **settings)}))


def test_a_specialist_is_its_weights_and_its_settings():
    before = describe_specialists(fused())
    assert before.keys() == {"specialists.a", "specialists.b"}
    assert describe_specialists(fused()) == before
    model = fused()
    with torch.no_grad():
        model.bank.models[1].get_output_embeddings().weight[3, 5] += 1e-4
    changed = describe_specialists(model)
    assert changed["specialists.a"] == before["specialists.a"]
    assert changed["specialists.b"] != before["specialists.b"]
    assert describe_specialists(fused(rms_norm_eps=1e-3))["specialists.b"] != before["specialists.b"]
    model = fused()
    model.config.specialists[1]["model_config"]["transformers_version"] = "0.0.0"
    assert describe_specialists(model) == before


def test_tokens_are_what_is_read_and_predicted():
    row = EncodedConversation(
        input_ids=([1, 2, 3], [4, 2, 3]), response_positions=([0, 1], [0, 1]), labels=[2, 3]
    )
    other = EncodedConversation(([1, 2, 3], [5, 2, 3]), row.response_positions, row.labels)
    assert describe_tokens([row, other]) == describe_tokens([row, other])
    assert (
        len({describe_tokens(rows)["tokens"] for rows in ([row], [other], [row, other], [other, row])}) == 4
    )


def test_files_are_named_with_their_domain(tmp_path):
    for name, content in (("a", "x" * 1234), ("b", "y")):
        (tmp_path / name).write_text(content)
    described = describe_files({"code": [tmp_path / "a"], "text": [tmp_path / "a", tmp_path / "b"]})
    assert list(described) == [
        f"data.{domain} ({tmp_path / name})" for domain, name in (("code", "a"), ("text", "a"), ("text", "b"))
    ]
    first, second, third = described.values()
    assert first == second != third
    assert first.startswith("1,234 bytes, sha256 ")
