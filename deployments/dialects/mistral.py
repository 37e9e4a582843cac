"""Calls as Mistral's models write them, behind `[TOOL_CALLS]`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deployments.dialects.calls import CallsReader
from deployments.dialects.events import Arguments, Begin, Event, JsonObject, read_calls


class MistralReader(CallsReader):
    """A list of objects, as up to tokenizer v7, or `name[CALL_ID]id[ARGS]{...}` each behind a marker of its own.

    v11 writes `[ARGS]`, v13 no `[CALL_ID]`, and some models neither.
    """

    opening = "[TOOL_CALLS]"
    _NAMED = re.compile(r"\s*([A-Za-z0-9_.\-]+)(?:\[CALL_ID\]([A-Za-z0-9]+))?\s*(?:\[ARGS\])?\s*(?=\{)")
    _MAY_BE_NAMED = re.compile(r"\s*[A-Za-z0-9_.\-]*\s*(?:\[[A-Z_]*\]?[A-Za-z0-9]*)*\s*")

    def __init__(self) -> None:
        super().__init__()
        self._where = "text"
        self._object = JsonObject()

    def _read(self, *, final: bool) -> Iterator[Event]:
        while self._held or final:
            before = (self._where, len(self._held))
            yield from getattr(self, f"_{self._where}_part")(final)
            if (self._where, len(self._held)) == before:
                break
        if final:
            yield from self._rest()

    def _text_part(self, final: bool) -> Iterator[Event]:
        text, found = self._until(self.opening, final=final)
        yield from self._text(text)
        self._where = "head" if found else "text"

    def _head_part(self, final: bool) -> Iterator[Event]:
        held = self._held.lstrip()
        if held.startswith("[") and not held.startswith(("[CALL_ID]", "[ARGS]")):
            yield from self._list(held, final)
        elif (named := self._NAMED.match(self._held)) is not None:
            self._take(named.end())
            self._object, self._where = JsonObject(), "arguments"
            yield from self._called([Begin(named[1], named[2])])
        elif final or not self._MAY_BE_NAMED.fullmatch(self._held):
            self._where = "text"
            yield from self._text(self.opening)

    def _list(self, held: str, final: bool) -> Iterator[Event]:
        whole = JsonObject()
        num_chars = whole.feed(held)
        if not whole.is_whole and not final:
            return
        events = read_calls(held[:num_chars]) if whole.is_whole else None
        self._held, self._where = held[num_chars:], "text"
        yield from self._called(events) if events else self._text(self.opening + held[:num_chars])

    def _arguments_part(self, final: bool) -> Iterator[Event]:
        if text := self._take(self._object.feed(self._held)):
            yield Arguments(text)
        self._where = "text" if self._object.is_whole else "arguments"
