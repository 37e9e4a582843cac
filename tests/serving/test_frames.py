"""A frame says what was put into it, whatever that is; what is no frame is refused after bounded work."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments import frames
from deployments.calls import Fault, StreamItem
from engine.request import FinishReason, OutputDelta, OutputError, TokenLogprobs

IDS = st.integers(0, 2**32 - 1)
TEXTS = st.text(st.characters(), max_size=20)  # lone surrogates too
FLOATS = st.floats(allow_nan=False)
CHOSEN = st.builds(TokenLogprobs, IDS, FLOATS, st.lists(st.tuples(IDS, FLOATS), max_size=3).map(tuple))
DELTAS = st.builds(
    OutputDelta,
    st.just("q"),
    IDS,
    st.lists(IDS, max_size=4).map(tuple),
    TEXTS,
    st.none() | st.lists(CHOSEN, max_size=3).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.none() | TEXTS | st.integers(-(2**63), 2**63 - 1),
    st.none() | st.builds(OutputError, TEXTS, TEXTS),
    IDS,
    st.floats(0, 1e9),
    st.none() | st.binary(max_size=12),
)
FAULTS = st.builds(Fault, code=TEXTS, message=TEXTS, param=st.none() | TEXTS)
ITEMS = st.builds(
    StreamItem,
    replica=TEXTS,
    adapter_version=st.none() | TEXTS,
    deltas=st.lists(DELTAS, max_size=3).map(tuple),
    fault=st.none() | FAULTS,
)
NUMBERED = st.lists(st.tuples(st.integers(0, 2**64 - 1), ITEMS), max_size=4)


@settings(deadline=None, max_examples=300)
@given(load=IDS, items=NUMBERED, report=st.binary(max_size=30))
def test_what_is_written_is_read(load: int, items: list[tuple[int, StreamItem]], report: bytes) -> None:
    frame = frames.write(load, items, report)
    assert frames.read(frame, "q") == (load, items)
    assert frames.report_of(frame) == report


@settings(deadline=None, max_examples=200)
@given(items=st.lists(st.tuples(st.integers(0, 9), ITEMS), min_size=1, max_size=3), data=st.data())
def test_a_frame_that_is_cut_off_is_refused(items: list[tuple[int, StreamItem]], data: st.DataObject) -> None:
    frame = frames.write(1, items)
    with pytest.raises(frames.BadFrame):
        frames.read(frame[: data.draw(st.integers(0, len(frame) - 1))])


@settings(deadline=None, max_examples=300)
@given(items=NUMBERED, data=st.data())
def test_a_frame_with_a_wrong_byte_is_refused_or_read_as_something(
    items: list[tuple[int, StreamItem]], data: st.DataObject
) -> None:
    frame = bytearray(frames.write(1, items))
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(frames.BadFrame):
        frames.read(bytes(frame))


@pytest.mark.parametrize("version", [0, 1, 2, 4, 255])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    with pytest.raises(frames.BadFrame, match=f"version {version}"):
        frames.read(bytes((version,)) + frames.write(0, [])[1:])


def test_what_follows_the_end_is_refused() -> None:
    with pytest.raises(frames.BadFrame, match="ends at"):
        frames.read(frames.write(3, []) + b"x")


def test_made_up_numbers_cost_nothing() -> None:
    """Four billion deltas in thirty bytes."""
    frame = struct.pack("<BIII", frames.VERSION, 0, 1, 0) + struct.pack("<QB", 1, 0) + struct.pack("<II", 0, 2**32 - 1)
    with pytest.raises(frames.BadFrame, match="4294967295 parts"):
        frames.read(frame)
