"""Text of a growing response, and where it has to stop."""

import re
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_MOST_HELD_TOKENS = 64
"""Whose text waits for a character to be complete, of which every token has a byte at least: then it is broken."""


class TextStream:
    """Text of a growing response.

    A token may end in the middle of a character (tokens are bytes), and the text of a token may depend on
    those before it (a leading space). So the text handed out is what the last tokens together have more than
    before, and it is held back while its last character is incomplete. Only in a long run of broken characters may one
    that is whole read U+FFFD, too.

    Args:
        tokenizer: that the specialists share.
        skip_special_tokens: leave special tokens out of the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = frozenset(tokenizer.all_special_ids if skip_special_tokens else ())
        self._ids: list[int] = []
        self._start = 0  # the window that is decoded: tokens before it no longer matter
        self._done = 0  # tokens whose text was handed out

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now complete, often one token's, sometimes empty."""
        if token_id in self._skipped and self._done == len(self._ids):
            return ""  # but between broken characters it keeps them apart
        self._ids.append(token_id)
        text = self._new_text()
        waits = text.endswith("\ufffd") and len(self._ids) - self._done < _MOST_HELD_TOKENS
        return "" if waits else self._hand_out(text)

    def flush(self) -> str:
        """The text that was held back, at the end of the response; broken characters read U+FFFD."""
        return self._hand_out(self._new_text())

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._done])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _hand_out(self, text: str) -> str:
        if text:  # a window of tokens without text would read as the beginning, where a space is dropped
            self._start = self._done
        self._done = len(self._ids)
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False)


class StoppedText:
    """Text of a growing response that ends before the first of some stop texts.

    Text that may be the beginning of a stop text is held back until it is clear.

    Args:
        tokenizer: that the specialists share.
        stop: the stop texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one more token; return the text that is now certain."""
        return self._certain(self._stream.push(token_id))

    def flush(self) -> str:
        """The text that was held back, at the end of the response; none behind a stop text."""
        text = self._certain(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _certain(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """The text of every token, special ones included, such that joining gives the text of the response.

    Args:
        tokenizer: that the specialists share.
        token_ids: of one response.

    Returns:
        As many texts; of the tokens that make up one character all but the last are empty.
    """
    stream = TextStream(tokenizer, skip_special_tokens=False)
    texts = [stream.push(token_id) for token_id in token_ids]
    if texts:
        texts[-1] += stream.flush()
    return texts


class TokenBytes:
    """What single tokens stand for.

    Args:
        tokenizer: that the specialists share.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A token reads as it does in the middle of a text: at the beginning, SentencePiece drops a space.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._skipped = len(self._decode(self._before))

    def of(self, token_id: int) -> bytes:
        """The text of a token in UTF-8; of one that is a part of a character only, the bytes that it is.

        Args:
            token_id: of one token, special or not.
        """
        text = self._decode([*self._before, token_id])[self._skipped :]
        if "\ufffd" not in text:
            return text.encode()
        written = self._tokenizer.convert_ids_to_tokens(token_id)
        if found := re.fullmatch(r"<0x([0-9A-F]{2})>", written):  # how SentencePiece writes a byte
            return bytes.fromhex(found[1])
        if set(written) <= _BYTES.keys():
            return bytes(_BYTES[character] for character in written)
        return text.encode()

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""How vocabularies over bytes write each of them."""


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` are the first ones of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
