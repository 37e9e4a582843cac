"""Calls as a list of Python's: `[f(a=1, b="x"), g()]`. Read as Python's own parser reads it, and never run."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from deployments.dialects.calls import CallsReader, MarkedReader
from deployments.dialects.events import Arguments, Begin, Event, overlap, read_calls

_JSON_NAMES = {"true": True, "false": False, "null": None}
_MAX_CHARS = 2**16


def read_python(text: str) -> list[Event] | None:
    """The calls of a list; None: it is something else."""
    if len(text) > _MAX_CHARS:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    events: list[Event] = []
    for call in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(call, ast.Call) or call.args or not all(item.arg for item in call.keywords):
            return None
        try:
            name = _name(call.func)
            arguments = {str(item.arg): _value(item.value) for item in call.keywords}
            events += [Begin(name), Arguments(json.dumps(arguments, ensure_ascii=False))]
        except (ValueError, TypeError, RecursionError):
            return None
    return events or None


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("a function is called by its name")
    return node.id


def _value(node: ast.expr) -> Any:
    """A literal, JSON's names for true, false and null among them."""
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(item) for key, item in zip(node.keys, node.values, strict=True)}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | bool | None):
        raise ValueError("JSON has no such value")
    return value


def _key(node: ast.expr | None) -> str:
    if node is None or not isinstance(key := ast.literal_eval(node), str):
        raise ValueError("a key is a text")
    return key


class PythonicReader(CallsReader):
    """An answer that is nothing but such a list, as Llama 3.2 and 4 write it, with `<|python_start|>` or without."""

    _MARKS = ("<|python_start|>", "<|python_end|>")

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _read(self, *, final: bool) -> Iterator[Event]:
        if not self._is_text:
            held = self._held.strip()
            if not final and (not held or overlap(held, self._MARKS[0]) == len(held)):
                return
            inside = held.removeprefix(self._MARKS[0]).removesuffix(self._MARKS[1])
            if inside.lstrip()[:1] in ("[", "") and not final:
                return  # told once it is whole: only Python knows where it ends
            events = read_python(inside) if inside.lstrip().startswith("[") else None
            self._is_text = events is None
            if events:
                self._take(len(self._held))
                yield from self._called(events)
        yield from self._text(self._take(len(self._held)))
        if final:
            yield from self._rest()


class LiquidReader(MarkedReader):
    """Such a list between `<|tool_call_start|>` and `<|tool_call_end|>`, as LFM2 writes it; JSON if it was asked to."""

    opening, closing = "<|tool_call_start|>", "<|tool_call_end|>"

    def _calls(self, body: str) -> list[Event] | None:
        return read_python(body) or read_calls(body)
