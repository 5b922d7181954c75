"""Reading piece by piece, raggedly, with positions taken back and slots moved, is reading the whole text at once."""

import random

import pytest
import torch
from conftest import random_adapter, tiny_model
from torch import Tensor

from ultrafuser.decoding import backbones
from ultrafuser.decoding.backbones import Backbone, LlamaBackbone, ModuleBackbone, Slots, open_backbones
from ultrafuser.errors import UltrafuserError
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.specialists import AdapterSpecialists, SpecialistBank, WholeSpecialists

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MIXED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": None}),
    "mistral with a window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "qwen2 with a window in one layer": ("qwen2", MIXED),
    "llama of another activation": ("llama", {"hidden_act": "gelu"}),
    "llama of dynamic positions": ("llama", {"rope_parameters": {**LLAMA3_ROPE, "rope_type": "dynamic"}}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "phi": ("phi", {}),
    "cohere": ("cohere", {}),
    "qwen3": ("qwen3", {"head_dim": 16, "num_key_value_heads": 2}),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),  # adds masks to scores
}
JOINED = {"llama", "llama with biases", "llama with scaled positions", "qwen2", "mistral"}
WITH_ADAPTERS = ["llama", "llama with biases", "mistral", "gpt_neox", "phi", "mistral with a window"]


def whole(name: str) -> SpecialistBank:
    architecture, settings = MODELS[name]
    return WholeSpecialists({"only": tiny_model(architecture, seed=1, **settings)})


def folded(name: str) -> SpecialistBank:
    architecture, settings = MODELS[name]
    base = tiny_model(architecture, seed=1, **settings)
    adapters = {
        "a": random_adapter(base, seed=1),
        "b": random_adapter(base, seed=2, r=2),
        "c": Adapter.bare(),
    }
    return AdapterSpecialists(base, adapters)


@pytest.fixture(
    scope="module",
    params=[(whole, name) for name in MODELS] + [(folded, name) for name in WITH_ADAPTERS],
    ids=lambda param: f"{param[1]}, {param[0].__name__}",
)
def bank(request):
    build, name = request.param
    made = build(name)
    [backbone] = open_backbones(made)
    assert isinstance(backbone, LlamaBackbone if name in JOINED else ModuleBackbone)
    assert backbone.rows_per_slot == made.num_specialists
    return made


class Reader:
    """A backbone, and what every row of every slot has read.

    Args:
        bank: of one model.
        seed: of what is read when.
    """

    def __init__(self, bank: SpecialistBank, seed: int = 0) -> None:
        self.bank = bank
        self.backbone: Backbone = open_backbones(bank)[0]
        self.choice = random.Random(seed)
        self.texts: dict[int, list[list[int]]] = {}

    @torch.inference_mode()
    def read(self, slots: list[int], starts: list[list[int]], new: list[list[list[int]]]) -> None:
        """Read new tokens of each row from a position on, and compare with reading everything at once."""
        length = max(len(row) for rows in new for row in rows)
        padded = [[[*row, *self.tokens(length - len(row))] for row in rows] for rows in new]
        states = self.backbone.read(torch.tensor(padded), Slots(slots), torch.tensor(starts))
        assert states.shape[:3] == (len(slots), self.bank.num_specialists, length)
        for index, slot in enumerate(slots):
            before = self.texts.get(slot, [[] for _ in new[index]])
            self.texts[slot] = [
                [*text[:start], *row]
                for text, start, row in zip(before, starts[index], new[index], strict=True)
            ]
            for row, expected in enumerate(self.expected(slot)):
                start, count = starts[index][row], len(new[index][row])
                assert torch.allclose(states[index, row, :count], expected[start:], atol=5e-4)  # of size 1

    def expected(self, slot: int) -> list[Tensor]:
        """Hidden states of every row's text, read at once."""
        texts = self.texts[slot]
        length = max(len(text) for text in texts)
        ids = torch.tensor([[[*text, *[4] * (length - len(text))] for text in texts]])
        return [state[0, : len(text)] for state, text in zip(self.bank(ids), texts, strict=True)]

    def read_somewhere(self, num_slots: int) -> None:
        """Some slots in any order; rows go on, or from a little earlier."""
        slots = self.choice.sample(range(num_slots), self.choice.randint(1, num_slots))
        if self.choice.random() < 0.5:
            slots.sort()
        length, back = self.choice.randint(1, 4), self.choice.choice([0, 0, 3])
        starts, new = [], []
        for slot in slots:
            lengths = [len(text) for text in self.texts[slot]]
            starts.append([max(1, size - self.choice.randint(0, back)) for size in lengths])
            new.append([self.tokens(self.choice.randint(1, length)) for _ in lengths])
        self.read(slots, starts, new)

    def tokens(self, count: int) -> list[int]:
        return self.choice.choices(range(4, 300), k=count)


@pytest.mark.parametrize("seed", [0, 1])
def test_reading_in_pieces_is_reading_at_once(bank, seed, monkeypatch):
    monkeypatch.setattr(backbones, "_GROW_POSITIONS", 8)
    reader, rows = Reader(bank, seed), range(bank.num_specialists)
    for slots in ([0, 1], [2]):
        prompts = [[reader.tokens(reader.choice.randint(2, 9)) for _ in rows] for _ in slots]
        reader.read(slots, [[0 for _ in rows] for _ in slots], prompts)
    for step in range(16):
        reader.read_somewhere(3)
        if step in (4, 8):
            with torch.inference_mode():
                reader.backbone.move(2, 0, max(len(text) for text in reader.texts[2]))
            reader.texts[0] = reader.texts[2]
    assert max(len(text) for texts in reader.texts.values() for text in texts) > 16  # has grown


def test_rows_of_one_length_read_as_any(bank):
    """One slice for all, without a mask where none is needed."""
    reader, rows = Reader(bank), range(bank.num_specialists)
    reader.read([0, 1], [[0 for _ in rows]] * 2, [[reader.tokens(6) for _ in rows] for _ in range(2)])
    for length in (1, 1, 3, 1):
        reader.read(
            [0, 1],
            [[len(text) for text in reader.texts[slot]] for slot in (0, 1)],
            [[reader.tokens(length) for _ in rows] for _ in range(2)],
        )


def test_a_freed_slot_is_read_from_its_beginning(bank):
    reader, rows = Reader(bank), range(bank.num_specialists)
    for length in (9, 3, 12):
        reader.read([1], [[0 for _ in rows]], [[reader.tokens(length) for _ in rows]])
        reader.read([1], [[length for _ in rows]], [[reader.tokens(2) for _ in rows]])


def test_padding_may_go_beyond_the_last_position():
    reader = Reader(WholeSpecialists({"only": tiny_model("gpt2", n_positions=8)}))
    reader.read([0, 1], [[0], [0]], [[reader.tokens(8)], [reader.tokens(4)]])
    reader.read([0, 1], [[7], [4]], [[reader.tokens(1)], [reader.tokens(4)]])


def test_other_kinds_of_layers_are_refused():
    layers = {"layer_types": ["full_attention", "linear_attention"], "linear_num_value_heads": 4}
    model = tiny_model("qwen3_next", num_experts=4, head_dim=8, num_key_value_heads=2, **layers)
    with pytest.raises(UltrafuserError, match="layers of the kind 'linear_attention'; the decoding engine"):
        ModuleBackbone(model, 1)


def test_slots_are_a_slice_where_they_can_be():
    assert Slots([2, 3, 4]).index == slice(2, 5)
    assert Slots([5]).index == slice(5, 6)
    for indices in ([3, 2], [0, 2]):
        slots = Slots(indices)
        assert slots.index.tolist() == slots.indices == indices
        assert len(slots) == 2


# --- the cache ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_the_cache_grows_as_it_is_written(monkeypatch):
    monkeypatch.setattr(backbones, "_GROW_POSITIONS", 4)
    cache = backbones.SlotCache(2, 2, torch.float32, torch.device("cpu"))
    assert cache.num_bytes == 0
    sizes = []
    for length in range(1, 20):
        plan = backbones._Plan(Slots([0]), torch.full((1, 2), length - 1), 1, torch.device("cpu"))
        new = torch.full((1, 2, 1, 3, 5), float(length))
        keys, values = cache.write(0, new, plan), cache.write(1, 10 * new, plan)
        assert keys.shape == (2, 3, length, 5)
        assert keys[1, 2, :, 4].tolist() == [float(n + 1) for n in range(length)]
        assert torch.equal(values, 10 * keys)
        sizes.append(cache.num_bytes)
    assert sizes == sorted(sizes)
    per_position = 2 * 2 * 3 * 5 * 4  # keys and values, rows, heads, head size, bytes
    assert sizes[-1] <= 28 * per_position
    assert len(set(sizes)) < 7  # not with every position
