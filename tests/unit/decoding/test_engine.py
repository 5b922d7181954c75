"""The engine as its callers see it: what it refuses, what it hands out, and what is left when a caller leaves.

That it says the right tokens is in tests/parity/test_decoding.py.
"""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import fused_over, random_adapter, tiny_model

from ultrafuser.decoding.engine import FusedDecoder
from ultrafuser.decoding.reference import reference_tokens
from ultrafuser.decoding.sampling import SamplingParams
from ultrafuser.decoding.speculation import DraftLength, SpeculationParams
from ultrafuser.decoding.text import StoppedText
from ultrafuser.errors import ConversationTooLongError, UltrafuserError
from ultrafuser.modeling.specialists import AdapterSpecialists, WholeSpecialists

PROMPTS = [[5, 6, 7], [8, 9]]
PARAMS = SamplingParams(max_new_tokens=6)


@pytest.fixture(scope="module", params=["whole", "adapters"])
def model(request):
    if request.param == "whole":
        return fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model("qwen2", seed=2)}))
    base = tiny_model(seed=3)
    return fused_over(
        AdapterSpecialists(base, {name: random_adapter(base, seed=i) for i, name in enumerate("ab")})
    )


@pytest.fixture
def decoder(model, tokenizer):
    return FusedDecoder(model, tokenizer, max_batch=2)


def spoken(decoder: FusedDecoder, steps: int) -> dict[int, list[int]]:
    """What a number of steps give, by request."""
    said: dict[int, list[int]] = {}
    for _ in range(steps):
        for request_id, step in decoder.step():
            said.setdefault(request_id, []).append(step.token_id)
    return said


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], r"expected 2 prompts, one for each specialist .*, got prompts of \[\] tokens"),
        ([[5]], r"expected 2 prompts, .* got prompts of \[1\] tokens"),
        ([[5], [6], [7]], r"expected 2 prompts, .* got prompts of \[1, 1, 1\] tokens"),
        ([[5], []], r"none of them empty, got prompts of \[1, 0\] tokens"),
    ],
)
def test_refuses_other_prompts_than_one_for_each(decoder, prompts, message):
    with pytest.raises(UltrafuserError, match=message):
        decoder.submit(prompts, PARAMS)
    with pytest.raises(UltrafuserError, match=message):
        decoder.stream(prompts, PARAMS)  # at once, not when it is read
    assert decoder.num_waiting == 0


def test_refuses_unknown_specialists(decoder):
    with pytest.raises(UltrafuserError, match="there is no specialist 'c'; there are a, b"):
        decoder.submit(PROMPTS, PARAMS, only="c")


def test_refuses_what_a_specialist_cannot_read(tokenizer):
    models = {"a": tiny_model(seed=1), "b": tiny_model(seed=2, max_position_embeddings=20)}
    decoder = FusedDecoder(fused_over(WholeSpecialists(models)), tokenizer)
    message = "specialist b reads at most 20 tokens, but the prompt has 15 and max_new_tokens is 6. Shorten"
    with pytest.raises(ConversationTooLongError, match=message):
        decoder.submit([[5], [6] * 15], PARAMS)
    for prompts in ([[5], [6] * 14], [[5] * 100, [6] * 14]):  # just fits
        assert len(list(decoder.stream(prompts, PARAMS))) == 6


@pytest.mark.parametrize("max_batch", [0, -1])
def test_refuses_no_slots(model, tokenizer, max_batch):
    with pytest.raises(UltrafuserError, match=f"max_batch must be at least 1, got {max_batch}"):
        FusedDecoder(model, tokenizer, max_batch=max_batch)


def test_refuses_an_architecture_it_cannot_run(tokenizer):
    layers = {"layer_types": ["full_attention", "linear_attention"], "linear_num_value_heads": 4}
    odd = tiny_model("qwen3_next", num_experts=4, head_dim=8, num_key_value_heads=2, **layers)
    with pytest.raises(UltrafuserError, match="layers of the kind 'linear_attention'"):
        FusedDecoder(fused_over(WholeSpecialists({"a": odd})), tokenizer)


# --- requests -----------------------------------------------------------------------------------------------------


def test_conversations_get_slots_in_the_order_of_their_requests(decoder):
    ids = [decoder.submit(PROMPTS, replace(PARAMS, max_new_tokens=length)) for length in (2, 4, 3)]
    assert (decoder.num_waiting, decoder.num_active) == (3, 0)
    shapes = []
    while decoder.num_waiting or decoder.num_active:
        said = [request_id for request_id, _ in decoder.step()]
        shapes.append((said, decoder.num_waiting, decoder.num_active))
    first, second, third = ids
    assert shapes[0] == ([first, second], 1, 2)
    assert shapes[1] == ([first, second], 1, 1)  # the first has ended
    assert sorted(shapes[2][0]) == [second, third]
    assert decoder.step() == []
    assert decoder.stats.tokens == 9
    assert decoder.stats.drafted == decoder.stats.accepted == decoder.stats.drafts == 0


def test_cancelled_requests_say_no_more(decoder, model):
    ids = [decoder.submit(PROMPTS, PARAMS) for _ in range(4)]
    spoken(decoder, 2)
    decoder.cancel(ids[0])  # speaks: the other one moves into its slot
    decoder.cancel(ids[2])  # waits
    decoder.cancel(ids[0])  # again
    decoder.cancel(99)  # never was
    assert (decoder.num_waiting, decoder.num_active) == (1, 1)
    said = spoken(decoder, 8)
    response = reference_tokens(model, PROMPTS, PARAMS)
    assert said == {ids[1]: response[2:], ids[3]: response}
    decoder.cancel(ids[1])  # is done
    assert (decoder.num_waiting, decoder.num_active) == (0, 0)


def test_no_tokens_are_no_request(decoder):
    nothing = replace(PARAMS, max_new_tokens=0)
    assert list(decoder.stream(PROMPTS, nothing)) == []
    decoder.submit(PROMPTS, nothing)
    assert decoder.num_waiting == 0
    assert decoder.step() == []
    responses = dict(decoder.respond([(PROMPTS, nothing), (PROMPTS, PARAMS), (PROMPTS, nothing)]))
    assert {index: len(steps) for index, steps in responses.items()} == {0: 0, 1: 6, 2: 0}


def test_requests_are_read_as_slots_become_free(decoder):
    asked = []

    def requests():
        for length in (5, 1, 1, 1):
            asked.append(length)
            yield PROMPTS, replace(PARAMS, max_new_tokens=length)

    responses = decoder.respond(requests())
    assert asked == []
    assert [next(responses)[0] for _ in range(2)] == [1, 2]
    assert len(asked) == 3
    assert [index for index, _ in responses] == [3, 0]  # in the order in which they are done
    assert list(decoder.respond([])) == []


def test_leaving_early_leaves_nothing_behind(decoder, model):
    requests = [(PROMPTS, replace(PARAMS, max_new_tokens=length)) for length in (2, 6, 6, 6)]
    for _ in decoder.respond(requests):
        break
    assert (decoder.num_waiting, decoder.num_active) == (0, 0)
    for _ in decoder.stream(PROMPTS, PARAMS):
        break
    assert (decoder.num_waiting, decoder.num_active) == (0, 0)
    wrong = [*requests[:2], ([[5]], PARAMS)]
    with pytest.raises(UltrafuserError, match="expected 2 prompts"):
        list(decoder.respond(wrong))
    assert (decoder.num_waiting, decoder.num_active) == (0, 0)
    responses = dict(decoder.respond(requests))
    expected = reference_tokens(model, PROMPTS, PARAMS)
    for index, (_, params) in enumerate(requests):
        assert [step.token_id for step in responses[index]] == expected[: params.max_new_tokens]


def test_a_caller_is_not_left_in_inference_mode(decoder):
    for _ in decoder.stream(PROMPTS, PARAMS):
        assert not torch.is_inference_mode_enabled()


# --- responses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", [None, SpeculationParams()], ids=["plain", "speculating"])
def test_text_and_finish(model, tokenizer, monkeypatch, speculation):
    decoder = FusedDecoder(model, tokenizer, speculation=speculation)
    params = SamplingParams(max_new_tokens=24)
    steps = list(decoder.stream(PROMPTS, params))
    response = [step.token_id for step in steps]
    assert "".join(step.text for step in steps) == tokenizer.decode(response, skip_special_tokens=True)
    assert [step.finish for step in steps] == [None] * 23 + ["length"]
    assert all(step.logprob is None and step.alternatives == () for step in steps)

    end = next(i for i in range(4, 24) if response[i] not in response[:i])
    monkeypatch.setattr(model.config, "end_token_id", response[end])
    ended = list(decoder.stream(PROMPTS, params))
    assert [step.token_id for step in ended] == response[: end + 1]
    assert ended[-1].finish == "end"
    text = tokenizer.decode(response[:end], skip_special_tokens=True)
    assert "".join(step.text for step in ended) == text
    monkeypatch.undo()

    middle = len(text) // 2
    stop = text[middle : middle + 2]
    cut = list(decoder.stream(PROMPTS, replace(params, stop=(stop, "never"))))
    assert "".join(step.text for step in cut) == text[: text.index(stop)]
    assert [step.token_id for step in cut] == response[: len(cut)]
    assert cut[-1].finish == "stop"
    assert len(cut) <= end + 1


def test_a_stop_text_in_the_prompt_stops_nothing(decoder, tokenizer):
    prompt = tokenizer("Below", add_special_tokens=False)["input_ids"]
    steps = list(decoder.stream([prompt, prompt], replace(PARAMS, stop=("Below",))))
    assert steps[-1].finish == "length"


def test_speculation_says_what_it_did(model, tokenizer, monkeypatch):
    monkeypatch.setattr(
        DraftLength, "best", lambda self, num_conversations, rates: 4
    )  # however long it takes
    decoder = FusedDecoder(model, tokenizer, speculation=SpeculationParams(min_match=1))
    list(decoder.stream([[5, 6] * 8, [7, 8] * 8], replace(PARAMS, max_new_tokens=40)))
    stats = decoder.stats
    assert stats.tokens <= 40
    assert 0 < stats.accepted <= stats.drafted <= 4 * stats.drafts
    assert stats.steps < 40


def test_responses_that_are_read_in_turns_are_those_of_each_alone(model, tokenizer):
    def ids(steps):
        return [step.token_id for step in steps]

    prompts = [[[5, 6], [7]], [[9], [8, 3, 2]], [[4], [4, 4]]]
    alone = [ids(FusedDecoder(model, tokenizer).stream(each, PARAMS)) for each in prompts]
    shared = FusedDecoder(model, tokenizer, max_batch=2)
    first, second, never = (shared.stream(each, PARAMS) for each in prompts)
    begun = [next(first), next(second)]
    answered = dict(shared.respond([(prompts[2], PARAMS), (prompts[0], PARAMS)]))
    assert ids([begun[1], *second]) == alone[1]
    assert ids([begun[0], *first]) == alone[0]
    assert [ids(answered[0]), ids(answered[1])] == [alone[2], alone[0]]
    del never  # it was never asked for a token, and so takes no slot
    assert (shared.num_active, shared.num_waiting) == (0, 0)


def test_a_step_that_fails_leaves_a_decoder_that_works(model, tokenizer, monkeypatch):
    prompts = [[5, 6], [7]]
    expected = list(FusedDecoder(model, tokenizer).stream(prompts, PARAMS))
    decoder = FusedDecoder(model, tokenizer)
    broken = decoder._backbones[-1]
    with monkeypatch.context() as patch:
        patch.setattr(broken, "read", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
        with pytest.raises(MemoryError, match="none left"):
            dict(decoder.respond([(prompts, PARAMS)] * 3))
    assert (decoder.num_active, decoder.num_waiting) == (0, 0)
    assert dict(decoder.respond([(prompts, PARAMS)])) == {0: expected}


@pytest.mark.parametrize("part", ["gate", "specialist"])
@pytest.mark.parametrize(
    "params", [PARAMS, replace(PARAMS, temperature=1.0, seed=0)], ids=["greedy", "sampled"]
)
def test_numbers_that_are_none_are_no_tokens(tokenizer, part, params):
    broken = fused_over(WholeSpecialists({"a": tiny_model(seed=1), "b": tiny_model(seed=2)}))
    weights = broken.gate if part == "gate" else broken.bank.models[1].get_decoder().norm
    next(weights.parameters()).data.fill_(float("nan"))
    with pytest.raises(
        UltrafuserError, match="the fused logits are not finite: a weight of a specialist or of"
    ):
        list(FusedDecoder(broken, tokenizer).stream(PROMPTS, params))


def test_a_long_prompt_does_not_make_short_ones_longer(model, tokenizer, monkeypatch):
    """Prompts that come together are read in passes of about as long ones; the responses are those of each alone."""
    lengths = [3, 40, 5, 4, 90, 3]
    asked = [([[5 + n] * length, [7] * (length // 2 + 1)], PARAMS) for n, length in enumerate(lengths)]
    alone = [reference_tokens(model, *request) for request in asked]
    decoder = FusedDecoder(model, tokenizer, max_batch=len(asked))
    shapes, backbone = [], decoder._backbones[0]
    read = backbone.read
    monkeypatch.setattr(backbone, "read", lambda ids, *rest: (shapes.append(ids.shape), read(ids, *rest))[1])
    responses = dict(decoder.respond(asked))
    assert [[step.token_id for step in responses[n]] for n in range(len(asked))] == alone
    assert sorted((a, t) for a, _, t in shapes if t > 1) == [(1, 40), (1, 90), (4, 5)]


def test_what_a_draft_model_takes_for_a_prompt_is_not_held_against_drafts(tokenizer, monkeypatch):
    draft, longest = tiny_model(seed=1), []
    model = fused_over(WholeSpecialists({"a": tiny_model(seed=1)}))
    monkeypatch.setattr(DraftLength, "best", lambda self, num_conversations, rates: 4)
    decoder = FusedDecoder(model, tokenizer, draft_model=draft)
    monkeypatch.setattr(decoder._draft_length, "observe", lambda _, length, *rest: longest.append(length))
    list(decoder.stream([[5, 6, 7]], replace(PARAMS, max_new_tokens=13)))
    assert decoder.stats.drafts == len(longest) + 1 > 2


def test_a_reader_hears_of_a_step_that_failed_for_another(model, tokenizer, monkeypatch):
    decoder = FusedDecoder(model, tokenizer)
    first, second = (decoder.stream(PROMPTS, PARAMS) for _ in range(2))
    next(first), next(second)
    with monkeypatch.context() as patch:
        patch.setattr(decoder._backbones[-1], "read", lambda *_: (_ for _ in ()).throw(MemoryError("none")))
        with pytest.raises(MemoryError):
            list(first)
    with pytest.raises(UltrafuserError, match="dropped when a step failed for another reader"):
        list(second)
    assert (decoder.num_active, decoder.num_waiting) == (0, 0)


@pytest.mark.parametrize("speculation", [None, SpeculationParams()])
def test_a_token_that_cannot_be_said_leaves_no_conversation_behind(
    model, tokenizer, monkeypatch, speculation
):
    """Caches are ahead of the responses then: who stayed would go on with wrong tokens."""
    decoder = FusedDecoder(model, tokenizer, max_batch=2, speculation=speculation)
    for _ in range(2):
        decoder.submit(PROMPTS, PARAMS)
    decoder.step()
    with monkeypatch.context() as patch:
        patch.setattr(StoppedText, "push", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            decoder.step()
    assert (decoder.num_active, decoder.num_waiting) == (0, 0)
    expected = reference_tokens(model, PROMPTS, PARAMS)
    assert [step.token_id for step in decoder.stream(PROMPTS, PARAMS)] == expected


def test_a_batch_hears_of_a_step_that_failed_while_it_handed_out_a_response(model, tokenizer, monkeypatch):
    decoder = FusedDecoder(model, tokenizer)
    batch = decoder.respond([(PROMPTS, replace(PARAMS, max_new_tokens=n)) for n in (3, 6)])
    next(batch)
    with monkeypatch.context() as patch:
        patch.setattr(decoder._backbones[-1], "read", lambda *_: (_ for _ in ()).throw(MemoryError("none")))
        with pytest.raises(MemoryError):
            list(decoder.stream(PROMPTS, PARAMS))
    with pytest.raises(UltrafuserError, match="dropped when a step failed for another reader"):
        list(batch)


def test_a_stop_text_that_only_the_end_completes_is_the_reason(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.config, "end_token_id", -1)
    smile = tokenizer("\U0001f642", add_special_tokens=False)["input_ids"]
    decoder = FusedDecoder(model, tokenizer)
    said = iter(smile[:2])
    advance, read = decoder._advance, decoder._read_prompts
    monkeypatch.setattr(decoder, "_advance", lambda c: [f._replace(tokens=[next(said)]) for f in advance(c)])
    monkeypatch.setattr(
        decoder, "_read_prompts", lambda n: [f._replace(tokens=[next(said)]) for f in read(n)]
    )
    steps = list(decoder.stream(PROMPTS, replace(PARAMS, max_new_tokens=2, stop=("\ufffd",))))
    assert ["".join(step.text for step in steps), steps[-1].finish] == ["", "stop"]


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}], ids=str)
def test_a_draft_model_that_is_the_fused_model_is_always_right(tokenizer, monkeypatch, settings):
    """As long as it has read just what was said, whoever came and went."""
    alone = tiny_model(seed=1)
    model = fused_over(WholeSpecialists({"a": alone}))
    monkeypatch.setattr(model.config, "end_token_id", -1)
    monkeypatch.setattr(DraftLength, "best", lambda self, num_conversations, rates: 4)
    decoder = FusedDecoder(model, tokenizer, max_batch=3, speculation=SpeculationParams(), draft_model=alone)
    asked = [([[5 + n] * (n + 1)], replace(PARAMS, max_new_tokens=7 + 3 * n, **settings)) for n in range(7)]
    responses = dict(decoder.respond(asked))
    assert [len(responses[n]) for n in range(7)] == [7 + 3 * n for n in range(7)]
    assert decoder.stats.accepted == decoder.stats.drafted > 50


def test_a_conversation_may_leave_as_another_joins_that_the_draft_model_has_not_read(model, tokenizer):
    draft = tiny_model(seed=4)
    decoder = FusedDecoder(model, tokenizer, max_batch=2, draft_model=draft)
    long = replace(PARAMS, max_new_tokens=30)
    first = decoder.submit([[5, 6] * 4, [7, 8] * 4], long)
    while decoder.stats.draft_passes == 0:
        decoder.step()
    second = decoder.submit([[9], [8, 3]], long)
    found = [token for owner, token in decoder.step() if owner == second]
    decoder.cancel(first)
    while decoder.num_active:
        found += [token for owner, token in decoder.step() if owner == second]
    expected = FusedDecoder(model, tokenizer).stream([[9], [8, 3]], long)
    assert [token.token_id for token in found] == [token.token_id for token in expected]


@pytest.mark.parametrize("speculation", [None, SpeculationParams()])
def test_a_decoder_that_is_dropped_frees_its_weights_at_once(model, tokenizer, speculation):
    decoder = FusedDecoder(model, tokenizer, speculation=speculation)
    list(decoder.stream(PROMPTS, PARAMS))
    packed = weakref.ref(decoder._backbones[0])
    gc.disable()  # which would find a cycle, but later: packed weights are large
    try:
        del decoder
        assert packed() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ids", [[5, 320], [-1]])
def test_ids_that_are_no_tokens_are_refused(model, tokenizer, ids):
    with pytest.raises(UltrafuserError, match="must hold token ids from 0 to 319"):
        FusedDecoder(model, tokenizer).submit([[5], ids], PARAMS)


def test_refuses_a_model_in_training_mode(tokenizer):
    training = fused_over(
        AdapterSpecialists(tiny_model(), {"a": random_adapter(tiny_model(), seed=1)})
    ).train()
    with pytest.raises(UltrafuserError, match=r"Call model\.eval\(\)"):
        FusedDecoder(training, tokenizer)


# --- who drafts ---------------------------------------------------------------------------------------------------


def test_refuses_a_drafter_that_cannot_be_had(tokenizer, monkeypatch):
    base = tiny_model(seed=3)
    adapters = fused_over(AdapterSpecialists(base, {"a": random_adapter(base, seed=1)}))
    several = fused_over(
        AdapterSpecialists(tiny_model(seed=3), {n: random_adapter(tiny_model(seed=3), seed=1) for n in "ab"})
    )
    with pytest.raises(UltrafuserError, match='"specialist" needs whole specialists'):
        FusedDecoder(several, tokenizer, speculation=SpeculationParams(drafter="specialist"))
    monkeypatch.setattr("ultrafuser.decoding.backbones.can_quantize", lambda device: False)
    with pytest.raises(UltrafuserError, match='"int8" needs an x86 CPU'):
        FusedDecoder(adapters, tokenizer, speculation=SpeculationParams(drafter="int8"))
    with pytest.raises(UltrafuserError, match="vocabulary of 50 tokens, the fused model one of 320"):
        FusedDecoder(adapters, tokenizer, draft_model=tiny_model(seed=4, vocab_size=50))
    with pytest.raises(UltrafuserError, match='drafter "lookup" and draft_model name two'):
        FusedDecoder(
            adapters, tokenizer, speculation=SpeculationParams(drafter="lookup"), draft_model=tiny_model()
        )
    with pytest.raises(UltrafuserError, match="draft_model is on meta, the fused model on cpu"):
        FusedDecoder(adapters, tokenizer, draft_model=tiny_model().to("meta"))
    with pytest.raises(
        UltrafuserError, match="drafter must be one of auto, int8, specialist, lookup, got 'fast'"
    ):
        SpeculationParams(drafter="fast")  # type: ignore[arg-type]
