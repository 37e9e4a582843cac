"""What is read from an answer's text, and what all readers share.

Text comes in pieces that are cut anywhere, a marker's middle included. A reader holds back what may still become a
marker; what it tells, put together, does not depend on the cuts.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple


class Text(NamedTuple):
    """What the answer says."""

    text: str


class Reasoning(NamedTuple):
    """What the model thought before it answered."""

    text: str


class Begin(NamedTuple):
    """A call begins."""

    name: str
    call_id: str | None = None  # if the model gave one


class Arguments(NamedTuple):
    """The next piece of the last call's arguments, which are JSON."""

    text: str


Event = Text | Reasoning | Begin | Arguments


class Reader(ABC):
    """Reads one answer."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, text: str) -> list[Event]:
        """Takes the next piece."""
        self._held += text
        return list(self._read(final=False))

    def finish(self) -> list[Event]:
        """Nothing more comes."""
        return list(self._read(final=True))

    @abstractmethod
    def _read(self, *, final: bool) -> Iterator[Event]:
        """What can be told of `self._held`, taken off it. With `final` nothing is left."""

    def _take(self, num_chars: int) -> str:
        taken, self._held = self._held[:num_chars], self._held[num_chars:]
        return taken

    def _until(self, marker: str, *, final: bool) -> tuple[str, bool]:
        """Takes the text before `marker`, and it; without it what cannot be its beginning. Returns: whether it came."""
        at = self._held.find(marker)
        if at >= 0:
            text = self._take(at)
            self._take(len(marker))
            return text, True
        return self._take(len(self._held) - (0 if final else overlap(self._held, marker))), False


def overlap(text: str, marker: str) -> int:
    """Characters at the end of `text` that may be the beginning of `marker`."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if marker.startswith(text[-n:])), 0)


class JsonObject:
    """Where an object of JSON ends, in text that comes in pieces. It need not be valid inside."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = self._escaped = False
        self.is_whole = False

    def feed(self, text: str) -> int:
        """Returns: characters of `text` that belong to it."""
        for at, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.is_whole = True
                    return at + 1
        return len(text)


def calls_in(value: Any) -> list[Event] | None:
    """The calls that a JSON value describes: an object or a list of them. None: it is something else."""
    events: list[Event] = []
    for item in value if isinstance(value, list) else [value]:
        described = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(described, dict) or not isinstance(described.get("name"), str):
            return None
        arguments = described.get("arguments", described.get("parameters", {}))
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                return None
        if not isinstance(arguments, dict):
            return None
        call_id = item.get("id")
        events.append(Begin(described["name"], call_id if isinstance(call_id, str) else None))
        events.append(Arguments(json.dumps(arguments, ensure_ascii=False)))
    return events or None


def read_calls(text: str) -> list[Event] | None:
    """The calls that a text of JSON describes; None: none."""
    try:
        return calls_in(json.loads(text))
    except (ValueError, RecursionError):
        return None
