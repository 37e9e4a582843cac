"""Reports say what was put into them, and a router that read them all knows what the replica has."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.replica.reporter import MAX_HINTS, MAX_HINTS_TOLD, MAX_NAMES_TOLD, Reporter
from deployments.reports import (
    HEADER_BYTES,
    HEARTBEAT_S,
    HOST,
    PERIOD_S,
    VRAM,
    BadReport,
    Report,
    follows,
    name_digest,
    pack,
    unpack,
)
from tests.serving.test_placement import Clock

WORDS = st.integers(0, 2**64 - 1)
MANY = st.lists(WORDS, max_size=5).map(tuple)
REPORTS = st.builds(
    Report,
    epoch=WORDS,
    number=st.integers(0, 2**32 - 1),
    load=st.integers(0, 2**32 - 1),
    capacity=st.integers(0, 2**32 - 1),
    is_full=st.booleans(),
    names=st.lists(st.tuples(WORDS, st.sampled_from((HOST, VRAM))), max_size=5).map(tuple),
    lost_names=MANY,
    hints=MANY,
    lost_hints=MANY,
)


@settings(deadline=None, max_examples=300)
@given(REPORTS)
def test_what_is_packed_is_unpacked(report: Report) -> None:
    assert unpack(pack(report)) == report


@settings(deadline=None, max_examples=200)
@given(REPORTS, st.data())
def test_a_report_that_is_cut_off_or_goes_on_is_refused(report: Report, data: st.DataObject) -> None:
    raw = pack(report)
    for wrong in (raw[: data.draw(st.integers(0, len(raw) - 1))], raw + b"x"):
        with pytest.raises(BadReport):
            unpack(wrong)


@settings(deadline=None, max_examples=300)
@given(REPORTS, st.data())
def test_a_report_with_a_wrong_byte_is_refused_or_read_as_something(report: Report, data: st.DataObject) -> None:
    raw = bytearray(pack(report))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadReport):
        assert isinstance(unpack(bytes(raw)), Report)


@pytest.mark.parametrize("version", [0, 2, 255])
def test_another_version_is_refused_by_its_number(version: int) -> None:
    raw = pack(Report(epoch=1, number=0, load=0, capacity=1))
    with pytest.raises(BadReport, match=f"version {version}"):
        unpack(bytes((version,)) + raw[1:])


def test_made_up_counts_cost_nothing() -> None:
    raw = bytearray(pack(Report(epoch=1, number=0, load=0, capacity=1)))
    raw[HEADER_BYTES - 4 :] = b"\xff\xff\xff\xff"
    with pytest.raises(BadReport, match="4294967295"):
        unpack(bytes(raw))


def test_numbers_follow_each_other_past_their_end_and_not_from_another_epoch() -> None:
    def report(number: int, epoch: int = 1) -> Report:
        return Report(epoch=epoch, number=number, load=0, capacity=1)

    assert follows(report(8), 1, 7)
    assert follows(report(0), 1, 2**32 - 1)
    assert not follows(report(9), 1, 7)
    assert not follows(report(7), 1, 7)
    assert not follows(report(8, epoch=2), 1, 7)


def test_a_name_has_the_same_digest_in_every_process() -> None:
    names = ["a", "", "Größe", "x" * 1000]
    program = f"from deployments.reports import name_digest; print([name_digest(n) for n in {names!r}])"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        assert done.stdout.strip() == str([name_digest(name) for name in names])


class Teller:
    """A reporter, and what it reports of."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.resident: set[str] = set()
        self.host: set[str] = set()
        self.num_reads = 0
        self.reporter = Reporter(capacity=8, names=self._names, now_s=self.clock)

    def _names(self) -> tuple[set[str], set[str]]:
        self.num_reads += 1
        return self.resident, self.host

    def hear(self, subscriber: str = "router", *, after_s: float = PERIOD_S) -> Report | None:
        self.clock.now_s += after_s
        data = self.reporter.due(subscriber)
        return unpack(data) if data else None


def test_the_first_report_is_full_and_then_only_news_is_told() -> None:
    teller = Teller()
    teller.resident, teller.host = {"a"}, {"a", "b"}
    first = teller.hear()
    assert first is not None
    assert first.is_full
    assert dict(first.names) == {name_digest("a"): VRAM, name_digest("b"): HOST}
    teller.resident, teller.host = {"b"}, {"b"}
    second = teller.hear()
    assert second is not None
    assert follows(second, first.epoch, first.number)
    assert (dict(second.names), second.lost_names) == ({name_digest("b"): VRAM}, (name_digest("a"),))
    assert teller.hear() is None, "nothing is new"
    beat = teller.hear(after_s=HEARTBEAT_S - PERIOD_S)
    assert beat is not None
    assert (beat.is_full, beat.names, beat.number) == (False, (), second.number + 1)


def test_news_waits_for_its_period_and_is_read_once_for_all_who_hear_it() -> None:
    teller = Teller()
    for subscriber in ("one", "two", "three"):
        assert teller.hear(subscriber, after_s=0.0) is not None
    teller.resident = {"a"}
    assert teller.hear("one", after_s=PERIOD_S * 0.9) is None
    teller.clock.now_s += PERIOD_S
    before = teller.num_reads
    assert all(teller.hear(subscriber, after_s=0.0) for subscriber in ("one", "two", "three"))
    assert teller.num_reads == before + 1


def test_a_renewed_report_is_full_at_once_and_does_not_follow_an_old_one() -> None:
    teller = Teller()
    teller.host = {"a"}
    first = teller.hear()
    teller.reporter.forget("router")
    again = teller.hear(after_s=0.0)
    assert first is not None
    assert again is not None
    assert again.is_full
    assert again.names == first.names
    after = teller.hear(after_s=HEARTBEAT_S)
    assert after is not None
    assert not follows(after, first.epoch, first.number)


def test_much_news_is_told_in_bounded_reports_until_all_is_said() -> None:
    teller = Teller()
    teller.hear()
    teller.host = {f"a{i}" for i in range(5 * MAX_NAMES_TOLD)}
    for _ in range(2):
        teller.reporter.remember(range(4 * MAX_HINTS_TOLD))
    heard: set[int] = set()
    hints: set[int] = set()
    for _ in range(5):
        report = teller.hear()
        assert report is not None
        assert len(report.names) <= MAX_NAMES_TOLD
        assert len(report.hints) <= MAX_HINTS_TOLD
        heard |= {digest for digest, _ in report.names}
        hints |= set(report.hints)
    assert heard == {name_digest(name) for name in teller.host}
    assert hints == set(range(4 * MAX_HINTS_TOLD))


def test_only_beginnings_that_came_again_are_told_and_they_are_bounded() -> None:
    teller = Teller()
    teller.reporter.remember((1, 2))
    teller.reporter.remember((1, 3))
    report = teller.hear()
    assert report is not None
    assert report.hints == (1,)
    teller.reporter.remember(range(10, 10 + MAX_HINTS))
    report = teller.hear()
    assert report is not None
    assert report.lost_hints == (1,)
