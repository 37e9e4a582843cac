"""Calls as Mistral's models write them, behind `[TOOL_CALLS]`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deployments.dialects.calls import StagedReader
from deployments.dialects.events import Arguments, Begin, Event, JsonObject, read_calls


class MistralReader(StagedReader):
    """A list of objects, as up to tokenizer v7, or `name[CALL_ID]id[ARGS]{...}` each behind a marker of its own.

    v11 writes `[ARGS]`, v13 no `[CALL_ID]`, and some models neither.
    """

    opening = "[TOOL_CALLS]"
    _NAMED = re.compile(r"\s*([A-Za-z0-9_.\-]{1,128})(?:\[CALL_ID\]([A-Za-z0-9]+))?\s*(?:\[ARGS\])?\s*(?=\{)")
    _MAY_BE_NAMED = re.compile(r"\s*[A-Za-z0-9_.\-]{0,128}\s*(?:\[[A-Z_]{0,16}\]?[A-Za-z0-9]{0,64}){0,2}\s*")

    def _text_part(self, final: bool) -> Iterator[Event]:
        text, found = self._until(self.opening, final=final)
        yield from self._text(text)
        self._where = "head" if found else "text"

    def _head_part(self, final: bool) -> Iterator[Event]:
        if self._scan is None and self._held.lstrip().startswith("["):
            self._held = self._held.lstrip()
        if self._scan is not None or (self._held.startswith("[") and not _is_mark(self._held)):
            yield from self._list(final)
        elif (named := self._NAMED.match(self._held)) is not None:
            self._take(named.end())
            self._object, self._where = JsonObject(), "arguments"
            yield from self._called([Begin(named[1], named[2])])
        elif final or not self._MAY_BE_NAMED.fullmatch(self._held):
            self._where = "text"
            yield from self._text(self.opening)

    def _list(self, final: bool) -> Iterator[Event]:
        end = self._end_of_object()
        if end is None and not final:
            return
        text = self._take(len(self._held) if end is None else end)
        events = read_calls(text) if end is not None else None
        self._where = "text"
        yield from self._called(events) if events else self._text(self.opening + text)

    def _arguments_part(self, final: bool) -> Iterator[Event]:
        if text := self._take(self._object.feed(self._held)):
            yield Arguments(text)
        self._where = "text" if self._object.is_whole else "arguments"


def _is_mark(text: str) -> bool:
    """Whether what begins with a bracket may be one of the marks between a name and its arguments."""
    return any(mark.startswith(text[: len(mark)]) for mark in ("[CALL_ID]", "[ARGS]"))
