"""The fused cache: rows chosen, repeated and taken back are as if they had been read that way."""

import pytest
import torch
from conftest import fused_over, randomise_gate, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.cache import ROOM_POSITIONS, FusedCache, RoomyLayer
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module", params=["whole", "adapters", "one"])
def fused(request):
    if request.param == "adapters":
        base = tiny_model("llama")
        adapters = {name: Adapter.initial(base, LORA, seed) for seed, name in enumerate("abc")}
        bank = AdapterSpecialists(base, adapters)
        with torch.no_grad():
            for layer in bank.folded_layers:
                for index, up in enumerate(layer.lora_B):
                    up.normal_(generator=torch.Generator().manual_seed(index), std=0.3)
        return fused_over(bank)
    count = 1 if request.param == "one" else 3
    return fused_over(
        WholeSpecialists({name: tiny_model("llama", seed=i) for i, name in enumerate("abc"[:count])})
    )


@pytest.fixture
def prompts(fused):
    """Prompts of their own for each specialist: ids and mask, (B, N, T), padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 300, (3, fused.num_specialists, 7), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(3):
        for index in range(fused.num_specialists):
            mask[row, index, : row + index] = 0
    return ids, mask


NEXT = torch.tensor([[11, 45, 102], [7, 8, 9], [200, 31, 77]])


@torch.no_grad()
def read(fused, prompts, new, cache):
    """Prompt and new tokens into the cache; logits at the new tokens."""
    fused(specialist_input_ids=prompts[0], specialist_attention_mask=prompts[1], past_key_values=cache)
    return fused(input_ids=new, past_key_values=cache).logits


@torch.no_grad()
def go_on(fused, cache, tokens):
    return fused(input_ids=tokens, past_key_values=cache).logits


def close(a, b):
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_select_indices"])
@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2]])
def test_chosen_rows_go_on_as_if_they_had_been_alone(fused, prompts, method, rows):
    cache, chosen = fused.new_cache(), torch.tensor(rows)
    read(fused, prompts, NEXT[:, :2], cache)
    getattr(cache, method)(chosen)
    again = fused.new_cache()
    read(fused, [tensor[chosen] for tensor in prompts], NEXT[chosen, :2], again)
    tokens = NEXT[: len(rows), 2:]
    assert close(go_on(fused, cache, tokens), go_on(fused, again, tokens))
    assert close(go_on(fused, cache, tokens), go_on(fused, again, tokens))


def test_repeated_rows(fused, prompts):
    cache, again = fused.new_cache(), fused.new_cache()
    cache.batch_repeat_interleave(2)  # empty: nothing to repeat
    read(fused, prompts, NEXT[:, :2], cache)
    cache.batch_repeat_interleave(2)
    read(
        fused,
        [t.repeat_interleave(2, dim=0) for t in prompts],
        NEXT[:, :2].repeat_interleave(2, dim=0),
        again,
    )
    tokens = torch.arange(20, 26).unsqueeze(1)
    assert close(go_on(fused, cache, tokens), go_on(fused, again, tokens))


@pytest.mark.parametrize("how", [-2, 8])
def test_positions_taken_back(fused, prompts, how):
    cache, again = fused.new_cache(), fused.new_cache()
    cache.activate_past_recording()
    read(fused, prompts, NEXT, cache)
    assert cache.get_seq_length() == 10
    cache.crop(how)
    assert cache.get_seq_length() == 8
    assert cache.is_croppable
    read(fused, prompts, NEXT[:, :1], again)
    assert close(go_on(fused, cache, NEXT[:, :2]), go_on(fused, again, NEXT[:, :2]))
    cache.crop(0)
    assert cache.get_seq_length() == 10
    with pytest.raises(UltrafuserError, match="cannot crop to 11 positions, only 10 were read"):
        cache.crop(11)
    with pytest.raises(UltrafuserError, match="cannot crop to -1 positions, only 10 were read"):
        cache.crop(-11)


def test_reset_forgets_everything(fused, prompts):
    cache = fused.new_cache()
    expected = read(fused, prompts, NEXT, cache)
    assert cache.is_initialized
    cache.reset()
    assert not cache.is_initialized
    assert cache.get_seq_length() == 0
    assert close(read(fused, prompts, NEXT, cache), expected)


def test_padding_on_both_sides_and_positions():
    cache = FusedCache([], 2)
    mask, positions = cache.extend(torch.ones(1, 2, 3, dtype=torch.int64))
    assert mask is None
    assert positions.tolist() == [[[0, 1, 2]] * 2]
    mask, positions = cache.extend(torch.tensor([[[1, 1], [0, 1]]]))
    assert mask.tolist() == [[[1, 1, 1, 1, 1], [1, 1, 1, 0, 1]]]
    assert positions.tolist() == [[[3, 4], [2, 3]]]
    mask, positions = cache.extend(torch.ones(1, 2, 1, dtype=torch.int64))
    assert mask.shape == (1, 2, 6)
    assert positions.tolist() == [[[5], [4]]]


def test_a_new_token_that_is_padding_is_not_read():
    """One new position at a time, one of them padding: the mask must not be taken for full."""
    cache = FusedCache([], 1)
    cache.extend(torch.ones(2, 1, 3, dtype=torch.int64))
    mask, _ = cache.extend(torch.tensor([[[1]], [[0]]]))
    assert mask is not None
    assert mask[:, 0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_another_kind_of_cache_is_refused(fused):
    with pytest.raises(UltrafuserError, match=r"must be a FusedCache .*got DynamicCache"):
        fused(input_ids=NEXT, past_key_values=DynamicCache())
    with pytest.raises(UltrafuserError, match="cache_implementation must be None, got 'static'"):
        fused.generate(NEXT, cache_implementation="static", max_new_tokens=1)


def test_the_gate_sees_the_same_states_with_and_without_cache(fused, prompts):
    randomise_gate(fused.gate, seed=4)
    with torch.no_grad():
        whole = fused(specialist_input_ids=prompts[0], specialist_attention_mask=prompts[1])
        cache = fused.new_cache()
        cached = fused(
            specialist_input_ids=prompts[0], specialist_attention_mask=prompts[1], past_key_values=cache
        )
    assert close(cached.gate_weights, whole.gate_weights)


def states(length: int, rows: int = 2, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(
        rows, 3, length, 4, generator=torch.Generator().manual_seed(length), requires_grad=requires_grad
    )


def test_a_layer_with_room_holds_what_a_dynamic_layer_holds():
    roomy, plain = RoomyLayer(), DynamicLayer()
    steps = [
        *[lambda layer, n=n: layer.update(states(n), -states(n)) for n in (5, 1, 1, ROOM_POSITIONS, 2)],
        lambda layer: layer.crop(-3),
        lambda layer: layer.update(states(1), -states(1)),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1, 0])),
        lambda layer: layer.update(states(4, rows=3), -states(4, rows=3)),
        lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.update(states(1, rows=6), -states(1, rows=6)),
        lambda layer: layer.reset(),
        lambda layer: layer.update(states(3), -states(3)),
    ]
    with torch.no_grad():
        for step in steps:
            step(roomy)
            step(plain)
            assert roomy.get_seq_length() == plain.get_seq_length()
            if plain.is_initialized:
                assert torch.equal(roomy.keys, plain.keys)
                assert torch.equal(roomy.values, plain.values)


def test_a_decode_step_moves_nothing_until_the_room_is_full():
    layer = RoomyLayer()
    with torch.no_grad():
        layer.update(states(5), states(5))
        start = layer.keys.data_ptr()
        for _ in range(ROOM_POSITIONS):
            layer.update(states(1), states(1))
        assert layer.keys.data_ptr() == start
        layer.update(states(1), states(1))
        assert layer.keys.data_ptr() != start


def test_room_is_not_written_over_where_gradients_or_inference_mode_forbid_it():
    layer = RoomyLayer()
    with torch.inference_mode():
        layer.update(states(5), states(5))
    with torch.no_grad():
        layer.update(states(1), states(1))
    new = states(2, requires_grad=True)
    keys, _ = layer.update(new, new)
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))
    assert torch.equal(layer.keys, torch.cat([states(5), states(1), states(2)], dim=-2))
