"""JSON from strangers: bounded, no duplicate keys, no NaN, no deep nesting, an object at the top."""

from __future__ import annotations

import json
from typing import Any

from adapter_store.errors import AdapterRejected


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
            raise AdapterRejected(f"{what} holds the key {twice!r} twice")
        return result

    def no_constant(text: str) -> Any:
        raise AdapterRejected(f"{what} holds {text}, which is no JSON number")

    try:
        value = json.loads(bytes(data), object_pairs_hook=unique, parse_constant=no_constant)
    except RecursionError as error:
        raise AdapterRejected(f"{what} is nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of too many digits
        raise AdapterRejected(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise AdapterRejected(f"{what} is a JSON {type(value).__name__}, not an object")
    return value
