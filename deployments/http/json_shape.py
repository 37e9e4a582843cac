"""What a JSON text holds, counted without parsing it: a hostile one is refused before an object of it exists.

Two megabytes of `[` would nest too deep for any reader, four of `{},` make a million objects. Counting takes a few
passes over the bytes, in pieces and outside the interpreter lock.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

SMALL_BYTES = 4096
PIECE_BYTES = 1 << 17
# One that does not end goes to the end of the text, so that nothing is looked at twice.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(rb"[\[\]{}]")
_QUOTE, _COMMA, _COLON = b'",:'
_OPEN, _CLOSE = b"{}"
_LOWER = 0x20  # turns [ and ] into { and }


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a valid text the numbers are exact, but for `num_values`, which is an upper bound."""

    depth: int
    num_containers: int  # lists and objects
    num_strings: int  # names of fields among them
    num_pairs: int  # names of fields
    num_values: int


def shape_of(text: bytes) -> Shape:
    """Counts what is outside of strings. An invalid text gives some numbers: its parser will refuse it."""
    return _of_small(text) if len(text) <= SMALL_BYTES else _of_large(text)


def _of_small(text: bytes) -> Shape:
    """A dozen array operations cost more than a small text's strings do."""
    outside, num_strings = _STRING.subn(b"", text)
    depth = max_depth = num_containers = 0
    for bracket in _BRACKET.findall(outside):
        if bracket in b"[{":
            num_containers += 1
            depth += 1
            max_depth = max(max_depth, depth)
        else:
            depth -= 1
    num_values = outside.count(b",") + num_containers + 1
    return Shape(max_depth, num_containers, num_strings, outside.count(b":"), num_values)


def _of_large(text: bytes) -> Shape:
    depth = max_depth = num_containers = num_quotes = num_pairs = num_commas = 0
    in_string, is_escaped = False, False
    for at in range(0, len(text), PIECE_BYTES):
        piece = text[at : at + PIECE_BYTES]
        if is_escaped:
            piece = b"_" + piece[1:]
        is_escaped = False
        if b"\\" in piece:
            # In this order and from left to right: a quote behind a pair of backslashes ends its string.
            piece = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__")
            is_escaped = piece.endswith(b"\\")
        codes = np.frombuffer(piece, np.uint8)
        quotes = codes == _QUOTE
        odd = (np.cumsum(quotes, dtype=np.uint8) & 1).astype(bool)
        outside = odd if in_string else ~odd
        brackets = codes | _LOWER
        opened = (brackets == _OPEN) & outside
        levels = np.cumsum(opened.astype(np.int8) - ((brackets == _CLOSE) & outside).astype(np.int8), dtype=np.int32)
        max_depth = max(max_depth, depth + int(levels.max()))
        depth += int(levels[-1])
        num_containers += int(np.count_nonzero(opened))
        num_quotes += int(np.count_nonzero(quotes))
        num_pairs += int(np.count_nonzero((codes == _COLON) & outside))
        num_commas += int(np.count_nonzero((codes == _COMMA) & outside))
        in_string ^= bool(odd[-1])
    num_values = num_commas + num_containers + 1
    return Shape(max_depth, num_containers, num_quotes // 2, num_pairs, num_values)
