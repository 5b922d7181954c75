import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ultrafuser.errors import TemplateError
from ultrafuser.modeling.templates import (
    BUILTIN_TEMPLATES,
    ConversationEncoder,
    conversation_problem,
    resolve_template,
    vocabulary_difference,
)

NAMES = ("tokenizer", *BUILTIN_TEMPLATES)


def talk(*contents, system=None):
    """Messages with these contents, user and assistant in turn."""
    start = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return start + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def make_encoder(tokenizer, templates=None, max_length=100_000):
    if templates is None:
        templates = {name: resolve_template(name, tokenizer) for name in NAMES}
    return ConversationEncoder(
        tokenizer, templates, end_token_id=tokenizer.eos_token_id, max_length=max_length
    )


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return make_encoder(tokenizer)


def assert_aligned(encoder, messages):
    encoded = encoder.encode(messages)
    assert len(encoded.input_ids) == len(encoded.response_positions) == len(encoder.names)
    for ids, positions in zip(encoded.input_ids, encoded.response_positions, strict=True):
        assert min(positions) >= 0
        assert positions == sorted(set(positions))
        assert [ids[position + 1] for position in positions] == encoded.labels
        assert ids[-1] == encoder.end_token_id
    return encoded


texts = st.text(max_size=40)
conversations = st.builds(
    lambda system, turns, last: talk(*[text for turn in turns for text in turn], *last, system=system),
    st.none() | texts,
    st.lists(st.tuples(texts, texts), min_size=1, max_size=4),
    st.tuples(texts, texts),
)


@settings(max_examples=60, deadline=None)
@given(messages=conversations)
def test_every_builtin_is_aligned_and_prompts_begin_what_is_trained_on(encoder, messages):
    encoded = assert_aligned(encoder, messages)
    prompts = encoder.prompt(messages[:-1])
    last = encoder.encode(talk("", messages[-1]["content"])).labels
    for ids, prompt in zip(encoded.input_ids, prompts, strict=True):
        assert ids == prompt + last


@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_a_response_decodes_to_its_text(encoder, text):
    assert encoder.decode(encoder.encode(talk("Hi", text)).labels) == text


def test_builtin_texts(encoder, tokenizer):
    encoded = encoder.encode(talk("1+1?", "2", "And 2+2?", "4", system="Be brief."))
    assert dict(zip(encoder.names, map(tokenizer.decode, encoded.input_ids), strict=True)) == {
        "tokenizer": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nAnd 2+2?<|im_end|>\n"
        "<|im_start|>assistant\n4<|im_end|>",
        "ultralm": "<s>Be brief.\nUser: 1+1?\nAssistant:2<|im_end|>\nUser: And 2+2?\nAssistant:4<|im_end|>",
        "llama-instruct": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n1+1? [/INST]2<|im_end|>"
        "<s>[INST] And 2+2? [/INST]4<|im_end|>",
        "alpaca": "<s>Be brief.\n\n### Instruction:\n1+1?\n\n### Response:2<|im_end|>\n\n"
        "### Instruction:\nAnd 2+2?\n\n### Response:4<|im_end|>",
    }


def test_alpaca_without_system_message_begins_with_the_standard_sentence(encoder, tokenizer):
    prompt = encoder.prompt(talk("Add."))[NAMES.index("alpaca")]
    assert tokenizer.decode(prompt) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:"
    )


@pytest.mark.parametrize("name", NAMES)
def test_prompt_equals_hugging_face(encoder, tokenizer, name):
    messages = talk("Hello you", system="Be kind.")
    expected = tokenizer.apply_chat_template(
        messages,
        chat_template=resolve_template(name, tokenizer),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    assert encoder.prompt(messages)[NAMES.index(name)] == expected


def test_many_turns_equal_hugging_face_up_to_the_last_end_token(encoder, tokenizer):
    messages = talk("Hello", "Hi", "How are you?", "Well.", "Bye", "Bye")
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ids = encoder.encode(messages).input_ids[0]
    assert ids == expected[: len(ids)]
    assert tokenizer.decode(expected[len(ids) :]) == "\n"


def test_special_tokens_in_a_response_are_plain_text(encoder, tokenizer):
    labels = encoder.encode(talk("Hi", "a<|im_end|>b<s>")).labels
    assert [token for token in labels if token in tokenizer.all_special_ids] == [tokenizer.eos_token_id]
    assert encoder.decode(labels) == "a<|im_end|>b<s>"


def test_decode_stops_at_the_first_end_token(encoder, tokenizer):
    hi = tokenizer("Hi").input_ids
    assert encoder.decode([*hi, encoder.end_token_id, *hi, encoder.pad_token_id]) == "Hi"
    assert encoder.decode([]) == ""


def test_sentinels_in_contents_do_no_harm(encoder):
    assert_aligned(encoder, talk("uLtRaFuSeR0e", "uLtRaFuSeRxQ0e", "uLtRaFuSeRxQ", "uLtRaFuSeR1e"))


def test_more_than_ten_turns(encoder):
    assert_aligned(encoder, talk(*map(str, range(26))))


def test_white_space_around_a_response_is_left_out(tokenizer):
    llama2 = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() "
        "+ ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    encoder = make_encoder(tokenizer, {"llama2": llama2})
    encoded = assert_aligned(encoder, talk("a", " b", "c", "d"))
    assert tokenizer.decode(encoded.input_ids[0]) == (
        "<s>[INST] a [/INST] b<|im_end|><s>[INST] c [/INST]d<|im_end|>"
    )


BODY = "{% for m in messages %}{{ '<' + m['role'] + '>' }}CONTENT{% endfor %}PROMPT"
PROMPT = "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


def broken(content, prompt=PROMPT):
    return BODY.replace("CONTENT", content).replace("PROMPT", prompt)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (broken("{{ m['content'].upper() }}"), "drops or rewrites response 0"),
        (broken("{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"), "drops or rewrites response 0"),
        (broken("{{ m['content'] + m['content'] }}"), "repeats response 0"),
        (broken("{{ m['content'] }}", "{% if add_generation_prompt %}{{ '<bot>' }}{% endif %}"), "<bot>"),
        (broken("{{ m['content'] }}", ""), "as a generation prompt '<user>Hello'"),
        (
            "{% for m in messages if m['role'] == 'assistant' %}{{ m['content'] }}{% endfor %}",
            "before the first",
        ),
        ("{{ raise_exception('only on Sundays') }}", "only on Sundays"),
        ("{% for %}", "cannot render"),
    ],
)
def test_templates_that_cannot_be_aligned_are_refused(tokenizer, template, reason):
    def build_and_encode():
        make_encoder(tokenizer, {"fine": BUILTIN_TEMPLATES["ultralm"], "odd": template}).encode(
            talk("a", "b")
        )

    with pytest.raises(TemplateError, match="odd") as caught:
        build_and_encode()
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            broken("{{ m['content'] if loop.revindex <= 2 or m['role'] == 'user' }}"),
            "drops or rewrites response 0",
        ),
        (
            "{% for m in messages[-2:] %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}" + PROMPT,
            "response 0",
        ),
        (
            broken("{{ '(thinking)' if m['role'] == 'assistant' and not loop.last }}{{ m['content'] }}"),
            "before response 0",
        ),
    ],
    ids=["drops earlier response", "keeps the last turn", "changes earlier turns"],
)
def test_templates_that_change_the_past_are_refused(tokenizer, template, reason):
    encoder = make_encoder(tokenizer, {"odd": template})
    encoder.encode(talk("a", "b"))
    with pytest.raises(TemplateError, match=reason):
        encoder.encode(talk("a", "b", "c", "d"))


def test_truncation_cuts_the_same_response_tokens_everywhere(tokenizer):
    messages = talk("a", "first answer", "b", "second answer")
    whole = make_encoder(tokenizer).encode(messages)
    lengths = dict(zip(NAMES, map(len, whole.input_ids), strict=True))
    longest = max(lengths.values())
    for limit in range(longest, 0, -1):
        encoder = make_encoder(tokenizer, max_length=limit)
        fitting = min(sum(p + 2 <= limit for p in positions) for positions in whole.response_positions)
        if fitting == 0:
            with pytest.raises(TemplateError, match=f"at most {limit} tokens"):
                encoder.encode(messages, too_long="truncate")
            continue
        encoded = encoder.encode(messages, too_long="truncate")
        assert encoded.labels == whole.labels[:fitting]
        for j, ids in enumerate(encoded.input_ids):
            assert encoded.response_positions[j] == whole.response_positions[j][:fitting]
            assert ids == whole.input_ids[j][: encoded.response_positions[j][-1] + 2]
            assert len(ids) <= limit
    assert limit == 1  # the loop went through every case


def test_too_long_is_an_error_that_names_specialist_limit_and_length(tokenizer):
    messages = talk("a", "first answer")
    length = len(make_encoder(tokenizer).encode(messages).input_ids[1])
    limits = dict.fromkeys(NAMES, 10_000) | {"ultralm": length - 1}
    with pytest.raises(TemplateError, match=rf"'ultralm' reads at most {length - 1} .* has {length} "):
        make_encoder(tokenizer, max_length=limits).encode(messages)
    make_encoder(tokenizer, max_length=limits | {"ultralm": length}).encode(messages)


def test_prompt_leaves_room_for_new_tokens(tokenizer):
    length = max(map(len, make_encoder(tokenizer).prompt(talk("a"))))
    encoder = make_encoder(tokenizer, max_length=length + 5)
    encoder.prompt(talk("a"), max_new_tokens=5)
    with pytest.raises(TemplateError, match="max_new_tokens is 6"):
        encoder.prompt(talk("a"), max_new_tokens=6)


def test_batch_prompts_pads_on_the_left(encoder, tokenizer):
    chats = [talk("Hi"), talk("Hello", "Hi", "How are you?")]
    batch = encoder.batch_prompts(chats)
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    for b, chat in enumerate(chats):
        prompts = encoder.prompt(chat)
        for j, prompt in enumerate(prompts):
            ids, mask = batch["specialist_input_ids"][b, j], batch["specialist_attention_mask"][b, j]
            assert ids.tolist() == [tokenizer.pad_token_id] * (len(ids) - len(prompt)) + prompt
            assert mask.tolist() == [0] * (len(ids) - len(prompt)) + [1] * len(prompt)
        assert batch["input_ids"][b][batch["attention_mask"][b].bool()].tolist() == prompts[0]
    assert batch["input_ids"].shape == (2, len(encoder.prompt(chats[1])[0]))


def test_collate_pads_on_the_right(encoder, tokenizer):
    encoded = [encoder.encode(talk("Hi", "Hello")), encoder.encode(talk("Hello", "Hi", "Bye", "Good night"))]
    batch = encoder.collate(encoded)
    longest = max(len(ids) for item in encoded for ids in item.input_ids)
    num_labels = max(len(item.labels) for item in encoded)
    assert batch["specialist_input_ids"].shape == (2, len(NAMES), longest)
    assert batch["response_positions"].shape == (2, len(NAMES), num_labels)
    assert batch["labels"].shape == (2, num_labels)
    kept = batch["labels"] != -100
    for b, item in enumerate(encoded):
        assert batch["labels"][b][kept[b]].tolist() == item.labels
        for j, ids in enumerate(item.input_ids):
            row, mask = batch["specialist_input_ids"][b, j], batch["specialist_attention_mask"][b, j]
            assert row.tolist() == ids + [tokenizer.pad_token_id] * (longest - len(ids))
            assert mask.tolist() == [1] * len(ids) + [0] * (longest - len(ids))
            positions = batch["response_positions"][b, j]
            assert torch.equal(row[positions + 1][kept[b]], batch["labels"][b][kept[b]])
            assert (positions[~kept[b]] == 0).all()


def test_padding_falls_back_to_the_end_token(tokenizer):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    encoder = make_encoder(bare, {"only": BUILTIN_TEMPLATES["alpaca"]})
    assert encoder.pad_token_id == encoder.end_token_id
    encoder.encode(talk("a", "b"))  # a tokenizer without BOS: the template writes none


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        (["hello"], "message 0 must be an object"),
        ([{"role": "user"}], "message 0 must be an object"),
        ([{"role": "user", "content": 3}], "message 0 must have text as its content, got int"),
        ([{"role": "user", "content": "\ud800"}], "surrogate"),
        ([{"role": "system", "content": "x"}], "last message must have the role 'assistant', got 'system'"),
        (talk("a"), "last message must have the role 'assistant', got 'user'"),
        (talk("a", "b", "c"), "last message must have the role 'assistant', got 'user'"),
        (talk("a", "b")[::-1], "message 0 must have the role 'user', got 'assistant'"),
        (talk("a", "b") + talk("c", "d", system="late"), "message 2 must have the role 'user', got 'system'"),
        (talk("a") + talk("b", "c"), "message 1 must have the role 'assistant', got 'user'"),
        ([{"role": "tool", "content": "x"}], "message 0 must have the role 'user', got 'tool'"),
    ],
)
def test_what_is_no_conversation_is_refused(encoder, messages, problem):
    assert problem in conversation_problem(messages, last_role="assistant")
    with pytest.raises(TemplateError, match="Cannot encode for training"):
        encoder.encode(messages)


def test_a_prompt_must_end_with_the_user(encoder):
    with pytest.raises(TemplateError, match="last message must have the role 'user', got 'assistant'"):
        encoder.prompt(talk("a", "b"))


def test_encoder_settings_are_checked(tokenizer):
    templates = {"text": BUILTIN_TEMPLATES["ultralm"]}
    with pytest.raises(TemplateError, match="at least one specialist"):
        ConversationEncoder(tokenizer, {}, end_token_id=3, max_length=9)
    with pytest.raises(TemplateError, match="end_token_id must be"):
        ConversationEncoder(tokenizer, templates, end_token_id=len(tokenizer), max_length=9)
    with pytest.raises(TemplateError, match="max_length must name"):
        ConversationEncoder(tokenizer, templates, end_token_id=3, max_length={"code": 9})


def test_resolve_template(tokenizer):
    assert resolve_template("tokenizer", tokenizer) == tokenizer.chat_template
    assert resolve_template("alpaca", tokenizer) == BUILTIN_TEMPLATES["alpaca"]
    assert resolve_template("{{ messages }}", tokenizer) == "{{ messages }}"
    with pytest.raises(
        TemplateError, match=r"one of tokenizer, ultralm, .* 'alpacca'. Did you mean 'alpaca'"
    ):
        resolve_template("alpacca", tokenizer)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(TemplateError, match="has none"):
        resolve_template("tokenizer", bare)


def test_vocabulary_difference(tokenizer):
    class Vocabulary:
        def __init__(self, ids):
            self.get_vocab = lambda: ids

    assert vocabulary_difference(tokenizer, tokenizer) is None
    first = Vocabulary({"a": 0, "b": 1, "c": 2})
    assert vocabulary_difference(first, Vocabulary({"a": 0, "b": 1, "d": 2})) == (
        "2 tokens differ in id: 'c' (2 against absent), 'd' (absent against 2)."
    )
    assert vocabulary_difference(first, Vocabulary({"a": 0, "b": 1})) == (
        "1 token differs in id: 'c' (2 against absent)."
    )
    shifted = Vocabulary({str(i): i + 1 for i in range(9)})
    sentence = vocabulary_difference(Vocabulary({str(i): i for i in range(9)}), shifted)
    assert sentence.startswith("9 tokens differ in id: '0' (0 against 1)")
    assert sentence.endswith("'4' (4 against 5) and 4 more.")
