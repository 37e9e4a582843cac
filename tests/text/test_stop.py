"""A stop string ends the text where it begins, however the text arrives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import stop
from engine.text.stop import StopMatcher

ALPHABET = "ab"  # two letters: repetitions and overlaps are the rule
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)
texts = st.lists(st.text(ALPHABET, max_size=4), max_size=12)


def first_match(text: str, stops: list[str]) -> tuple[int, str] | None:
    """(start, stop string) of the match complete first; of several complete together, the longest."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return None
    end, _, stop = min(found)
    return end - len(stop), stop


@settings(max_examples=400, deadline=None)
@given(deltas=texts, stops=stop_lists, include=st.booleans())
def test_the_text_shown_ends_at_the_first_stop_string_whatever_the_split(
    deltas: list[str], stops: list[str], include: bool
) -> None:
    matcher = StopMatcher(stops, include_stop_str_in_output=include)
    shown = "".join(matcher.push(delta) for delta in deltas) + matcher.finish()
    match = first_match("".join(deltas), stops)
    if match is None:
        assert (shown, matcher.matched) == ("".join(deltas), None)
    else:
        start, stop = match
        assert matcher.matched == stop
        assert shown == "".join(deltas)[: start + (len(stop) if include else 0)]


@settings(max_examples=300, deadline=None)
@given(deltas=texts, stops=stop_lists)
def test_exactly_the_text_that_could_begin_a_stop_string_is_held_back(deltas: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = shown = ""
    for delta in deltas:
        seen += delta
        shown += matcher.push(delta)
        if matcher.matched:
            return
        beginnings = [stop[:k] for stop in stops for k in range(1, len(stop)) if seen.endswith(stop[:k])]
        assert shown == seen[: len(seen) - max(map(len, beginnings), default=0)]


def test_nothing_is_shown_after_a_stop_string() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("some textEN") == "some text"
    assert matcher.push("D and more") == ""
    assert matcher.push("even more") + matcher.finish() == ""


def test_without_stop_strings_text_passes_at_once() -> None:
    matcher = StopMatcher([])
    assert (matcher.push("any"), matcher.finish(), matcher.matched) == ("any", "", None)


def test_only_stop_strings_that_have_begun_cost_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    advanced = [0]
    advance = stop._Automaton.advance

    def counted(self: stop._Automaton, character: str) -> int:
        advanced[0] += 1
        return advance(self, character)

    monkeypatch.setattr(stop._Automaton, "advance", counted)
    stops = [chr(ord("A") + i) + "b" * 1000 for i in range(16)]
    matcher = StopMatcher(stops)
    assert matcher.push("no capital letter here " * 100) != ""
    assert advanced[0] == 0
    assert matcher.push("A" + "b" * 500) == ""
    assert advanced[0] == 500, "one of them has begun"
    assert matcher.push("x") == "A" + "b" * 500 + "x"
    assert matcher.push("b" * 100) == "b" * 100
    assert advanced[0] == 501


def test_a_failure_table_is_that_of_the_definition() -> None:
    text = "abababaababababb"
    automaton = stop._Automaton(text, is_written=False)
    for length in range(1, len(text) + 1):
        borders = [k for k in range(length) if text[:length].endswith(text[:k])]
        assert automaton.failure(length) == max(borders)
