"""Text of a growing response: never a broken character, never a part of a stop text, nothing lost."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ultrafuser.decoding.text import StoppedText, TextStream, TokenBytes, token_texts


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def like_sentencepiece(*names: str) -> PreTrainedTokenizerFast:
    """A tokenizer that decodes as Llama 2's: pieces with their spaces, bytes, no space at the beginning."""
    model = tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    replace, strip = tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.Strip(" ", 1, 0)
    made.decoder = tokenizers.decoders.Sequence(
        [replace, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


def pieces(tokenizer, text: str, stop: tuple[str, ...]) -> tuple[list[str], bool]:
    """What every token adds, then what the end adds; and whether a stop text was met."""
    stream = StoppedText(tokenizer, stop)
    parts = []
    for token_id in ids_of(tokenizer, text):
        parts.append(stream.push(token_id))
        if stream.stopped:
            break
    return [*parts, stream.flush()], stream.stopped


# --- characters ---------------------------------------------------------------------------------------------------


def test_holds_back_a_character_until_it_is_whole(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in ids_of(tokenizer, "a🙂b")] == ["a", "", "", "", "🙂", "b"]
    assert stream.flush() == ""


def test_shows_what_stays_broken_at_the_end(tokenizer):
    *broken, _ = ids_of(tokenizer, "🙂")
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token_id) for token_id in broken) == ""
    assert set(stream.flush()) == {"\ufffd"}
    assert stream.flush() == ""


def test_goes_on_after_a_broken_character(tokenizer):
    smile = ids_of(tokenizer, "🙂")
    stream = TextStream(tokenizer)
    text = "".join(stream.push(token_id) for token_id in [*smile[:-1], *smile, *smile])
    assert text.endswith("🙂🙂")


@pytest.mark.parametrize("kind", ["broken", "special"])
def test_runs_without_text_are_not_read_over_and_over(tokenizer, kind, monkeypatch):
    """Bytes of no character, or special tokens, thousands of them: no token may cost more than those before it."""
    smile = ids_of(tokenizer, "\U0001f642")
    token = smile[0] if kind == "broken" else tokenizer.eos_token_id
    stream, most = TextStream(tokenizer), 0
    decode = stream._decode

    def counted(ids):
        nonlocal most
        most = max(most, len(ids))
        return decode(ids)

    monkeypatch.setattr(stream, "_decode", counted)
    text = "".join(stream.push(token) for _ in range(1000)) + stream.flush()
    assert most <= 200
    assert text == ("\ufffd" * 1000 if kind == "broken" else "")
    assert "".join(stream.push(token) for token in ids_of(tokenizer, "well")) == "well"


def test_special_tokens_are_no_text(tokenizer):
    ids = tokenizer("Hi<|im_end|>", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, ids)) == "Hi"
    assert "".join(token_texts(tokenizer, ids)) == "Hi<|im_end|>"


@pytest.mark.parametrize("ids", [[1, 0, 2, 1], [0, 2, 2], [1, 0, 0, 2, 0, 2]], ids=str)
def test_a_special_token_takes_no_space_with_it(ids):
    tokenizer = like_sentencepiece("<s>", "\u2581Hello", "\u2581world")
    stream = TextStream(tokenizer)
    text = "".join(map(stream.push, ids)) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert " world" in text or ids[0] == 0


@given(text=st.text(max_size=40))
def test_texts_of_tokens_make_up_the_text(tokenizer, text):
    ids = ids_of(tokenizer, text)
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@given(text=st.text(max_size=40))
def test_bytes_of_tokens_make_up_those_of_the_text(tokenizer, text):
    bytes_of = TokenBytes(tokenizer).of
    assert b"".join(bytes_of(token_id) for token_id in ids_of(tokenizer, text)) == text.encode()


def test_bytes_of_special_tokens_and_of_those_that_sentencepiece_falls_back_to(tokenizer):
    bytes_of = TokenBytes(tokenizer).of
    assert bytes_of(tokenizer.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    bytes_of = TokenBytes(like_sentencepiece("<s>", "<0xC3>", "<0xA9>", "a", "\u2581", "\u2581cat", "cat")).of
    assert [bytes_of(i) for i in range(1, 7)] == [b"\xc3", b"\xa9", b"a", b" ", b" cat", b"cat"]


def test_no_token_has_no_text(tokenizer):
    assert token_texts(tokenizer, []) == []


# --- stop texts ---------------------------------------------------------------------------------------------------


def test_a_stop_text_across_tokens_ends_the_text_before_it(tokenizer):
    assert len(ids_of(tokenizer, "xyz")) == 3
    assert pieces(tokenizer, "abxyzcd", ("xyz",)) == (["a", "b", "", "", "", ""], True)


def test_a_stop_text_in_the_middle_of_a_token(tokenizer):
    assert len(ids_of(tokenizer, " instruction")) == 1
    assert pieces(tokenizer, "an instruction", ("tru",)) == (["an", " ins", ""], True)


def test_what_only_looked_like_a_stop_text_is_released(tokenizer):
    assert pieces(tokenizer, "xyab", ("xyz",)) == (["", "", "xya", "b", ""], False)
    assert pieces(tokenizer, "xxyz", ("xyz",)) == (["", "x", "", "", ""], True)
    assert pieces(tokenizer, "xyxy", ("xyxz",)) == (["", "", "", "xy", "xy"], False)


def test_what_was_held_back_comes_at_the_end(tokenizer):
    assert pieces(tokenizer, "abxy", ("xyz",)) == (["a", "b", "", "", "xy"], False)
    *broken, _ = ids_of(tokenizer, "🙂")
    stream = StoppedText(tokenizer, ("xyz",))
    assert [stream.push(token_id) for token_id in [*ids_of(tokenizer, "x"), *broken]] == [""] * 4
    assert stream.flush().strip("\ufffd") == "x"
    assert stream.flush() == ""


def test_the_earliest_of_several_stop_texts_wins(tokenizer):
    assert pieces(tokenizer, "an instruction", ("ruc", "stru")) == (["an", " in", ""], True)
    assert pieces(tokenizer, "an instruction", ("stru", "ruc")) == (["an", " in", ""], True)


def test_nothing_follows_a_stop_text(tokenizer):
    stream = StoppedText(tokenizer, ("b",))
    assert [stream.push(token_id) for token_id in ids_of(tokenizer, "abcb")] == ["a", "", "", ""]
    assert stream.stopped
    assert stream.flush() == ""


def test_a_stop_text_may_become_whole_at_the_end(tokenizer):
    """The replacement character of a broken end is text like any other."""
    *broken, _ = ids_of(tokenizer, "🙂")
    stream = StoppedText(tokenizer, ("a\ufffd",))
    assert [stream.push(token_id) for token_id in [*ids_of(tokenizer, "ba"), *broken]] == ["b", *[""] * 4]
    assert stream.flush() == ""
    assert stream.stopped


@given(
    text=st.text(alphabet="ab🙂", max_size=30),
    stop=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_the_text_is_what_stands_before_the_first_stop_text(tokenizer, text, stop):
    """One character after the other here, so the stop text that is whole first ends the text."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    first = min(ends)[0] if ends else None
    expected = text if first is None else text[: min(begin for end, begin in ends if end == first)]
    parts, stopped = pieces(tokenizer, text, stop)
    assert "".join(parts) == expected
    assert stopped == bool(ends)


@pytest.mark.parametrize("text", ["", "a"])
def test_without_stop_texts_nothing_is_held_back(tokenizer, text):
    assert pieces(tokenizer, text, ()) == ([*text, ""], False)
