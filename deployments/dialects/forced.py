"""Calls that a grammar forces: nothing but JSON, whatever a family would write, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from deployments.dialects.calls import HEAD
from deployments.dialects.events import Arguments, Begin, Event, JsonObject, Reader

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def schema_of_calls(tools: Mapping[str, Any], *, several: bool) -> dict[str, Any]:
    """What an answer is that calls one of `tools` (the schema of each one's parameters, by its name), or `several`."""
    definitions: dict[str, Any] = {}
    calls = []
    for index, (name, parameters) in enumerate(tools.items()):
        home = f"#/$defs/tool{index}"
        definitions[f"tool{index}"] = moved(parameters or _NOTHING, home)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "parameters": {"$ref": home}},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    many: dict[str, Any] = {} if several else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **many, "$defs": definitions}


def schema_of_arguments(parameters: Any) -> dict[str, Any]:
    """What an answer is that is one tool's arguments."""
    return parameters or _NOTHING


def moved(schema: Any, home: str) -> Any:
    """`schema` at the place `home` of another document: what it refers to by its own root is found there."""
    if isinstance(schema, list):
        return [moved(item, home) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _reference(value, home) if key == "$ref" else moved(value, home) for key, value in schema.items()}


def _reference(value: Any, home: str) -> Any:
    return home + value[1:] if isinstance(value, str) and (value == "#" or value.startswith("#/")) else value


class ArgumentsReader(Reader):
    """An answer that is the arguments of the tool `name`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name: str | None = name

    def _read(self, *, final: bool) -> Iterator[Event]:
        if self._held and self._name is not None:
            yield Begin(self._name)
            self._name = None
        if text := self._take(len(self._held)):
            yield Arguments(text)


class ListReader(Reader):
    """An answer that is a list of calls: `[{"name": ..., "parameters": {...}}, ...]`."""

    def __init__(self) -> None:
        super().__init__()
        self._arguments: JsonObject | None = None

    def _read(self, *, final: bool) -> Iterator[Event]:
        while self._held:
            if self._arguments is not None:
                yield Arguments(self._take(self._arguments.feed(self._held)))
                self._arguments = None if self._arguments.is_whole else self._arguments
                continue
            self._held = self._held.lstrip(" \n[],}")
            head = HEAD.match(self._held)
            if head is None:
                if final:
                    self._take(len(self._held))
                return
            self._take(head.end())
            self._arguments = JsonObject()
            yield Begin(json.loads(f'"{head[1]}"'))
