"""Stop strings: find the first in a growing text, and hold back only what could still become one.

Each stop string runs as a Knuth-Morris-Pratt automaton over the text: its state is the length of its longest prefix
that the text ends with. So a match spanning any number of deltas is found, the text held back is the longest such
prefix, and a character costs O(1) amortised per stop string, however long the string.
Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6(2), 1977.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache


class StopMatcher:
    """Passes text through until a stop string is complete.

    The match that is complete first wins; of two complete at the same character, the longer. So the result does not
    depend on how the text was cut into deltas.
    """

    __slots__ = ("_failures", "_held", "_include", "_states", "_stops", "matched")

    def __init__(self, stops: Iterable[str], include_stop_str_in_output: bool = False) -> None:
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._failures = tuple(_failure_table(stop) for stop in self._stops)
        self._states = [0] * len(self._stops)
        self._include = include_stop_str_in_output
        self._held = ""
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that may be shown now. After a match (`matched` is set) nothing more is."""
        if self.matched is not None or not self._stops:
            return "" if self.matched is not None else text
        for index, character in enumerate(text):
            stop = self._advance(character)
            if stop is not None:
                self.matched = stop
                seen = self._held + text[: index + 1]
                self._held = ""
                return seen if self._include else seen[: len(seen) - len(stop)]
        seen = self._held + text
        safe = len(seen) - max(self._states)
        self._held = seen[safe:]
        return seen[:safe]

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, character: str) -> str | None:
        """Move every automaton by one character; the stop string that is now complete, if any (longest first)."""
        for index, (stop, failure) in enumerate(zip(self._stops, self._failures, strict=True)):
            state = self._states[index]
            while state and stop[state] != character:
                state = failure[state]
            state += stop[state] == character
            if state == len(stop):
                return stop
            self._states[index] = state
        return None


@lru_cache(maxsize=256)
def _failure_table(stop: str) -> tuple[int, ...]:
    """For each length: that of the longest proper prefix of stop[:length] which it also ends with; [0] is unused."""
    table = [0, 0]
    state = 0
    for character in stop[1:]:
        while state and stop[state] != character:
            state = table[state]
        state += stop[state] == character
        table.append(state)
    return tuple(table)
