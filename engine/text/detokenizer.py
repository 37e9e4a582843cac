"""Token ids to text, one token at a time, at a cost per token that does not grow with the text.

A continuation reads as it does behind its prompt: prompt and text together are what the tokenizer makes of all tokens
at once. So a word keeps the space that a decoder would strip from the first token of a text, and a character whose
first bytes end the prompt appears once the output completes it. How a token reads depends on the tokenizer:

- byte-level (GPT-2, Llama 3, Qwen): every character of the token stands for one byte. One incremental UTF-8 decoder
  turns bytes into text, so that a character spread over tokens appears once it is complete;
- a byte-fallback token `<0xE4>` (Llama 2, Gemma): that byte, likewise;
- any other: what it adds to the text of the few tokens before it, as the tokenizer's own decoder writes them.

The sum equals `Tokenizer.decode` of all ids for any ids, but for one case: of a run of byte-fallback tokens that is not
valid UTF-8 as a whole, decode() replaces every byte; we keep the valid characters shown before that was known.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from engine.text.clean_up import SpaceCleaner
from engine.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 4  # before a token, with text: more than any decoder that models ship looks back
MAX_WINDOW_TOKENS = 8  # decoded for one token; CONTEXT_TOKENS more when the window is cut
PROMPT_TOKENS = 32  # of the prompt that are looked at

_REPLACEMENT = "\ufffd"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class DetokenizerFactory:
    """What all detokenizers of one tokenizer share: how a token becomes text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = list(_decoder_kinds(json.loads(tokenizer.backend.to_str()).get("decoder")))
        self.is_byte_level = kinds == ["ByteLevel"]
        self.has_split_characters = "ByteLevel" in kinds
        self._has_byte_tokens = "ByteFallback" in kinds
        self._bytes: dict[int, bytes] = {}
        self._byte_of: dict[int, int | None] = {}
        self._is_known: dict[int, bool] = {}
        self.cleans_up_spaces = tokenizer.cleans_up_spaces
        self.special_ids = tokenizer.special_ids
        self.special_texts = frozenset(filter(None, map(tokenizer.id_to_token, tokenizer.special_ids)))

    def new(self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True) -> Detokenizer:
        """For the continuation of a prompt. With `skip_special_tokens` special tokens have no text."""
        return Detokenizer(self, prompt_token_ids, skip_special_tokens)

    def context_of(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
        """The last tokens that have text."""
        found: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if len(found) == PROMPT_TOKENS:
                break
            if not self.is_silent(token_id, skip_special_tokens):
                found.append(token_id)
        return found[::-1]

    def is_silent(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether a token has no text: a special one, or one that the tokenizer does not know."""
        if skip_special_tokens and token_id in self.special_ids:
            return True
        known = self._is_known.get(token_id)
        if known is None:
            known = self._is_known[token_id] = self._tokenizer.id_to_token(token_id) is not None
        return not known

    def special_text(self, token_id: int) -> str:
        """How a special token is written; nothing for any other."""
        return (self._tokenizer.id_to_token(token_id) or "") if token_id in self.special_ids else ""

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up=False)

    def bytes_of(self, token_id: int) -> bytes:
        """Of a byte-level token."""
        piece = self._bytes.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            # An added token may hold characters that stand for no byte: then it is plain text.
            known = all(character in _BYTE_OF_CHARACTER for character in token)
            piece = bytes(_BYTE_OF_CHARACTER[character] for character in token) if known else token.encode()
            self._bytes[token_id] = piece
        return piece

    def byte_of(self, token_id: int) -> int | None:
        """The byte that a byte-fallback token stands for; None for any other token."""
        if not self._has_byte_tokens:
            return None
        if token_id not in self._byte_of:
            match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
            self._byte_of[token_id] = int(match[1], 16) if match else None
        return self._byte_of[token_id]

    def piece(self, previous: int | None, token_id: int) -> bytes:
        """What one token adds behind another one with text (None: it is the first), of a character perhaps a part."""
        if self.is_byte_level:
            return self.bytes_of(token_id)
        byte = self.byte_of(token_id)
        if byte is not None and not (previous is None and byte == 0x20):
            return bytes((byte,))
        if previous is None:
            return self.decode([token_id]).encode()
        return self.decode([previous, token_id])[len(self.decode([previous])) :].encode()


class Detokenizer:
    """The text of one sequence behind its prompt, handed out in deltas."""

    __slots__ = ("_cleaner", "_factory", "_reader", "_skip")

    def __init__(self, factory: DetokenizerFactory, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._factory = factory
        self._skip = skip_special_tokens
        context = factory.context_of(prompt_token_ids, skip_special_tokens)
        reader = _ByteLevelReader if factory.is_byte_level else _WindowReader
        self._reader: _Reader = reader(factory, context)
        self._cleaner = SpaceCleaner(factory.decode(context)) if factory.cleans_up_spaces else None

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        if self._factory.is_silent(token_id, self._skip):
            return ""
        text = self._reader.push(token_id)
        return text if self._cleaner is None else self._cleaner.push(text)

    def hidden_text(self, token_id: int) -> str:
        """How a token is written that `push` has no text for because it is special; nothing for any other."""
        return self._factory.special_text(token_id) if self._skip else ""

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a sequence that was never completed, else nothing."""
        text = self._reader.finish()
        return text if self._cleaner is None else self._cleaner.push(text) + self._cleaner.finish()


class _Reader(Protocol):
    """Reads tokens that have text."""

    def push(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


class _ByteLevelReader:
    """Tokens that are bytes.

    `_is_owed`: the unfinished character began in the prompt. If it is never completed, its U+FFFD is the prompt's.
    """

    __slots__ = ("_factory", "_is_owed", "_utf8")

    def __init__(self, factory: DetokenizerFactory, context: list[int]) -> None:
        self._factory = factory
        self._utf8 = _new_utf8_decoder(errors="replace")
        for token_id in context:
            self._utf8.decode(factory.bytes_of(token_id))
        self._is_owed = bool(self._utf8.getstate()[0])

    def push(self, token_id: int) -> str:
        text = self._utf8.decode(self._factory.bytes_of(token_id))
        return self._without_owed(text) if self._is_owed else text

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        return self._without_owed(text) if self._is_owed else text

    def _without_owed(self, text: str) -> str:
        self._is_owed = not text
        return text.removeprefix(_REPLACEMENT) if text[:1] == _REPLACEMENT else text


class _WindowReader:
    """Tokens that read as the tokenizer's decoder writes the last few of them.

    `_window`: the last tokens; of its decoded text, `_num_shown` characters are out (or are the prompt's).
    A run of byte-fallback tokens is read byte by byte: where it is cut off, the decoder would take it for broken.
    """

    __slots__ = ("_factory", "_has_text", "_in_run", "_is_owed", "_num_shown", "_run", "_window")

    def __init__(self, factory: DetokenizerFactory, context: list[int]) -> None:
        self._factory = factory
        self._window = context[-CONTEXT_TOKENS:]
        self._run = _ByteRun()
        self._in_run = False
        for token_id in context:
            self._note_byte(factory.byte_of(token_id))
        self._run.leave_to_prompt()
        text = factory.decode(self._window) if context else ""
        self._num_shown = self._num_certain(text)
        self._is_owed = self._num_shown < len(text)  # as in _ByteLevelReader
        self._has_text = bool(text)

    def push(self, token_id: int) -> str:
        byte = self._factory.byte_of(token_id)
        if byte is not None and (byte != 0x20 or self._has_text or self._run.is_open):  # else: the decoder may strip it
            self._window = [*self._window[1 - CONTEXT_TOKENS :], token_id]
            text = self._note_byte(byte)
        else:
            if self._in_run:
                self._num_shown = len(self._factory.decode(self._window))
            text = self._note_byte(None) + self._read(token_id)
            if self._is_owed and text:
                self._is_owed = False
                text = text.removeprefix(_REPLACEMENT)
        self._has_text = self._has_text or bool(text)
        return text

    def finish(self) -> str:
        left = self._factory.decode(self._window)[self._num_shown :] if self._factory.has_split_characters else ""
        return self._note_byte(None) + ("" if self._is_owed else left)

    def _note_byte(self, byte: int | None) -> str:
        """Of the next token; None: it stands for none, or there is no token."""
        was_in_run, self._in_run = self._in_run, byte is not None
        if byte is not None:
            return self._run.push(byte)
        return self._run.end() if was_in_run else ""

    def _read(self, token_id: int) -> str:
        window = self._window
        window.append(token_id)
        text = self._factory.decode(window)
        end = self._num_certain(text)
        delta = text[self._num_shown : end]
        self._num_shown = max(self._num_shown, end)
        if len(window) >= MAX_WINDOW_TOKENS:
            # What is not shown is the last character at most: the same at the end of a shorter window.
            num_held = len(text) - self._num_shown
            del window[:-CONTEXT_TOKENS]
            self._num_shown = max(0, len(self._factory.decode(window)) - num_held)
        return delta

    def _num_certain(self, text: str) -> int:
        """Characters that no further token changes: a U+FFFD at the end may be the beginning of a character."""
        return len(text) - (self._factory.has_split_characters and text.endswith(_REPLACEMENT))


class _ByteRun:
    """A run of byte-fallback tokens. Once it is known to be no UTF-8, each byte is a U+FFFD, as decoders write it."""

    __slots__ = ("_is_broken", "_num_of_prompt", "_pending")

    def __init__(self) -> None:
        self._pending = bytearray()
        self._is_broken = False
        self._num_of_prompt = 0  # of the pending bytes

    def push(self, byte: int) -> str:
        if self._is_broken:
            return _REPLACEMENT
        self._pending.append(byte)
        try:
            text = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return ""
            self._is_broken = True
            return self._replaced()
        self._pending.clear()
        self._num_of_prompt = 0
        return text

    def end(self) -> str:
        """Another token follows, or none."""
        self._is_broken = False
        return self._replaced()

    @property
    def is_open(self) -> bool:
        """Whether a byte has come of which nothing is certain yet, or one that is no UTF-8."""
        return bool(self._pending) or self._is_broken

    def leave_to_prompt(self) -> None:
        """What came so far is the prompt's; a character that it has begun is shown when it is completed."""
        self._num_of_prompt = len(self._pending)

    def _replaced(self) -> str:
        num_bytes = len(self._pending) - self._num_of_prompt
        self._pending.clear()
        self._num_of_prompt = 0
        return _REPLACEMENT * num_bytes


def _decoder_kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The types of a tokenizer.json decoder, sequences flattened."""
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_kinds(part)
    else:
        yield decoder["type"]


def _byte_characters() -> dict[str, int]:
    """The character that stands for each byte. Source: `bytes_to_unicode` of GPT-2's encoder."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + offset): byte for offset, byte in enumerate(others)})
    return table


_BYTE_OF_CHARACTER = _byte_characters()
