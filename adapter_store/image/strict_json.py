"""JSON from strangers: bounded in bytes and depth, no duplicate keys, no NaN, real text, an object at the top."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from json.scanner import py_make_scanner  # type: ignore[attr-defined]
from typing import Any

from adapter_store.errors import AdapterRejected

MAX_DEPTH = 32  # of lists and objects in each other
# The parser in C holds the interpreter until it has done: more bytes are left to the one in Python, which takes longer
# and lets others have their turns meanwhile.
_QUICK_BYTES = 64 << 10
# Containers cost most: memory, and the collector's time, in which nobody has a turn. A tensor's entry has three of them
# and at least fifty bytes.
_BYTES_A_CONTAINER = 16
_SPARE_CONTAINERS = 256
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
# What is left of escapes for halves of characters when whole ones are taken away. Source: RFC 8259, section 7.
_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
_STRING = re.compile(rb'"[^"]*(?:"|\Z)')


def load_object(data: bytes | memoryview, what: str, max_bytes: int) -> dict[str, Any]:
    """Parses `data` as one JSON object; `what` names it in the refusal.

    Raises: AdapterRejected for anything that is not one well-formed object of at most `max_bytes`.
    """
    if len(data) > max_bytes:
        raise AdapterRejected(f"{what} has {len(data)} bytes, the limit is {max_bytes}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise AdapterRejected(f"{what} holds the key {twice[:80]!r} twice")
        return result

    def no_constant(text: str) -> Any:
        raise AdapterRejected(f"{what} holds {text}, which is no JSON number")

    text = bytes(data)
    plain = text.replace(b"\\\\", b"")
    brackets = brackets_of(plain)
    if not is_shallow(brackets):
        raise AdapterRejected(f"{what} is nested too deeply, the limit is {MAX_DEPTH} levels")
    if len(brackets) // 2 > len(text) // _BYTES_A_CONTAINER + _SPARE_CONTAINERS:
        raise AdapterRejected(f"{what} has {len(brackets) // 2} lists and objects, too many for its {len(text)} bytes")
    try:
        value = _parse(text, unique, no_constant)
    except RecursionError as error:
        raise AdapterRejected(f"{what} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of too many digits
        raise AdapterRejected(f"{what} is not JSON: {_told(error)}") from None  # these errors hold the whole text
    if not isinstance(value, dict):
        raise AdapterRejected(f"{what} is a JSON {type(value).__name__}, not an object")
    if _HALF.search(_PAIR.sub(b" ", plain)):
        raise AdapterRejected(f"{what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def brackets_of(text: bytes) -> bytes:
    """The brackets outside strings of `text`, which is without escaped backslashes. In pieces: others have turns."""
    plain, found, is_inside = text.replace(b'\\"', b""), [], False
    for start in range(0, len(plain), _QUICK_BYTES):
        piece = (b'"' if is_inside else b"") + plain[start : start + _QUICK_BYTES]
        found.append(_STRING.sub(b"", piece).translate(None, delete=_NO_BRACKETS))
        is_inside = piece.count(b'"') % 2 == 1
    return b"".join(found)


def is_shallow(brackets: bytes) -> bool:
    """Whether none is much deeper than MAX_DEPTH. A few that are not closed are left to JSON."""
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return len(brackets) <= MAX_DEPTH


def _parse(text: bytes, unique: Callable[..., Any], no_constant: Callable[[str], Any]) -> Any:
    decoder = json.JSONDecoder(object_pairs_hook=unique, parse_constant=no_constant)
    if len(text) > _QUICK_BYTES:
        decoder.scan_once = py_make_scanner(decoder)  # type: ignore[attr-defined]
    return decoder.decode(text.decode(json.detect_encoding(text)))


def _told(error: ValueError) -> str:
    return error.reason if isinstance(error, UnicodeDecodeError) else str(error)[:200]
