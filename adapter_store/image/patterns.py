"""Which modules a PEFT configuration means: the same matching as PEFT's, under a time limit.

The patterns are a stranger's regular expressions, and Python's `re` holds the interpreter while it backtracks: one
hostile adapter would stop the store for everybody. The `regex` package matches alike and has a timeout.
Source: peft.utils.other.get_pattern_key and peft.tuners.tuners_utils.check_target_module_exists (0.21).
"""

from __future__ import annotations

import time
from typing import Any

import regex  # type: ignore[import-untyped]

from adapter_store.errors import AdapterRejected

MATCH_BUDGET_S = 5.0  # for all matches of one adapter; an honest one needs milliseconds
MAX_PATTERN_CHARS = 4096


class Matcher:
    """Compiles and matches the patterns of one adapter within one time budget. Not shared between adapters."""

    def __init__(self, budget_s: float = MATCH_BUDGET_S) -> None:
        self._deadline = time.monotonic() + budget_s
        self._compiled: dict[str, Any] = {}

    def fullmatch(self, field: str, pattern: str, text: str) -> bool:
        """Whether the whole of `text` matches."""
        return self._run(field, pattern, "fullmatch", text) is not None

    def match(self, field: str, pattern: str, text: str) -> Any:
        """The match of `pattern` at the beginning of `text`, or None."""
        return self._run(field, pattern, "match", text)

    def _run(self, field: str, pattern: str, how: str, text: str) -> Any:
        compiled = self._compiled.get(pattern)
        if compiled is None:
            compiled = self._compiled[pattern] = self._compile(field, pattern)
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            return getattr(compiled, how)(text, timeout=left)
        except TimeoutError as error:
            raise AdapterRejected(
                f"{field}: matching {pattern[:80]!r} takes more than {MATCH_BUDGET_S:g} s; name the modules in a list"
            ) from error

    def _compile(self, field: str, pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN_CHARS:
            raise AdapterRejected(f"{field}: a pattern has {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}")
        try:
            return regex.compile(pattern, flags=regex.V0)
        except (regex.error, RecursionError, OverflowError) as error:
            raise AdapterRejected(f"{field}: {pattern[:80]!r} is not a regular expression: {error}") from error


def pattern_value(matcher: Matcher, field: str, patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first key that matches the end of `name` (as PEFT's get_pattern_key), or `default`."""
    for key, value in patterns.items():
        if matcher.match(field, rf"(.*\.)?({key})$", name):
            return value
    return patterns.get(name, default)


def in_list(names: list[str], name: str) -> bool:
    """PEFT's list rule: the whole name, or a dotted suffix of it."""
    return name in names or any(name.endswith(f".{entry}") for entry in names)


def layer_of(matcher: Matcher, layers_pattern: list[str], name: str) -> int | None:
    """The layer number in `name`, by `layers_pattern` or, without one, the first dotted number."""
    tries = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in layers_pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    for pattern in tries:
        found = matcher.match("layers_pattern", pattern, name)
        if found:
            return int(found["idx"])
    return None
