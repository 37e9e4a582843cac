"""GPT-OSS's messages: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.

Source: OpenAI's harmony response format. A message's channel is analysis (reasoning), final (text) or commentary (text
for the user, or with a recipient `functions.NAME` a call).
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator

from deployments.dialects.events import Arguments, Begin, Event, Reader, Reasoning, Text, overlap

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_STARTS = ("<|channel|>", "<|constrain|>", "<|start|>", "to=")  # of a first message's head
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


class HarmonyReader(Reader):
    """An answer begins behind `<|start|>assistant`."""

    def __init__(self) -> None:
        super().__init__()
        self._kind: type[Text | Reasoning | Arguments] | None = None  # None: in a message's head
        self._is_first = True

    def _read(self, *, final: bool) -> Iterator[Event]:
        while self._held:
            if self._kind is None:
                if not (yield from self._head(final)):
                    return
            elif not (yield from self._content(final)):
                return

    def _head(self, final: bool) -> Generator[Event, None, bool]:
        start = self._held.lstrip()
        if self._is_first and not start.startswith(_STARTS):
            if not final and any(begin.startswith(start) for begin in _STARTS):
                return False
            self._kind, self._is_first = Text, False  # no message of this format: an answer all the same
            return True
        at = self._held.find(_MESSAGE)
        if at < 0:
            self._take(len(self._held) if final else 0)
            return False
        head = self._take(at + len(_MESSAGE))
        recipient, channel = _RECIPIENT.search(head), _CHANNEL.search(head)
        self._is_first = False
        if recipient is not None:
            self._kind = Arguments
            yield Begin(recipient[1])
        else:
            self._kind = Reasoning if channel is not None and channel[1] == "analysis" else Text
        return True

    def _content(self, final: bool) -> Generator[Event, None, bool]:
        assert self._kind is not None
        found = [(at, end) for end in _ENDS if (at := self._held.find(end)) >= 0]
        if not found:
            num_held = 0 if final else max(overlap(self._held, end) for end in _ENDS)
            if text := self._take(len(self._held) - num_held):
                yield self._kind(text)
            return False
        at, end = min(found)
        if text := self._take(at):
            yield self._kind(text)
        self._take(len(end))
        self._kind = None
        return True
