"""Readers of calls that are told between markers, in JSON or in a form of their own."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator

from deployments.dialects.events import Arguments, Begin, Event, JsonObject, Reader, Text, overlap, read_calls

# A call whose arguments can be told while they come: its name is there before them.
HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?(?:"function"\s*:\s*\{\s*)?'
    r'"name"\s*:\s*"([^"\\<\n]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class CallsReader(Reader):
    """Text with calls in it. White space around calls is part of neither."""

    def __init__(self) -> None:
        super().__init__()
        self._space = ""  # at the end of the text so far
        self._has_called = False

    def _text(self, text: str) -> Iterator[Event]:
        """Text, but for the white space at its end, which a call may follow."""
        joined = self._space + text
        said = joined.rstrip()
        self._space = joined[len(said) :]
        if said:
            yield Text(said.lstrip() if self._has_called else said)
            self._has_called = False

    def _called(self, events: list[Event]) -> Iterator[Event]:
        self._space, self._has_called = "", True
        yield from events

    def _rest(self) -> Iterator[Event]:
        """At the end: white space that no call followed is text; behind a call it is nothing."""
        if self._space and not self._has_called:
            yield Text(self._space)
        self._space = ""


class MarkedReader(CallsReader):
    """Calls between `opening` and `closing`, each told once it is whole."""

    opening: str
    closing: str

    def __init__(self) -> None:
        super().__init__()
        self._is_inside = False

    @abstractmethod
    def _calls(self, body: str) -> list[Event] | None:
        """What stands between the markers; None: no call."""

    def _read(self, *, final: bool) -> Iterator[Event]:
        while self._held:
            if not self._is_inside:
                text, self._is_inside = self._until(self.opening, final=final)
                yield from self._text(text)
                if not self._is_inside:
                    break
                continue
            at = self._held.find(self.closing)
            if at < 0 and not final:
                return
            body = self._take(at if at >= 0 else len(self._held))
            closing = self._take(len(self.closing))
            self._is_inside = False
            events = self._calls(body)
            yield from self._called(events) if events else self._text(f"{self.opening}{body}{closing}")
        if final:
            if self._is_inside:
                yield from self._text(self.opening)
            yield from self._rest()


class HermesReader(CallsReader):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen 2.5 and Qwen 3 write it."""

    opening, closing = "<tool_call>", "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._where = "text"
        self._arguments = JsonObject()

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
        head = HEAD.match(self._held)
        if head is not None:
            self._take(head.end())
            self._arguments, self._where = JsonObject(), "arguments"
            yield from self._called([Begin(head[1])])
            return
        at = self._held.find(self.closing)
        if at < 0 and not final:
            return
        body = self._take(at if at >= 0 else len(self._held))
        closing = self._take(len(self.closing))
        self._where = "text"
        events = read_calls(body)
        yield from self._called(events) if events else self._text(f"{self.opening}{body}{closing}")

    def _arguments_part(self, final: bool) -> Iterator[Event]:
        if text := self._take(self._arguments.feed(self._held)):
            yield Arguments(text)
        self._where = "tail" if self._arguments.is_whole else "arguments"

    def _tail_part(self, final: bool) -> Iterator[Event]:
        at = self._held.find(self.closing)
        if at < 0 and not final:
            return
        rest = self._take(at if at >= 0 else len(self._held)).strip()
        self._take(len(self.closing))
        self._where = "text"
        yield from self._text(rest.lstrip("} \n"))


class LlamaReader(CallsReader):
    """An answer that is nothing but calls: `{"name": ..., "parameters": {...}}`, several with `;` between them.

    Llama 3 writes them so, with `<|python_tag|>` in front or without. What begins otherwise is text to its end.
    """

    _MARK = "<|python_tag|>"
    _KEY = re.compile(r'\{\s*"([^"]*)"')

    def __init__(self) -> None:
        super().__init__()
        self._where = "start"
        self._object = JsonObject()
        self._was_marked = ""

    def _read(self, *, final: bool) -> Iterator[Event]:
        while True:
            before = (self._where, len(self._held))
            yield from getattr(self, f"_{self._where}_part")(final)
            if (self._where, len(self._held)) == before:
                break
        if final:
            yield from self._rest()

    def _start_part(self, final: bool) -> Iterator[Event]:
        held = self._held.lstrip(" \n\t;") if self._has_called else self._held.lstrip()
        if not held or (not final and overlap(held, self._MARK) == len(held)):
            return
        if held.startswith(self._MARK):
            self._was_marked, self._held = self._MARK, held[len(self._MARK) :]
            return
        key = self._KEY.match(held)
        if not held.startswith("{") or (key and key[1] not in ("name", "type", "function")):
            self._where = "text"
        elif (head := HEAD.match(held)) is not None:
            self._held = held[head.end() :]
            self._where, self._object = "arguments", JsonObject()
            yield from self._called([Begin(head[1])])
        elif (num_chars := (whole := JsonObject()).feed(held)) and whole.is_whole:
            events = read_calls(held[:num_chars])
            self._where = "start" if events else "text"
            if events:
                self._held = held[num_chars:]
                yield from self._called(events)
        elif final:
            self._where = "text"

    def _arguments_part(self, final: bool) -> Iterator[Event]:
        if text := self._take(self._object.feed(self._held)):
            yield Arguments(text)
        if self._object.is_whole:
            self._where, self._object = "tail", JsonObject(depth=1)

    def _tail_part(self, final: bool) -> Iterator[Event]:
        self._take(self._object.feed(self._held))
        self._where = "start" if self._object.is_whole else "tail"
        yield from ()

    def _text_part(self, final: bool) -> Iterator[Event]:
        marked, self._was_marked = self._was_marked, ""
        yield from self._text(marked + self._take(len(self._held)))
