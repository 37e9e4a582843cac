"""Token ids to text, one token at a time, at a cost per token that does not grow with the text.

A token contributes bytes; one incremental UTF-8 decoder turns them into text, so that a character spread over tokens
appears once it is complete and a broken sequence becomes U+FFFD. What a token contributes depends on the tokenizer:

- byte-level (GPT-2, Llama 3, Qwen): every character of the token stands for one byte;
- a byte-fallback token `<0xE4>` (Llama 2, Gemma): that byte;
- any other: its text as it follows the token before it (the first token may lose its leading space).

The sum equals `Tokenizer.decode(all ids)` for any ids, but for one case: of a run of byte-fallback tokens that is not
valid UTF-8 as a whole, decode() replaces every byte; we keep its valid characters, having shown them already.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from engine.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")

PieceOf = Callable[[int | None, int], bytes]


class DetokenizerFactory:
    """What all detokenizers of one tokenizer share: how a token becomes bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = set(_decoder_kinds(json.loads(tokenizer.backend.to_str()).get("decoder")))
        self._has_byte_tokens = "ByteFallback" in kinds
        self._cache: dict[int, bytes] = {}
        self._silent: dict[int, bool] = {}
        self.special_ids = tokenizer.special_ids
        self.piece: PieceOf = self._byte_level_piece if kinds == {"ByteLevel"} else self._piece_in_context

    def new(self) -> Detokenizer:
        return Detokenizer(self)

    def is_silent(self, token_id: int) -> bool:
        """Whether a token has no text: a special one, or one that the tokenizer does not know."""
        silent = self._silent.get(token_id)
        if silent is None:
            silent = token_id in self.special_ids or self._tokenizer.id_to_token(token_id) is None
            self._silent[token_id] = silent
        return silent

    def _byte_level_piece(self, previous: int | None, token_id: int) -> bytes:
        piece = self._cache.get(token_id)
        if piece is None:
            token = self._tokenizer.id_to_token(token_id) or ""
            # An added token may hold characters that stand for no byte: then it is plain text.
            known = all(character in _BYTE_OF_CHARACTER for character in token)
            piece = bytes(_BYTE_OF_CHARACTER[character] for character in token) if known else token.encode()
            self._cache[token_id] = piece
        return piece

    def _piece_in_context(self, previous: int | None, token_id: int) -> bytes:
        decode = self._tokenizer.decode
        if self._has_byte_tokens:
            match = _BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token_id) or "")
            # As the very first token a byte may be a space that the decoder strips: let it decide.
            if match and (previous is not None or match[1] != "20"):
                return bytes.fromhex(match[1])
        if previous is None:
            return decode([token_id], skip_special_tokens=False).encode()
        before = decode([previous], skip_special_tokens=False)
        return decode([previous, token_id], skip_special_tokens=False)[len(before) :].encode()


class Detokenizer:
    """The text of one sequence so far, handed out in deltas. Special tokens have no text."""

    __slots__ = ("_factory", "_previous", "_utf8")

    def __init__(self, factory: DetokenizerFactory) -> None:
        self._factory = factory
        self._previous: int | None = None
        self._utf8 = _new_utf8_decoder(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; may be empty."""
        factory = self._factory
        if factory.is_silent(token_id):
            return ""
        piece = factory.piece(self._previous, token_id)
        self._previous = token_id
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a sequence that was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


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
