"""A fused model gives what its parts give: the promises that everything else stands on.

Exact means here: float32 on the CPU, logits within 1e-5 of logits of size 1 to 10, identical tokens. References are
plain Hugging Face and PEFT models; nothing of this package computes them.
"""

import copy
from pathlib import Path

import pytest
import torch
from conftest import favour, fused_over, randomise_gate, save_adapter, save_model, tiny_model
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from ultrafuser import SpecialistSource, fuse
from ultrafuser.errors import ShapeError, UltrafuserError
from ultrafuser.fusion import fuse_logits
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import ConversationEncoder, resolve_template

EXACT = {"rtol": 1e-5, "atol": 1e-5}
NEW_TOKENS = 10


def batch(rows: int = 3, length: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask; every row but the first is padded on the left."""
    ids = torch.randint(4, 300, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return ids * mask, mask


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def logits_of(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at the real tokens; absolute positions count tokens, as they do in `generate`."""
    return model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)).logits[mask.bool()]


# --- one specialist is plain Hugging Face -----------------------------------------------------------------------


@pytest.fixture(
    scope="module",
    params=[
        ("llama", {}), ("llama", {"tied": True}), ("qwen2", {}), ("qwen2", {"tied": True}), ("gpt_neox", {}),
        ("gpt2", {"tied": True}), ("cohere", {"tied": True}), ("phi", {}),
    ],
    ids=lambda param: param[0] + ("-tied" if param[1] else ""),
)  # fmt: skip
def single(request):
    """A plain model and the fused model of that one specialist."""
    plain = tiny_model(request.param[0], **request.param[1])
    return plain, fused_over(WholeSpecialists({"only": plain}))


def test_one_specialist_has_the_same_logits_and_loss(single):
    plain, fused = single
    ids, mask = batch()
    expected = logits_of(plain, ids, mask)
    assert 1 < expected.abs().max() < 20
    assert torch.allclose(logits_of(fused, ids, mask), expected, **EXACT)
    whole = ids[:1]
    labels = whole.clone()
    labels[0, :3] = -100
    with torch.no_grad():
        mine = fused(input_ids=whole, labels=labels, return_logits=True)
        theirs = plain(input_ids=whole, labels=labels)
    assert torch.allclose(mine.loss, theirs.loss, **EXACT)
    assert torch.allclose(mine.logits, theirs.logits, **EXACT)
    assert torch.equal(mine.gate_weights, torch.ones(1, 8, 1))


GENERATION = {
    "greedy": {"do_sample": False},
    "without cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several samples": {"do_sample": True, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "penalties": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("how", GENERATION)
def test_one_specialist_generates_the_same_tokens(single, how):
    plain, fused = single
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "pad_token_id": 0, **GENERATION[how]}
    torch.manual_seed(7)
    expected = plain.generate(ids, **settings)
    torch.manual_seed(7)
    assert torch.equal(fused.generate(ids, **settings), expected)
    assert expected.shape[1] > ids.shape[1] + 2  # not ended at once


def test_one_specialist_speculates_with_prompt_lookup(single):
    plain, fused = single
    ids = batch(rows=1)[0].repeat(1, 3)
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
        "prompt_lookup_num_tokens": 3,
    }
    assert torch.equal(fused.generate(ids, **settings), plain.generate(ids, **settings))


def test_one_specialist_goes_on_from_a_cache(single):
    """As a chat does that hands the cache of one answer to the next question."""
    plain, fused = single
    ids, new = batch(rows=1)[0], torch.tensor([[44, 55, 66]])
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
    rows = []
    for model in (plain, fused):
        first = model.generate(ids, **settings)
        longer = torch.cat([first.sequences, new], dim=1)
        again = model.generate(longer, past_key_values=first.past_key_values, **settings)
        rows.append(again.sequences)
    assert torch.equal(*rows)


# --- several whole specialists ----------------------------------------------------------------------------------

FAMILY = {"text": ("llama", 1), "code": ("qwen2", 2), "math": ("gpt2", 3)}  # gpt2: absolute positions


@pytest.fixture(scope="module")
def plain_models():
    """Three architectures, two widths, one vocabulary."""
    return {name: tiny_model(architecture, seed=seed) for name, (architecture, seed) in FAMILY.items()}


@pytest.fixture(scope="module")
def whole(plain_models):
    return fused_over(WholeSpecialists(plain_models), gate_form="per_specialist")


@pytest.mark.parametrize("form", ["per_specialist", "joint"])
def test_a_one_hot_gate_is_that_specialist(plain_models, form):
    fused = fused_over(WholeSpecialists(plain_models), gate_form=form)
    ids, mask = batch()
    settings = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    for index, plain in enumerate(plain_models.values()):
        favour(fused, index)
        assert torch.allclose(logits_of(fused, ids, mask), logits_of(plain, ids, mask), **EXACT)
        assert torch.equal(fused.generate(ids, **settings), plain.generate(ids, **settings))


@pytest.mark.parametrize("form", ["per_specialist", "joint"])
def test_an_untrained_gate_is_the_uniform_average(plain_models, form):
    fused = fused_over(WholeSpecialists(plain_models), gate_form=form, trained=False)
    ids, mask = batch()
    each = torch.stack([logits_of(plain, ids, mask) for plain in plain_models.values()])
    assert torch.allclose(logits_of(fused, ids, mask), each.mean(0), **EXACT)
    assert torch.allclose(fuse_logits(each, torch.full((each.shape[1], 3), 1 / 3)), each.mean(0), **EXACT)


def hand_weights(fused, states: list[Tensor]) -> Tensor:
    """Gate weights from the gate's bare numbers: (..., N)."""
    scores = []
    for index, state in enumerate(states):
        first, _, last = fused.gate.networks[index if fused.gate.form == "per_specialist" else 0]
        scores.append((state @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias)
    return torch.cat(scores, dim=-1).softmax(-1)


@torch.no_grad()
def hand_logits(fused, models: list, prompts: list[list[int]], response: list[int]) -> Tensor:
    """Fused next-token logits at every position that predicts a response token and behind it: (R + 1, V)."""
    logits, states = [], []
    for model, prompt in zip(models, prompts, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        logits.append(model(input_ids=ids).logits[0, len(prompt) - 1 :])
        states.append(base_of(model)(input_ids=ids).last_hidden_state[0, len(prompt) - 1 :])
    weights = hand_weights(fused, states)
    return sum(weights[:, [index]] * each for index, each in enumerate(logits))


def base_of(model):
    """The plain model below the head, also of a PEFT model."""
    return (model.get_base_model() if isinstance(model, PeftModel) else model).base_model


def hand_greedy(fused, models: list, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[int]:
    """The slow, obvious loop: no batch, no cache, no padding."""
    response: list[int] = []
    while len(response) < new_tokens and (not response or response[-1] != 3):
        response.append(int(hand_logits(fused, models, prompts, response)[-1].argmax()))
    return response


# --- adapters ---------------------------------------------------------------------------------------------------

ADAPTERS = {
    "text": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "code": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear"},
    "math": {"r": 2, "lora_alpha": 4, "target_modules": ["down_proj", "k_proj"], "layers_to_transform": [1]},
    "bare": None,
}


@pytest.fixture(scope="module", params=[("llama", True), ("llama", False), ("qwen2", True)], ids=str)
def folders(request, tmp_path_factory, tokenizer):
    """Sources of three adapters and their bare base, as a user has them."""
    architecture, tied = request.param
    root: Path = tmp_path_factory.mktemp(architecture)
    base = tiny_model(architecture, tied=tied, seed=5)
    model = save_model(root / "base", base, tokenizer)
    return {
        name: SpecialistSource(
            model=model, adapter=None if lora is None else save_adapter(root / name, base, seed=seed, **lora)
        )
        for seed, (name, lora) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def peft_models(folders):
    """The references, name -> plain or PEFT model."""
    models = {}
    for name, source in folders.items():
        base = AutoModelForCausalLM.from_pretrained(source.model)
        models[name] = (
            base if source.adapter is None else PeftModel.from_pretrained(base, source.adapter)
        ).eval()
    return models


@pytest.fixture(scope="module")
def adapters(folders):
    fused = fuse(folders, gate_form="per_specialist", gate_size=16).model
    assert isinstance(fused.bank, AdapterSpecialists)
    return fused


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_the_adapter_bank_is_peft(adapters, peft_models, grad):
    ids, mask = batch()
    for index, (name, plain) in enumerate(peft_models.items()):
        expected = logits_of(plain, ids, mask)
        assert name == "bare" or (expected - logits_of(peft_models["bare"], ids, mask)).abs().max() > 0.5
        favour(adapters, index)
        for layer in adapters.bank.folded_layers:
            layer.requires_grad_(grad)  # both ways of computing the low-rank parts
        with torch.set_grad_enabled(grad):
            logits = adapters(input_ids=ids, attention_mask=mask).logits
        assert logits.requires_grad == grad
        # Sums are taken in another order: with AVX2 alone they come out up to 2e-5 apart (the next test is sharper).
        assert torch.allclose(logits[mask.bool()], expected, rtol=1e-5, atol=3e-5), name


def test_the_adapter_bank_is_peft_in_double_precision(folders, peft_models):
    fused = fuse(folders, gate_form="per_specialist", gate_size=16, dtype=torch.float64).model
    ids, mask = batch()
    for index, (name, plain) in enumerate(peft_models.items()):
        favour(fused, index)
        expected = logits_of(copy.deepcopy(plain).double(), ids, mask)
        assert expected.dtype == torch.float64
        # Not closer: norms and softmax of the architecture itself compute in float32.
        assert torch.allclose(logits_of(fused, ids, mask), expected, rtol=0, atol=5e-6), name


def test_the_adapter_bank_is_the_whole_bank_with_merged_adapters(adapters, folders):
    whole = fuse(folders, bank="whole", gate_form="per_specialist", gate_size=16).model
    assert isinstance(whole.bank, WholeSpecialists)
    randomise_gate(adapters.gate)
    whole.gate.load_state_dict(adapters.gate.state_dict())
    ids, mask = batch()
    assert torch.allclose(logits_of(whole, ids, mask), logits_of(adapters, ids, mask), **EXACT)
    settings = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    assert torch.equal(whole.generate(ids, **settings), adapters.generate(ids, **settings))


def test_adapter_gradients_are_pefts(folders, peft_models):
    """One one-hot specialist after the other: its adapter gets PEFT's gradients, the others none."""
    fused = fuse(folders, gate_form="per_specialist", gate_size=16).model
    fused.requires_grad_(False)
    for parameter in fused.bank.lora_parameters():
        parameter.requires_grad_(True)
    ids, mask = batch()
    labels = ids.masked_fill(mask == 0, -100)
    for index, (name, plain) in enumerate(peft_models.items()):
        if name == "bare":
            continue
        favour(fused, index)
        fused.zero_grad()
        fused(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        plain = copy.deepcopy(plain)
        for parameter_name, parameter in plain.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
        plain(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        theirs = {
            key.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
            for key, parameter in plain.named_parameters()
            if parameter.grad is not None
        }
        mine = {}
        rank = fused.bank.adapter_configs[name]["r"]
        for layer in fused.bank.folded_layers:
            for path, down, up in layer.lora_tensors():
                mine[f"{path}.lora_A.weight"] = down.grad[index, :rank]
                mine[f"{path}.lora_B.weight"] = up.grad[index, :, :rank]
                for grad in (down.grad, up.grad):
                    assert torch.equal(
                        grad[[n for n in range(4) if n != index]].abs().max(), torch.tensor(0.0)
                    )
        assert theirs.keys() <= mine.keys()
        for key, grad in theirs.items():
            assert torch.allclose(mine[key], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max())), key


def test_gradient_checkpointing_changes_nothing(folders):
    fused = fuse(folders, gate_form="shared", gate_size=16).model.train()
    randomise_gate(fused.gate)
    fused.requires_grad_(False)
    trained = [*fused.bank.lora_parameters(), *fused.gate.parameters()]
    ids, mask = batch()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            fused.gradient_checkpointing_enable({"use_reentrant": False})
        for parameter in trained:
            parameter.requires_grad_(True).grad = None
        fused(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        grads.append([parameter.grad for parameter in trained])
    assert all(torch.allclose(a, b, **EXACT) for a, b in zip(*grads, strict=True))


# --- conversations: every specialist reads its own prompt -------------------------------------------------------

TEMPLATES = ["ultralm", "llama-instruct", "alpaca", "tokenizer"]
CONVERSATIONS = [
    [{"role": "user", "content": "Add 2 and 3."}],
    [
        {"role": "user", "content": "Name a colour, please, whichever you like best."},
        {"role": "assistant", "content": "Blue"},
        {"role": "user", "content": "Why?"},
    ],
]


@pytest.fixture(scope="module", params=["whole", "adapters"])
def conversing(request, tokenizer):
    """A fused model, the plain models, and an encoder with a template of its own for each specialist."""
    if request.param == "whole":
        models = request.getfixturevalue("plain_models")
        fused = fused_over(WholeSpecialists(models), gate_form="per_specialist")
    else:
        base = tiny_model("llama", seed=5, tied=True)
        root = request.getfixturevalue("tmp_path_factory").mktemp("adapters")
        models, parts = {}, {}
        for seed, name in enumerate(("text", "code", "math", "bare")):
            models[name], parts[name] = copy.deepcopy(base), Adapter.bare()
            if ADAPTERS[name] is not None:
                folder = Path(save_adapter(root / name, base, seed=seed, **ADAPTERS[name]))
                models[name] = PeftModel.from_pretrained(models[name], folder).eval()
                parts[name] = Adapter.from_folder(folder)
        fused = fused_over(AdapterSpecialists(base, parts))
    templates = dict(zip(models, TEMPLATES, strict=False))
    encoder = ConversationEncoder(
        tokenizer,
        {name: resolve_template(template, tokenizer) for name, template in templates.items()},
        end_token_id=3,
        max_length=256,
    )
    return fused, list(models.values()), encoder


def response_of(sequence: Tensor, prompt: Tensor) -> list[int]:
    """The generated tokens, up to the end token."""
    tokens = sequence[prompt.shape[-1] :].tolist()
    return tokens[: tokens.index(3) + 1] if 3 in tokens else tokens


GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def test_prompts_of_different_lengths_generate_what_the_plain_loop_does(conversing):
    fused, models, encoder = conversing
    expected = []
    for messages in CONVERSATIONS:
        prompts = encoder.prompt(messages)
        assert len({len(prompt) for prompt in prompts}) == len(prompts)
        expected.append(hand_greedy(fused, models, prompts))
        alone = encoder.batch_prompts([messages])
        assert response_of(fused.generate(**alone, **GREEDY)[0], alone["input_ids"]) == expected[-1]
    assert expected[0] != expected[1]
    both = encoder.batch_prompts(CONVERSATIONS)
    for settings in ({}, {"use_cache": False}):
        rows = fused.generate(**both, **GREEDY, **settings)
        assert torch.equal(rows[:, : both["input_ids"].shape[1]], both["input_ids"])
        assert [response_of(row, both["input_ids"]) for row in rows] == expected


def test_sampling_beams_and_lookup_work_on_prompts_of_their_own(conversing):
    fused, _, encoder = conversing
    alone, both = encoder.batch_prompts(CONVERSATIONS[:1]), encoder.batch_prompts(CONVERSATIONS)
    for how in ("sampling", "several samples", "beams", "penalties"):
        settings = {"max_new_tokens": NEW_TOKENS, **GENERATION[how]}
        rows = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            rows.append(fused.generate(**both, **settings, use_cache=use_cache))
        assert torch.equal(*rows), how
        assert rows[0].shape[0] == 2 * settings.get("num_return_sequences", 1)
    lookup = fused.generate(**alone, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, fused.generate(**alone, **GREEDY))


def test_prompts_of_their_own_need_input_ids_and_an_empty_cache(conversing):
    fused, _, encoder = conversing
    prompt = encoder.batch_prompts(CONVERSATIONS[:1])
    first = fused.generate(**prompt, **GREEDY, return_dict_in_generate=True)
    with pytest.raises(UltrafuserError, match=r"always read from their beginning. Leave past_key_values out"):
        fused.generate(**prompt, **GREEDY, past_key_values=first.past_key_values)
    own = {key: tensor for key, tensor in prompt.items() if key.startswith("specialist")}
    with pytest.raises(UltrafuserError, match="need input_ids beside them"):
        fused.generate(**own, **GREEDY)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "give exactly one of input_ids"),
        (["input_ids", "specialist_input_ids"], "give exactly one of input_ids"),
        (
            ["too many"],
            r"specialist_input_ids must be \(B, N, \.\.\.\) with N = \d specialists, got \(1, 9, 5\)",
        ),
        (["positions"], r"response_positions must be \(B, N, \.\.\.\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(conversing, given, message):
    fused = conversing[0]
    ids = torch.ones(1, fused.num_specialists, 5, dtype=torch.int64)
    inputs = {
        "input_ids": {"input_ids": ids[:, 0]},
        "specialist_input_ids": {"specialist_input_ids": ids},
        "too many": {"specialist_input_ids": torch.ones(1, 9, 5, dtype=torch.int64)},
        "positions": {"specialist_input_ids": ids, "response_positions": ids[:, 0]},
    }
    with pytest.raises(ShapeError, match=message):
        fused(**{key: tensor for name in given for key, tensor in inputs[name].items()})


def test_a_streamer_gets_the_tokens_as_they_come(conversing):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.extend(value.flatten().tolist())

        def end(self):
            self.ended = True

    fused, _, encoder = conversing
    prompt, streamer = encoder.batch_prompts(CONVERSATIONS[:1]), Collector()
    row = fused.generate(**prompt, **GREEDY, streamer=streamer)[0]
    assert streamer.tokens == row.tolist()
    assert streamer.ended


ANSWERED = [
    [*CONVERSATIONS[0], {"role": "assistant", "content": "5"}],
    [*CONVERSATIONS[1], {"role": "assistant", "content": "It is calm."}],
]


def test_the_loss_of_encoded_conversations_is_the_plain_formula(conversing):
    """Also of several turns in one conversation, where every specialist has its own text between responses."""
    fused, models, encoder = conversing
    encoded = [encoder.encode(messages) for messages in ANSWERED]
    losses, weights = [], []
    for item in encoded:
        logits, states = [], []
        for model, ids, places in zip(models, item.input_ids, item.response_positions, strict=True):
            with torch.no_grad():
                logits.append(model(input_ids=torch.tensor([ids])).logits[0, places])
                states.append(base_of(model)(input_ids=torch.tensor([ids])).last_hidden_state[0, places])
        weights.append(hand_weights(fused, states))
        mixed = sum(weights[-1][:, [j]] * each for j, each in enumerate(logits))
        losses.append(torch.nn.functional.cross_entropy(mixed, torch.tensor(item.labels), reduction="none"))
    batch = encoder.collate(encoded)
    with torch.no_grad():
        output = fused(**batch)
        states = fused.hidden_states(
            batch["specialist_input_ids"], batch["specialist_attention_mask"], batch["response_positions"]
        )
        cached = fused(specialist_hidden_states=states, labels=batch["labels"])
        scaled = fused(**batch, num_items_in_batch=100)
    count = sum(len(item.labels) for item in encoded)
    assert torch.allclose(output.loss, torch.cat(losses).mean(), **EXACT)
    assert torch.allclose(scaled.loss * 100, output.loss * count, **EXACT)
    assert torch.allclose(cached.loss, output.loss, **EXACT)
    assert output.logits is None
    for row, expected in enumerate(weights):
        assert torch.allclose(output.gate_weights[row, : len(expected)], expected, **EXACT)


def test_frozen_specialists_keep_no_graph_and_the_gate_still_learns(conversing):
    fused, _, encoder = conversing
    batch = encoder.collate([encoder.encode(messages) for messages in ANSWERED])
    trainable = [parameter for parameter in fused.parameters() if parameter.requires_grad]
    fused.bank.requires_grad_(False)
    try:
        fused.zero_grad()
        fused(**batch).loss.backward()
        learned = [parameter.grad for parameter in fused.gate.parameters()]
        fused.zero_grad()
        states = fused.hidden_states(
            batch["specialist_input_ids"], batch["specialist_attention_mask"], batch["response_positions"]
        )
        assert not any(state.requires_grad for state in states)
        fused(specialist_hidden_states=states, labels=batch["labels"]).loss.backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    for parameter, grad in zip(fused.gate.parameters(), learned, strict=True):
        assert torch.allclose(parameter.grad, grad, **EXACT)
    assert any(grad.abs().max() > 0 for grad in learned)


# --- cached equals uncached, batched equals single --------------------------------------------------------------


@pytest.mark.parametrize("steps", [(5, 1, 1, 1), (3, 5), (8,)])
def test_cached_equals_uncached_and_batched_equals_single(conversing, steps):
    fused = conversing[0]
    ids, mask = batch()
    expected = logits_of(fused, ids, mask)
    cache, pieces, start = fused.new_cache(), [], 0
    with torch.no_grad():
        for step in steps:
            part = slice(start, start + step)
            output = fused(ids[:, part], attention_mask=mask[:, : part.stop], past_key_values=cache)
            pieces.append(output.logits)
            start += step
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 8
    assert torch.allclose(torch.cat(pieces, dim=1)[mask.bool()], expected, **EXACT)
    alone = [logits_of(fused, ids[[r]][:, mask[r].bool()], mask[[r]][:, mask[r].bool()]) for r in range(3)]
    assert torch.allclose(torch.cat(alone), expected, **EXACT)


def test_logits_to_keep_are_the_last_ones(whole):
    ids, _ = batch()
    with torch.no_grad():
        everything = whole(ids)
        last = whole(ids, logits_to_keep=2)
        chosen = whole(ids, logits_to_keep=torch.tensor([1, 4]))
    assert torch.allclose(last.logits, everything.logits[:, -2:], **EXACT)
    assert torch.allclose(last.gate_weights, everything.gate_weights[:, -2:], **EXACT)
    assert torch.allclose(chosen.logits, everything.logits[:, [1, 4]], **EXACT)
