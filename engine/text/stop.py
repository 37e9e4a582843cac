"""Stop strings: find the first in a growing text, and hold back only what could still become one.

Each stop string runs as a Knuth-Morris-Pratt automaton over the text: its state is the length of its longest prefix
that the text ends with. So a match spanning any number of deltas is found, the text held back is the longest such
prefix, and a character costs O(1) amortised per stop string that has begun, however long the string. Failure tables
grow with the states that are reached: a long stop string that the text never begins costs nothing.
Source: Knuth, Morris, Pratt, "Fast pattern matching in strings", SIAM J. Comput. 6(2), 1977.

Special tokens have no text for the reader, but a stop string may spell one (`<|im_end|>`, or "\\n<|im_end|>"). Such
stop strings are looked for in the text that is shown and also in the text with the special tokens written out. There a
match takes in a hidden token as a whole or not at all, so that "|>" is not found in a token that nobody sees.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

_SHOWN, _HIDDEN, _WITHIN_HIDDEN = "v", "H", "h"  # a character: shown, first of a hidden token, another of it


class StopMatcher:
    """Passes text through until a stop string is complete.

    The match that is complete first wins; of two complete at the same character, the longer. So the result does not
    depend on how the text was cut into deltas.
    """

    __slots__ = ("_held", "_include", "_marks", "_num_marks", "_shown", "_written", "matched", "sees_hidden")

    def __init__(
        self,
        stops: Iterable[str],
        include_stop_str_in_output: bool = False,
        special_texts: Iterable[str] = (),
    ) -> None:
        """`special_texts`: how the special tokens are written that `push_hidden` may be told of."""
        distinct = tuple(dict.fromkeys(stops))
        spelling = _spelling(distinct, special_texts)
        self._shown = _Automata(distinct, is_written=False)  # over the text that is shown
        self._written = _Automata(spelling, is_written=True)  # over the text with the hidden tokens in it
        self.sees_hidden = bool(spelling)
        self._include = include_stop_str_in_output
        self._held = ""  # of the shown text
        self._marks = ""  # what each of the last characters of the written text is
        self._num_marks = max(map(len, spelling), default=0)
        self.matched: str | None = None  # the stop string that ended the text

    def push(self, text: str) -> str:
        """The text that may be shown now. After a match (`matched` is set) nothing more is."""
        if self.matched is not None:
            return ""
        if not self._held and self._shown.is_idle(text) and self._written.is_idle(text):
            if self.sees_hidden:
                self._mark(_SHOWN * len(text))
            return text
        for index, character in enumerate(text):
            ended = self._shown.feed(character)
            if self.sees_hidden:
                self._mark(_SHOWN)
                ended += self._valid(self._written.feed(character))
            if ended:
                return self._end(self._held + text[: index + 1], ended)
        return self._pass_on(self._held + text)

    def push_hidden(self, text: str) -> str:
        """A special token, written `text`, which nobody sees. Returns: what may be shown now of the text before it."""
        if self.matched is not None or not text or not self.sees_hidden:
            return ""
        self._mark(_HIDDEN + _WITHIN_HIDDEN * (len(text) - 1))
        for character in text[:-1]:
            self._written.feed(character)
        ended = self._valid(self._written.feed(text[-1]))
        return self._end(self._held, ended) if ended else self._pass_on(self._held)

    def finish(self) -> str:
        """The text held back, when no more will come."""
        held, self._held = self._held, ""
        return held

    def _mark(self, marks: str) -> None:
        self._marks = (self._marks + marks)[-self._num_marks :]

    def _valid(self, ended: list[_Automaton]) -> list[_Automaton]:
        """Those that do not begin within a hidden token."""
        return [automaton for automaton in ended if self._marks[-len(automaton.stop)] != _WITHIN_HIDDEN]

    def _end(self, seen: str, ended: list[_Automaton]) -> str:
        best = max(ended, key=lambda automaton: (len(automaton.stop), not automaton.is_written))
        self.matched = stop = best.stop
        self._held = ""
        num_of_stop = self._marks[-len(stop) :].count(_SHOWN) if best.is_written else len(stop)
        before = seen[: len(seen) - num_of_stop]
        return before + stop if self._include else before

    def _pass_on(self, seen: str) -> str:
        num_held = max((automaton.state for automaton in self._shown.active), default=0)
        for automaton in self._written.active:
            state = automaton.state
            while state and self._marks[-state] == _WITHIN_HIDDEN:
                state = automaton.failure(state)
            num_held = max(num_held, self._marks[-state:].count(_SHOWN) if state else 0)
        safe = len(seen) - num_held
        self._held = seen[safe:]
        return seen[:safe]


class _Automata:
    """Stop strings over one text. `active`: those that the text ends with the beginning of."""

    __slots__ = ("_by_first", "active")

    def __init__(self, stops: tuple[str, ...], *, is_written: bool) -> None:
        self.active: list[_Automaton] = []
        self._by_first: dict[str, list[_Automaton]] = {}
        for stop in stops:
            self._by_first.setdefault(stop[0], []).append(_Automaton(stop, is_written))

    def is_idle(self, text: str) -> bool:
        """Whether no stop string has begun, nor begins in `text`."""
        return not self.active and self._by_first.keys().isdisjoint(text)

    def feed(self, character: str) -> list[_Automaton]:
        """Those that are complete with this character."""
        if not self.active and character not in self._by_first:
            return []
        moved = [automaton for automaton in self.active if automaton.advance(character)]
        for automaton in self._by_first.get(character, ()):
            if not automaton.state:
                automaton.state = 1
                moved.append(automaton)
        self.active = moved
        return [automaton for automaton in moved if automaton.state == len(automaton.stop)]


class _Automaton:
    """One stop string, and how much of it the text ends with.

    `_table`: for each length, that of the longest proper prefix of stop[:length] which it also ends with; [0] is
    unused. It reaches as far as it was needed.
    """

    __slots__ = ("_table", "is_written", "state", "stop")

    def __init__(self, stop: str, is_written: bool) -> None:
        self.stop = stop
        self.is_written = is_written  # over the text with the hidden tokens in it
        self.state = 0
        self._table = array("L", (0, 0))

    def advance(self, character: str) -> int:
        """The new state."""
        stop, state = self.stop, self.state
        if state == len(stop):  # it was complete, but did not count
            state = self.failure(state)
        while state and stop[state] != character:
            state = self.failure(state)
        self.state = state = state + (stop[state] == character)
        return state

    def failure(self, length: int) -> int:
        table, stop = self._table, self.stop
        while len(table) <= length:
            character = stop[len(table) - 1]
            state = table[-1]
            while state and stop[state] != character:
                state = table[state]
            table.append(state + (stop[state] == character))
        return table[length]


def _spelling(stops: tuple[str, ...], special_texts: Iterable[str]) -> tuple[str, ...]:
    """The stop strings in which a special token is written out."""
    texts = tuple(filter(None, special_texts))
    firsts = {text[0] for text in texts}
    return tuple(stop for stop in stops if not firsts.isdisjoint(stop) and any(text in stop for text in texts))
