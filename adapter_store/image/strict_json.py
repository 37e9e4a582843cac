"""JSON from strangers: bounded in bytes and depth, no duplicate keys, no NaN, real text, an object at the top."""

from __future__ import annotations

import json
import re
from typing import Any

from adapter_store.errors import AdapterRejected

MAX_DEPTH = 32  # of lists and objects in each other
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
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
    if not is_shallow(text):
        raise AdapterRejected(f"{what} is nested too deeply, the limit is {MAX_DEPTH} levels")
    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError as error:
        raise AdapterRejected(f"{what} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of too many digits
        raise AdapterRejected(f"{what} is not JSON: {_told(error)}") from None  # these errors hold the whole text
    if not isinstance(value, dict):
        raise AdapterRejected(f"{what} is a JSON {type(value).__name__}, not an object")
    if b"\\u" in text and _has_surrogates(value):
        raise AdapterRejected(f"{what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def is_shallow(text: bytes) -> bool:
    """Whether no bracket outside strings is much deeper than MAX_DEPTH. A few that are not closed are left to JSON."""
    bare = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = _STRING.sub(b"", bare).translate(None, delete=_NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        if not brackets:
            return True
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
    return len(brackets) <= MAX_DEPTH


def _told(error: ValueError) -> str:
    return error.reason if isinstance(error, UnicodeError) else str(error)[:200]


def _has_surrogates(value: Any) -> bool:
    try:
        # Cheaper than to walk: the writer escapes nothing, and the encoder refuses them.
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False
