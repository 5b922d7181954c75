"""The decoding engine gives what the slow loop in `decoding/reference.py` gives, and that gives what `generate` does.

Exact as in test_parity.py: float32 on the CPU, every greedy token and every seeded sample the same. Under speculation
greedy responses stay the same, and samples keep their distribution, which a chi-square test watches over.
"""

import copy
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from conftest import chi_square, fused_over, random_adapter, tiny_model

from ultrafuser.decoding import backbones, engine, projection
from ultrafuser.decoding.backbones import LlamaBackbone, ModuleBackbone, open_backbones
from ultrafuser.decoding.engine import FusedDecoder, TokenStep
from ultrafuser.decoding.reference import reference_tokens
from ultrafuser.decoding.sampling import Sampler, SamplingParams
from ultrafuser.decoding.speculation import DraftLength, SpeculationParams, accept
from ultrafuser.decoding.text import StoppedText
from ultrafuser.modeling.lora import Adapter
from ultrafuser.modeling.model import UltraFuserForCausalLM
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists
from ultrafuser.modeling.templates import BUILTIN_TEMPLATES, ConversationEncoder

Request = tuple[list[list[int]], SamplingParams]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tied": True},
    "qwen2": {},
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": None},
    "gpt_neox": {},
    "gpt2": {"tied": True},
    "cohere": {"tied": True},
    "phi": {},
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 6},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
}
LLAMA_LIKE = ("llama", "llama-tied", "qwen2", "mistral")
FOLDABLE = ("llama", "llama-tied", "qwen2", "mistral", "gpt_neox", "cohere", "phi", "mistral-window")


def member(family: str, seed: int) -> Any:
    return tiny_model(family.partition("-")[0], seed=seed, **FAMILIES[family])


def whole(*families: str) -> UltraFuserForCausalLM:
    models = {f"s{index}": member(family, seed=index + 1) for index, family in enumerate(families)}
    return fused_over(WholeSpecialists(models), gate_form="per_specialist")


def folded(family: str, num_specialists: int = 3) -> UltraFuserForCausalLM:
    base = member(family, seed=5)
    adapters = [random_adapter(base, seed=1), random_adapter(base, seed=2, r=2), Adapter.bare()]
    named = {f"s{index}": adapter for index, adapter in enumerate(adapters[:num_specialists])}
    return fused_over(AdapterSpecialists(base, named))


def relatives() -> UltraFuserForCausalLM:
    """Whole specialists that are variants of one model: they often agree, so that drafts are accepted."""
    first = member("llama", seed=1)
    models = {"s0": first, "s1": copy.deepcopy(first), "s2": copy.deepcopy(first)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for model in list(models.values())[1:]:
            for parameter in model.parameters():
                parameter.mul_(1 + 0.15 * torch.randn(parameter.shape, generator=generator))
    return fused_over(WholeSpecialists(models))


def forgetful() -> UltraFuserForCausalLM:
    """Adapters on a base that hardly looks back: its responses soon run in loops, which look-up drafts follow."""
    base = member("llama", seed=6)
    with torch.no_grad():
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    adapters = {f"s{seed}": random_adapter(base, seed=seed, target_modules=targets) for seed in range(2)}
    return fused_over(AdapterSpecialists(base, {**adapters, "s2": Adapter.bare()}))


MODELS = {
    "whole": lambda: whole("llama", "qwen2", "gpt2"),
    "relatives": relatives,
    "adapters": lambda: folded("llama"),
    "forgetful": forgetful,
    "one whole": lambda: whole("qwen2"),
    "one adapter": lambda: folded("llama", 1),
}


@pytest.fixture(autouse=True)
def small_weights_are_packed_too(monkeypatch):
    monkeypatch.setattr(projection, "_LEAST_PACKED", 0)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def requests(
    model: UltraFuserForCausalLM, count: int = 4, seed: int = 0, longest: int = 14, **settings: Any
) -> list[Request]:
    """Prompts of other lengths for every specialist, and other numbers of tokens for every request."""
    choice = random.Random(seed)

    def prompt() -> list[int]:
        return choice.choices(range(4, 300), k=choice.randint(1, longest))

    return [
        (
            [prompt() for _ in range(model.num_specialists)],
            SamplingParams(**{"max_new_tokens": choice.randint(4, 12), "seed": index, **settings}),
        )
        for index in range(count)
    ]


def repetitive(model: UltraFuserForCausalLM, count: int = 3, **settings: Any) -> list[Request]:
    """Prompts that are loops, and responses long enough to become some."""
    choice = random.Random(1)
    loops = [choice.choices(range(4, 300), k=length + 1) for length in range(count)]
    return [
        (
            [loop * (index + 2) for index in range(model.num_specialists)],
            SamplingParams(**{"max_new_tokens": 40, "seed": index, **settings}),
        )
        for index, loop in enumerate(loops)
    ]


_KNOWN: WeakKeyDictionary[UltraFuserForCausalLM, dict[str, list[int]]] = WeakKeyDictionary()


def expected(model: UltraFuserForCausalLM, asked: Iterable[Request]) -> list[list[int]]:
    """What the reference says, which is slow: kept for the next test that asks the same."""
    known, responses = _KNOWN.setdefault(model, {}), []
    for request in asked:
        key = repr((request, model.config.end_token_id))
        if key not in known:
            known[key] = reference_tokens(model, *request, use_cache=True)
        responses.append(known[key])
    return responses


def answered(decoder: FusedDecoder, asked: Iterable[Request]) -> list[list[TokenStep]]:
    responses = dict(decoder.respond(asked))
    return [responses[index] for index in range(len(responses))]


def tokens(responses: Iterable[Sequence[TokenStep]]) -> list[list[int]]:
    return [[step.token_id for step in response] for response in responses]


def speculating(
    model: UltraFuserForCausalLM, tokenizer: Any, drafter: str = "auto", max_batch: int = 8
) -> FusedDecoder:
    """A decoder in which somebody drafts.

    "own" is a specialist with its states used again, or look-ups with adapters: all that there is on a GPU. "given" is
    a model of its own.
    """
    given = None
    if drafter == "own":
        drafter = "specialist" if isinstance(model.bank, WholeSpecialists) else "lookup"
    elif drafter == "given":
        given, drafter = tiny_model(seed=9, vocab_size=model.bank.heads()[0].weight.shape[0]), "auto"
    params = SpeculationParams(drafter=drafter, min_match=1)
    return FusedDecoder(model, tokenizer, max_batch=max_batch, speculation=params, draft_model=given)


DRAFTERS = ["own", "auto", "lookup", "given"]


def always_draft(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    """Also in the first step, and however little it brings."""
    monkeypatch.setattr(DraftLength, "best", lambda self, num_conversations, rates: length)


def seen_often(model: UltraFuserForCausalLM, responses: Iterable[Sequence[int]]) -> int:
    """A token that ends some of the responses early, as an end token."""
    inside = Counter(itertools.chain.from_iterable(set(response[1:-1]) for response in responses))
    return inside.most_common(1)[0][0]


# --- the reference ------------------------------------------------------------------------------------------------

QUESTIONS = [
    [{"role": "user", "content": "Count to ten, please."}],
    [{"role": "user", "content": "A colour?"}],
]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3}], ids=str
)
def test_the_reference_is_the_same_with_a_cache(model, settings):
    asked = requests(model, count=2, **settings)
    assert expected(model, asked) == [reference_tokens(model, *request) for request in asked]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.4}], ids=str)
def test_the_reference_is_generate(model, tokenizer, settings):
    templates = ["alpaca", "ultralm", "llama-instruct"]
    encoder = ConversationEncoder(
        tokenizer,
        {
            name: BUILTIN_TEMPLATES[template]
            for name, template in zip(model.specialist_names, templates, strict=False)
        },
        end_token_id=3,
        max_length=256,
    )
    for question in QUESTIONS:
        batch = encoder.batch_prompts([question])
        row = model.generate(**batch, max_new_tokens=12, do_sample=False, **settings)[0]
        response = row[batch["input_ids"].shape[1] :].tolist()
        params = SamplingParams(max_new_tokens=12, **settings)
        assert reference_tokens(model, encoder.prompt(question), params) == response


def test_the_reference_ends_with_the_end_token(model, monkeypatch):
    [request] = requests(model, count=1, max_new_tokens=12)
    [response] = expected(model, [request])
    monkeypatch.setattr(model.config, "end_token_id", response[4])
    assert expected(model, [request]) == [response[: response.index(response[4]) + 1]]
    assert reference_tokens(model, request[0], replace(request[1], max_new_tokens=0)) == []


# --- the engine, one token a step -----------------------------------------------------------------------------------


def check(model: UltraFuserForCausalLM, tokenizer: Any, kinds: Sequence[type]) -> None:
    """Greedy and sampled responses of some requests in a batch smaller than they are."""
    assert [type(backbone) for backbone in open_backbones(model.bank)] == list(kinds)
    asked = [*requests(model, count=3), *requests(model, count=2, seed=9, temperature=1.5, min_p=0.02)]
    decoder = FusedDecoder(model, tokenizer, max_batch=2)
    assert tokens(answered(decoder, asked)) == expected(model, asked)


@pytest.mark.parametrize("num_specialists", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_specialists_of_every_family(family, num_specialists, tokenizer):
    kind = LlamaBackbone if family in LLAMA_LIKE else ModuleBackbone
    kinds = [kind, LlamaBackbone, ModuleBackbone][:num_specialists]
    check(whole(*[family, "qwen2", "gpt_neox"][:num_specialists]), tokenizer, kinds)


@pytest.mark.parametrize("num_specialists", [1, 3])
@pytest.mark.parametrize("family", FOLDABLE)
def test_adapters_on_every_family(family, num_specialists, tokenizer):
    kind = LlamaBackbone if family in LLAMA_LIKE else ModuleBackbone
    check(folded(family, num_specialists), tokenizer, [kind])


SAMPLING = {
    "greedy": {},
    "greedy with a penalty": {"repetition_penalty": 1.5},
    "sampled": {"temperature": 1.0},
    "hot": {"temperature": 3.0, "top_k": 50},
    "nucleus": {"temperature": 1.3, "top_p": 0.7},
    "not unlikely": {"temperature": 2.0, "min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3},
}


def test_every_setting_alone_and_beside_others(model, tokenizer):
    """A response depends on nothing but its own prompt, settings and seed."""
    asked = [
        requests(model, seed=index, **settings)[index % 4] for index, settings in enumerate(SAMPLING.values())
    ]
    alone = expected(model, asked)
    for max_batch in (1, 3, 7):
        assert tokens(answered(FusedDecoder(model, tokenizer, max_batch=max_batch), asked)) == alone
    shuffled = [*asked[3:], *asked[:3]]
    assert tokens(answered(FusedDecoder(model, tokenizer), shuffled)) == [*alone[3:], *alone[:3]]


def test_seeds_make_samples(model, tokenizer):
    prompts, _ = requests(model)[0]
    asked = [(prompts, SamplingParams(max_new_tokens=8, temperature=2.0, seed=seed)) for seed in (0, 1, 0, 2)]
    responses = tokens(answered(FusedDecoder(model, tokenizer), asked))
    assert responses[0] == responses[2]
    assert len(set(map(tuple, responses))) == 3


@pytest.mark.parametrize(
    ("drafted", "drafter", "seed"),
    [(None, None, 0), (None, None, 1), (1, "own", 2), (4, "own", 3), (4, "auto", 4), (4, "given", 5)],
)
def test_requests_come_and_go_at_any_time(model, tokenizer, monkeypatch, drafted, drafter, seed):
    """Some end early, some are cancelled while they wait or speak; slots move, and the caches grow."""
    monkeypatch.setattr(backbones, "_GROW_POSITIONS", 8)
    if drafted is not None:
        always_draft(monkeypatch, drafted)
    asked = [*requests(model, count=7, max_new_tokens=14), *repetitive(model, count=2, max_new_tokens=20)]
    monkeypatch.setattr(model.config, "end_token_id", seen_often(model, expected(model, asked)))
    whole_responses = expected(model, asked)
    decoder = FusedDecoder(model, tokenizer, max_batch=3)
    if drafter is not None:
        decoder = speculating(model, tokenizer, drafter, max_batch=3)
    choice, waiting = random.Random(seed), list(range(len(asked)))
    owners: dict[int, int] = {}
    got: dict[int, list[TokenStep]] = {}
    cancelled: set[int] = set()
    choice.shuffle(waiting)
    while waiting or decoder.num_active or decoder.num_waiting:
        while waiting and choice.random() < 0.4:
            index = waiting.pop()
            owners[decoder.submit(*asked[index])], got[index] = index, []
        unfinished = [
            i for i, steps in got.items() if not (steps and steps[-1].finish) and i not in cancelled
        ]
        if unfinished and len(cancelled) < 3 and choice.random() < 0.3:
            gone = choice.choice(unfinished)
            decoder.cancel(next(request_id for request_id, index in owners.items() if index == gone))
            cancelled.add(gone)
        for request_id, step in decoder.step():
            assert owners[request_id] not in cancelled
            got[owners[request_id]].append(step)
    assert cancelled
    for index, steps in got.items():
        said = [step.token_id for step in steps]
        if index in cancelled:
            assert said == whole_responses[index][: len(said)]
        else:
            assert said == whole_responses[index]
            assert steps[-1].finish == ("end" if said[-1] == model.config.end_token_id else "length")


def test_responses_outgrow_the_first_room(model, tokenizer, monkeypatch):
    monkeypatch.setattr(backbones, "_GROW_POSITIONS", 4)
    asked = requests(model, count=3, max_new_tokens=60)
    assert tokens(answered(FusedDecoder(model, tokenizer), asked)) == expected(model, asked)


def test_every_specialist_reads_up_to_its_own_limit(tokenizer, monkeypatch):
    """A context may be full to the last position while another row of the pass goes on, or is longer."""
    models = {
        "short": tiny_model("gpt2", seed=1, n_positions=20),
        "long": tiny_model(seed=2),
        "other": tiny_model("gpt2", seed=3),
    }
    model = fused_over(WholeSpecialists(models), gate_form="per_specialist")
    asked = [
        ([[5] * 10, list(range(4, 60)), [9]], SamplingParams(max_new_tokens=10)),
        ([[6], [7], list(range(4, 60))], SamplingParams(max_new_tokens=19)),
    ]
    always_draft(monkeypatch, 8)
    for speculation in (None, SpeculationParams()):
        decoder = FusedDecoder(model, tokenizer, speculation=speculation)
        assert tokens(answered(decoder, asked)) == expected(model, asked)


@torch.no_grad()
def teacher_forced(model: UltraFuserForCausalLM, prompts: list[list[int]], said: Sequence[int]) -> Any:
    """Logits and gate weights at every position that predicts one of the said tokens, in one pass."""
    length = max(len(prompt) for prompt in prompts) + len(said)
    rows = [[*prompt, *said] for prompt in prompts]
    ids = torch.tensor([[row + [0] * (length - len(row)) for row in rows]])
    mask = torch.tensor([[[1] * len(row) + [0] * (length - len(row)) for row in rows]])
    places = torch.tensor([[[len(prompt) - 1 + index for index in range(len(said))] for prompt in prompts]])
    return model(specialist_input_ids=ids, specialist_attention_mask=mask, response_positions=places)


@pytest.mark.parametrize("drafted", [None, 3])
def test_weights_and_log_probabilities_are_those_of_one_pass(model, tokenizer, monkeypatch, drafted):
    always_draft(monkeypatch, drafted or 0)
    asked = [
        *repetitive(model, count=2, logprobs=5),
        *requests(model, count=2, logprobs=400, temperature=1.5, repetition_penalty=1.3),
        *requests(model, count=1, logprobs=0),
    ]
    speculation = None if drafted is None else SpeculationParams()
    decoder = FusedDecoder(model, tokenizer, max_batch=3, speculation=speculation)
    for (prompts, params), steps in zip(asked, answered(decoder, asked), strict=True):
        said = [step.token_id for step in steps]
        output = teacher_forced(model, prompts, said)
        weights = torch.tensor([step.gate_weights for step in steps])
        assert torch.allclose(weights, output.gate_weights[0], atol=1e-4)
        assert torch.allclose(weights.sum(-1), torch.ones(len(steps)), atol=1e-5)
        scores = output.logits[0].log_softmax(-1)  # before any setting
        for step, row in zip(steps, scores, strict=True):
            assert math.isclose(step.logprob, float(row[step.token_id]), abs_tol=2e-3)
            assert len(step.alternatives) == min(params.logprobs, 320)
            best = row.topk(len(step.alternatives))
            assert torch.allclose(torch.tensor([p for _, p in step.alternatives]), best.values, atol=2e-3)
            assert [p for _, p in step.alternatives] == sorted(
                (p for _, p in step.alternatives), reverse=True
            )
            assert all(math.isclose(p, float(row[token]), abs_tol=2e-3) for token, p in step.alternatives)
    if drafted:
        assert decoder.stats.accepted > 0


@pytest.mark.parametrize("drafted", [None, 3])
def test_only_is_one_specialist_alone(model, tokenizer, monkeypatch, drafted):
    always_draft(monkeypatch, drafted or 0)
    [(prompts, params)] = requests(model, count=1, max_new_tokens=10)
    speculation = None if drafted is None else SpeculationParams(min_match=1)
    decoder = FusedDecoder(model, tokenizer, speculation=speculation)
    fused = decoder.submit(prompts, params)
    alone = [decoder.submit(prompts, params, only=name) for name in model.specialist_names]
    responses: dict[int, list[TokenStep]] = {request_id: [] for request_id in (fused, *alone)}
    while decoder.num_waiting or decoder.num_active:
        for request_id, step in decoder.step():
            responses[request_id].append(step)
    assert tokens([responses[fused]]) == expected(model, [(prompts, params)])
    for index, (name, prompt) in enumerate(zip(model.specialist_names, prompts, strict=True)):
        if isinstance(model.bank, WholeSpecialists):
            plain = model.bank.models[index]
        else:
            plain = member("llama", seed=5)
            plain.load_state_dict(model.bank.merged_tensors(name), strict=False)
        ids = torch.tensor([prompt])
        row = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[0]
        assert tokens([responses[alone[index]]]) == [row[len(prompt) :].tolist()]
        one_hot = tuple(float(index == other) for other in range(model.num_specialists))
        assert {step.gate_weights for step in responses[alone[index]]} == {one_hot}


# --- speculation: the same greedy responses -----------------------------------------------------------------------


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize(
    ("drafted", "settings"), [(None, {}), (1, {}), (8, {}), (3, {"repetition_penalty": 1.2})], ids=str
)
def test_greedy_responses_stay_the_same(model, tokenizer, monkeypatch, drafted, settings, drafter):
    """None: as many tokens are drafted as seem to pay."""
    if drafted is not None:
        always_draft(monkeypatch, drafted)
    asked = [*repetitive(model, **settings), *requests(model, count=2, **settings)]
    plain = expected(model, asked)
    decoder = speculating(model, tokenizer, drafter, max_batch=3)
    assert tokens(answered(decoder, asked)) == plain
    stats = decoder.stats
    assert stats.tokens == sum(map(len, plain))
    if drafted is not None:
        assert 0 <= stats.accepted <= stats.drafted <= drafted * stats.drafts
        named = model.specialist_names == ("s0", "s1", "s2")
        if named and drafter == "own" and settings == {}:  # a penalty breaks loops up
            assert stats.accepted > 0


@pytest.mark.parametrize("name", ["relatives", "forgetful"])
def test_accepted_drafts_spare_steps(name, tokenizer, monkeypatch):
    model = MODELS[name]()
    asked = repetitive(model, count=3)
    always_draft(monkeypatch, 4)
    plain, ahead = (
        FusedDecoder(model, tokenizer, max_batch=1, speculation=s) for s in (None, SpeculationParams())
    )
    assert tokens(answered(plain, asked)) == tokens(answered(ahead, asked))
    assert ahead.stats.steps < 0.8 * plain.stats.steps
    assert plain.stats.drafted == 0


@pytest.mark.parametrize("drafter", ["own", "auto"])
@pytest.mark.parametrize("name", ["relatives", "forgetful"])
def test_a_response_ends_inside_an_accepted_draft(name, drafter, tokenizer, monkeypatch):
    """At a length, at an end token, and at a stop text; what follows is not said."""
    model = MODELS[name]()
    always_draft(monkeypatch, 8)
    [(prompts, params)] = repetitive(model, count=1)
    monkeypatch.setattr(model.config, "end_token_id", -1)
    [response] = expected(model, [(prompts, params)])
    decoder = speculating(model, tokenizer, drafter)
    limits = range(len(response) - 12, len(response))
    asked = [(prompts, replace(params, max_new_tokens=limit)) for limit in limits]
    for limit, steps in zip(limits, answered(decoder, asked), strict=True):
        assert [step.token_id for step in steps] == response[:limit]
        assert [step.finish for step in steps] == [None] * (limit - 1) + ["length"]
    for place in range(8, len(response), 4):
        stop = tokenizer.decode(response[place : place + 2])
        said, text, finish = stopped(tokenizer, response, stop)
        [steps] = answered(decoder, [(prompts, replace(params, stop=(stop,)))])
        assert [step.token_id for step in steps] == said
        assert "".join(step.text for step in steps) == text
        assert steps[-1].finish == finish
    for token in dict.fromkeys(response):
        monkeypatch.setattr(model.config, "end_token_id", token)
        [steps] = answered(decoder, [(prompts, params)])
        assert [step.token_id for step in steps] == response[: response.index(token) + 1]
        assert steps[-1].finish == "end"
        assert steps[-1].text == decoded_rest(tokenizer, steps)
    assert decoder.stats.accepted > 0


def stopped(tokenizer: Any, response: Sequence[int], stop: str) -> tuple[list[int], str, str]:
    """The tokens, the text and the finish of a response that a stop text may end."""
    text, said, parts = StoppedText(tokenizer, (stop,)), [], []
    for token in response:
        said.append(token)
        parts.append(text.push(token))
        if text.stopped:
            break
    finish = "stop" if text.stopped else "length"
    return said, "".join(parts) + text.flush(), finish


def decoded_rest(tokenizer: Any, steps: Sequence[TokenStep]) -> str:
    """What the text of all but the end token has more than what was handed out before the last step."""
    text = tokenizer.decode([step.token_id for step in steps[:-1]], skip_special_tokens=True)
    return text.removeprefix("".join(step.text for step in steps[:-1]))


# --- speculation: the same distribution ---------------------------------------------------------------------------

VOCABULARY = 6
SAMPLES = 1200


@cache
def small(kind: str) -> UltraFuserForCausalLM:
    """Two specialists over six tokens."""
    size = {"vocab_size": VOCABULARY}
    if kind == "whole":
        return fused_over(
            WholeSpecialists({"a": tiny_model(seed=5, **size), "b": tiny_model("qwen2", seed=6, **size)})
        )
    base = tiny_model(seed=1, **size)
    adapters = {"a": random_adapter(base, seed=1), "b": random_adapter(base, seed=2)}
    return fused_over(AdapterSpecialists(base, adapters))


@torch.no_grad()
def distribution(
    model: UltraFuserForCausalLM, prompts: list[list[int]], params: SamplingParams
) -> dict[tuple[int, ...], float]:
    """The exact probability of every response: all of them, enumerated."""
    growing, done = {(): 1.0}, {}
    for _ in range(params.max_new_tokens):
        longer = {}
        for said, probability in growing.items():
            own = Sampler(params, prompts[0])
            own.said(said)
            logits = teacher_forced(model, prompts, [*said, 0]).logits[:, -1]
            row = own.probabilities(logits)[0].double()
            longer.update({(*said, token): probability * float(p) for token, p in enumerate(row) if p > 0})
        growing = {said: p for said, p in longer.items() if said[-1] != model.config.end_token_id}
        done.update({said: p for said, p in longer.items() if said[-1] == model.config.end_token_id})
    return {**growing, **done}


def accept_all(drafted, draft, target, sampler):
    return len(drafted), sampler.draw(target[len(drafted)]) if len(target) > len(drafted) else None


def drawn_from_the_target(drafted, draft, target, sampler):
    num_accepted, following = accept(drafted, draft, target, sampler)
    return num_accepted, sampler.draw(target[num_accepted]) if num_accepted < len(drafted) else following


RULES = {accept: True, accept_all: False, drawn_from_the_target: False}


@pytest.mark.parametrize("kind", ["whole", "adapters"])
@pytest.mark.parametrize(
    ("rule", "drafter"),
    [*((accept, d) for d in DRAFTERS), (accept_all, "own"), (drawn_from_the_target, "own")],
)
def test_sampled_responses_have_the_exact_distribution(kind, rule, drafter, tokenizer, monkeypatch):
    """Of four tokens; two or three of them are drafted at once. Wrong rules are told."""
    model = small(kind)
    prompts = [[1, 4, 5, 0, 2, 4, 2, 5], [5, 2, 1]]  # every token has been there
    params = SamplingParams(max_new_tokens=4, temperature=0.9, top_p=0.97)
    exact = distribution(model, prompts, params)
    assert math.isclose(sum(exact.values()), 1, abs_tol=1e-5)
    always_draft(monkeypatch, 3)
    monkeypatch.setattr(engine, "accept", rule)
    decoder = speculating(model, tokenizer, drafter, max_batch=64)
    asked = [(prompts, replace(params, seed=seed)) for seed in range(SAMPLES)]
    counts = Counter(tuple(step.token_id for step in steps) for _, steps in decoder.respond(asked))
    assert decoder.stats.drafted > SAMPLES
    statistic, bound = chi_square(counts, exact)
    assert (statistic < bound and counts.keys() <= exact.keys()) == RULES[rule]


# --- bfloat16 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["whole", "adapters", "one whole"])
@pytest.mark.parametrize("drafted", [None, 3])
def test_bfloat16_is_no_further_from_the_truth_than_the_model(name, drafted, tokenizer, monkeypatch):
    """The truth: the same rounded weights, calculated in float32."""
    always_draft(monkeypatch, drafted or 0)
    model = MODELS[name]().to(torch.bfloat16)
    truth = copy.deepcopy(model).float()
    speculation = None if drafted is None else SpeculationParams(min_match=1)
    decoder = FusedDecoder(model, tokenizer, max_batch=2, speculation=speculation)
    asked = [
        *requests(model, count=3, logprobs=320),
        *repetitive(model, count=1, logprobs=320, max_new_tokens=10),
    ]
    mine, theirs = [], []
    for (prompts, _), steps in zip(asked, answered(decoder, asked), strict=True):
        said = [step.token_id for step in steps]
        exact = teacher_forced(truth, prompts, said).logits[0].log_softmax(-1)
        plain = teacher_forced(model, prompts, said).logits[0].float().log_softmax(-1)
        scores = torch.full_like(exact, float("nan"))
        for row, step in zip(scores, steps, strict=True):
            row[[token for token, _ in step.alternatives]] = torch.tensor([p for _, p in step.alternatives])
        mine.append((scores - exact).abs().flatten())
        theirs.append((plain - exact).abs().flatten())
    own, other = torch.cat(mine), torch.cat(theirs)
    assert bool(own.isfinite().all())
    assert own.mean() < 1.25 * other.mean()
    assert own.max() < 2 * other.max()
    assert other.max() < 1
