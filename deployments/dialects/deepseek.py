"""Calls as DeepSeek's models write them: V3.1 a name and its arguments, V3 and R1 with the arguments in a fence."""

from __future__ import annotations

import re

from deployments.dialects.calls import MarkedReader
from deployments.dialects.events import Begin, Event, read_calls


def _mark(words: str) -> str:
    """Its special tokens have a wide bar at each end and low blocks for spaces."""
    return f"<\uff5c{words.replace(' ', chr(0x2581))}\uff5c>"


CALLS, END_OF_CALLS = _mark("tool calls begin"), _mark("tool calls end")
CALL, BETWEEN, END_OF_CALL = _mark("tool call begin"), _mark("tool sep"), _mark("tool call end")
MARKERS = (CALLS, END_OF_CALLS, CALL, BETWEEN, END_OF_CALL)


class DeepSeekReader(MarkedReader):
    """Several calls between one pair of marks."""

    opening, closing = CALLS, END_OF_CALLS
    _FENCED = re.compile(rf"function{BETWEEN}([^\n]+)\n```json\n(.*?)\n```\s*", re.DOTALL)
    _PLAIN = re.compile(rf"(.*?){BETWEEN}(.*)", re.DOTALL)

    def _calls(self, body: str) -> list[Event] | None:
        events: list[Event] = []
        for part in body.split(CALL)[1:]:
            call = part.partition(END_OF_CALL)[0]
            found = self._FENCED.fullmatch(call) or self._PLAIN.fullmatch(call)
            told = read_calls(f'{{"name": "", "arguments": {found[2]}}}') if found else None
            if told is None or found is None or not (name := found[1].strip()):
                return None
            events += [Begin(name), told[1]]
        return events or None
