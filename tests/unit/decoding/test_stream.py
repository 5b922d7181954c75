"""Streaming gives the tokens of `generate`, and text that never breaks a character."""

import pytest
import torch
from conftest import fused_over, save_adapter, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from ultrafuser.decoding.stream import TextStream, stream_tokens, token_texts
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import BUILTIN_TEMPLATES, ConversationEncoder

QUESTION = [{"role": "user", "content": "Count to ten, please."}]
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["whole", "adapters"])
def model(request, tmp_path_factory):
    if request.param == "whole":
        return fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model("qwen2", seed=2)}))
    base = tiny_model(seed=3)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, base)
    return fused_over(AdapterSpecialists(base, {"a": Adapter.from_folder(folder), "b": Adapter.bare()}))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    templates = {"a": BUILTIN_TEMPLATES["alpaca"], "b": BUILTIN_TEMPLATES["ultralm"]}
    return ConversationEncoder(tokenizer, templates, end_token_id=3, max_length=256)


@pytest.fixture(scope="module")
def prompt(encoder):
    return encoder.batch_prompts([QUESTION])


def generated(model, prompt, **settings):
    sequences = model.generate(**prompt, max_new_tokens=NEW_TOKENS, **settings)
    return sequences[0, prompt["input_ids"].shape[1] :].tolist()


def streamed(model, prompt, **settings):
    settings = {"max_new_tokens": NEW_TOKENS, **settings}
    return [step.token_id for step in stream_tokens(model, prompt, **settings)]


def test_greedy_tokens_are_those_of_generate(model, prompt):
    assert streamed(model, prompt) == generated(model, prompt, do_sample=False)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
        {"temperature": 2.0, "top_k": 3},
        {"temperature": 1.0, "top_p": 0.0},
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_samples_are_those_of_generate(model, prompt, settings, seed):
    torch.manual_seed(seed)
    expected = generated(model, prompt, do_sample=True, **{"top_p": 1.0, "top_k": 0, **settings})
    assert streamed(model, prompt, seed=seed, **settings) == expected


def test_zero_means_zero(model, prompt):
    greedy = streamed(model, prompt)
    assert streamed(model, prompt, max_new_tokens=0) == []
    assert streamed(model, prompt, temperature=0, top_p=0.5, top_k=5, seed=9) == greedy
    assert streamed(model, prompt, temperature=5.0, top_p=0.0) == greedy
    assert streamed(model, prompt, temperature=5.0, top_k=1) == greedy
    assert streamed(model, prompt, temperature=5.0, top_k=0) != greedy


def test_stops_behind_the_end_token(model, prompt):
    # The best token of the first step, made the end token, ends the response with itself.
    first = streamed(model, prompt, max_new_tokens=1)
    model.config.end_token_id = first[0]
    try:
        assert streamed(model, prompt) == first
    finally:
        model.config.end_token_id = 3


def test_weights_are_those_of_the_gate(model, prompt):
    steps = list(stream_tokens(model, prompt, max_new_tokens=5))
    ids, read = prompt["specialist_input_ids"], torch.tensor([[s.token_id for s in steps[:-1]]])
    together = torch.cat([ids, read[:, None].expand(-1, 2, -1)], dim=-1)
    mask = torch.cat(
        [prompt["specialist_attention_mask"], torch.ones_like(read)[:, None].expand(-1, 2, -1)], -1
    )
    positions = torch.arange(ids.shape[-1] - 1, together.shape[-1]).expand(1, 2, -1)
    with torch.no_grad():
        expected = model.gate(model.hidden_states(together, mask, positions))[0]
    assert torch.allclose(torch.tensor([step.gate_weights for step in steps]), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["a", "b"])
def test_only_is_one_specialist_alone(model, prompt, name):
    index = ["a", "b"].index(name)
    length = int(prompt["specialist_attention_mask"][0, index].sum())
    own_ids = prompt["specialist_input_ids"][:, index, -length:]
    if isinstance(model.bank, WholeSpecialists):
        alone = model.bank.models[index]
    else:
        alone = tiny_model(seed=3)
        alone.load_state_dict(model.bank.merged_tensors(name), strict=False)
    expected = alone.generate(own_ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, length:].tolist()
    steps = list(stream_tokens(model, prompt, max_new_tokens=NEW_TOKENS, only=name))
    assert [step.token_id for step in steps] == expected
    assert {step.gate_weights for step in steps} == {(1.0 - index, float(index))}


def test_a_caller_is_not_left_in_inference_mode(model, prompt):
    for _ in stream_tokens(model, prompt, max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "got temperature -1.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k -1"),
        ({"only": "c"}, "no specialist 'c'; there are a, b"),
    ],
)
def test_refuses_settings_at_once(model, prompt, settings, message):
    with pytest.raises(UltrafuserError, match=message):
        stream_tokens(model, prompt, max_new_tokens=1, **settings)


def test_refuses_more_than_one_prompt(model, encoder):
    with pytest.raises(UltrafuserError, match="1 prompt at a time, got 2"):
        stream_tokens(model, encoder.batch_prompts([QUESTION, QUESTION]), max_new_tokens=1)


# --- text -----------------------------------------------------------------------------------------


def test_holds_back_a_character_until_it_is_whole(tokenizer):
    ids = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "", "", "🙂", "b"]
    assert stream.flush() == ""


def test_shows_what_stays_broken_at_the_end(tokenizer):
    *broken, _ = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token_id) for token_id in broken) == ""
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_goes_on_after_a_broken_character(tokenizer):
    smile = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token_id) for token_id in [*smile[:-1], *smile, *smile])
    assert text.endswith("🙂🙂")


def test_special_tokens_are_no_text(tokenizer):
    ids = tokenizer("Hi<|im_end|>", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == "Hi"
    assert "".join(token_texts(tokenizer, ids)) == "Hi<|im_end|>"


@given(text=st.text(max_size=40))
def test_texts_of_tokens_make_up_the_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
