"""Readers of calls that are told between markers, in JSON or in a form of their own."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator

from deployments.dialects.events import Arguments, Begin, Event, JsonObject, Reader, Text, overlap, read_calls

# A call whose arguments can be told while they come: its name is there before them. A `~` is some white space.
_HEAD = (
    r'~\{~(?:"type"~:~"function"~,~)?(?:"function"~:~\{~)?'
    r'"name"~:~"([^"\\<\n]{1,256})"~,~"(?:arguments|parameters)"~:~(?=\{)'
)
HEAD = re.compile(_HEAD.replace("~", r"\s{0,16}"))
_LONGEST_HEAD = 512  # characters, by which a call that begins with its name has begun


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


class StagedReader(CallsReader):
    """Reads what it holds by where it stands: `_text_part`, `_head_part` and so on each take what is theirs."""

    _START = "text"

    def __init__(self) -> None:
        super().__init__()
        self._where = self._START
        self._object = JsonObject()  # of a call's arguments, or what is left of a call behind them
        self._scan: tuple[JsonObject, int] | None = None  # of an object that is held, and how far it was looked at

    def _read(self, *, final: bool) -> Iterator[Event]:
        while True:
            before = (self._where, len(self._held))
            yield from getattr(self, f"_{self._where}_part")(final)
            if (self._where, len(self._held)) == before:
                break
        if final:
            yield from self._rest()

    def _end_of_object(self) -> int | None:
        """Where the object of JSON ends that begins what is held; None: not yet. Each character is looked at once."""
        scan, at = self._scan or (JsonObject(), 0)
        at += scan.feed(self._held[at:])
        self._scan = None if scan.is_whole else (scan, at)
        return at if scan.is_whole else None


class HermesReader(StagedReader):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as Hermes, Qwen 2.5 and Qwen 3 write it."""

    opening, closing = "<tool_call>", "</tool_call>"

    def _text_part(self, final: bool) -> Iterator[Event]:
        text, found = self._until(self.opening, final=final)
        yield from self._text(text)
        self._where = "head" if found else "text"

    def _head_part(self, final: bool) -> Iterator[Event]:
        head = HEAD.match(self._held)
        if head is not None:
            self._take(head.end())
            self._object, self._where = JsonObject(), "arguments"
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
        if text := self._take(self._object.feed(self._held)):
            yield Arguments(text)
        self._where = "tail" if self._object.is_whole else "arguments"

    def _tail_part(self, final: bool) -> Iterator[Event]:
        at = self._held.find(self.closing)
        if at < 0 and not final:
            return
        rest = self._take(at if at >= 0 else len(self._held)).strip()
        self._take(len(self.closing))
        self._where = "text"
        yield from self._text(rest.lstrip("} \n"))


class LlamaReader(StagedReader):
    """An answer that is nothing but calls: `{"name": ..., "parameters": {...}}`, several with `;` between them.

    Llama 3 writes them so, with `<|python_tag|>` in front or without. What begins otherwise is text to its end.
    """

    _MARK = "<|python_tag|>"
    _KEY = re.compile(r'\{\s*"([^"]*)"')

    _START = "start"

    def __init__(self) -> None:
        super().__init__()
        self._was_marked = ""

    def _start_part(self, final: bool) -> Iterator[Event]:
        if self._scan is None:
            self._held = self._held.lstrip(" \n\t;") if self._has_called else self._held.lstrip()
        held = self._held
        if not held or (not final and overlap(held, self._MARK) == len(held)):
            return
        if held.startswith(self._MARK):
            self._was_marked = self._MARK
            self._take(len(self._MARK))
            return
        key = self._KEY.match(held)
        if not held.startswith("{") or (key and key[1] not in ("name", "type", "function")):
            self._where = "text"
        elif self._scan is None and (head := HEAD.match(held)) is not None:
            self._take(head.end())
            self._where, self._object = "arguments", JsonObject()
            yield from self._called([Begin(head[1])])
        elif len(held) > _LONGEST_HEAD or final:
            yield from self._other_order(final)

    def _other_order(self, final: bool) -> Iterator[Event]:
        """An object that does not begin as calls do: told once it is whole, if it is a call all the same."""
        end = self._end_of_object()
        events = read_calls(self._held[:end]) if end is not None else None
        if events:
            self._take(end or 0)
            yield from self._called(events)
        elif end is not None or final:
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
