"""A rate for all downloads together, and as many reads at once as a source takes."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.fetch.pacing import Aimd, Pacer, RoomGate, SourceGate, TokenBucket
from tests.support.fake_sources import FakeClock

TAKES = st.lists(st.tuples(st.floats(0, 3), st.integers(1, 500)), min_size=1, max_size=30)


@given(TAKES, st.integers(1, 1000))
def test_whoever_waits_as_told_keeps_to_the_rate_from_any_moment_to_any_other(takes, rate):
    bucket, now, paid = TokenBucket(rate, 0.0, burst_s=0.5), 0.0, []
    for pause_s, number in takes:
        now += pause_s
        now += bucket.take(number, now)
        paid.append((now, number))
    for index, (begin, _) in enumerate(paid):
        for end_index in range(index + 1, len(paid)):
            passed = sum(number for _, number in paid[index + 1 : end_index + 1])
            assert passed <= rate * (paid[end_index][0] - begin + 0.5) + 1e-6


@given(TAKES, st.integers(1, 1000))
def test_nobody_waits_longer_than_what_was_taken_costs(takes, rate):
    bucket, now, owed = TokenBucket(rate, 0.0), 0.0, 0.0
    for pause_s, number in takes:
        now, owed = now + pause_s, max(0.0, owed - pause_s)
        owed += number / rate
        assert bucket.take(number, now) <= owed + 1e-6


def test_a_clock_that_goes_back_gives_nothing_away():
    bucket = TokenBucket(10, 100.0, burst_s=0.0)
    assert bucket.take(10, 100.0) == 1.0
    assert bucket.take(10, 50.0) == 2.0
    assert bucket.take(10, 100.0) == 3.0


class Waits(threading.Event):
    """Notes how long it is waited for, and does not wait."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        return False


def test_all_downloads_share_one_rate():
    pacer, one, two = Pacer(1000, FakeClock()), Waits(), Waits()
    pacer.wait(100, one)  # the burst
    for event in (one, two, one):
        pacer.wait(500, event)
    assert one.seconds == pytest.approx([0.5, 1.5])
    assert two.seconds == pytest.approx([1.0])


def test_without_a_rate_nobody_waits():
    pacer, waits = Pacer(None), Waits()
    pacer.wait(1 << 40, waits)
    assert waits.seconds == []


def test_a_stopped_download_does_not_wait_for_its_turn():
    stopped = threading.Event()
    stopped.set()
    Pacer(1).wait(1 << 40, stopped)  # would last for centuries


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 3)), max_size=60), st.integers(1, 40))
def test_the_limit_stays_in_its_bounds_and_halves_once_for_refusals_of_one_moment(events, maximum):
    aimd, now, slowed_at = Aimd(maximum, settle_s=1.0), 0.0, None
    for went_well, pause_s in events:
        now += pause_s
        before = aimd.limit
        if went_well:
            aimd.succeeded()
            assert before <= aimd.limit <= before + 1
        elif slowed_at is not None and now - slowed_at < 1.0:
            aimd.slow_down(now)
            assert aimd.limit == before
        else:
            aimd.slow_down(now)
            slowed_at = now
            assert max(1, before // 2) <= aimd.limit <= max(1, (before + 1) // 2)
        assert 1 <= aimd.limit <= maximum


@given(st.integers(1, 40), st.integers(0, 10))
def test_the_limit_comes_back_after_as_many_successes_as_one_more_at_a_time_takes(maximum, refusals):
    aimd = Aimd(maximum)
    for number in range(refusals):
        aimd.slow_down(10.0 * number)
    for _ in range(sum(range(1, maximum + 1)) + maximum):
        aimd.succeeded()
    assert aimd.limit == maximum


def test_a_gate_lets_in_as_many_as_its_limit_says_and_the_next_when_one_leaves():
    gate, inside, most = SourceGate(4), 0, []

    async def visit():
        nonlocal inside
        async with gate:
            inside += 1
            most.append(inside)
            await asyncio.sleep(0)
            inside -= 1

    async def main():
        await asyncio.gather(*(visit() for _ in range(20)))
        assert max(most) == 4
        most.clear()
        gate.aimd.slow_down(0.0)
        waiting = [asyncio.create_task(visit()) for _ in range(20)]
        await asyncio.sleep(0)
        waiting[5].cancel()  # one that waits leaves no gap behind
        await asyncio.gather(*waiting, return_exceptions=True)
        assert max(most) == 2
        assert len(most) == 19

    asyncio.run(main())


def test_a_gate_of_room_lets_in_many_small_ones_or_few_large_ones_in_the_order_in_which_they_came():
    gate, inside, seen, order = RoomGate(4, 100), [], [], []

    async def visit(name, size):
        async with gate.room(size):
            inside.append(size)
            order.append(name)
            seen.append(tuple(inside))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            inside.remove(size)

    async def main():
        sizes = [10] * 6 + [90, 5, 300, 1, 1]
        tasks = [asyncio.create_task(visit(name, size)) for name, size in enumerate(sizes)]
        await asyncio.sleep(0)
        tasks[5].cancel()  # one that waits leaves no gap behind
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert order == [number for number in range(len(sizes)) if number != 5]
        assert max(map(len, seen)) == 4
        assert all(sum(sizes) <= 100 or sizes == (300,) for sizes in seen)

    asyncio.run(main())


def test_a_gate_of_room_takes_back_what_it_gave_to_one_that_had_just_left():
    async def main():
        gate = RoomGate(1, None)

        async def visit():
            async with gate.room(1):
                await asyncio.sleep(0)

        first, second = asyncio.create_task(visit()), asyncio.create_task(visit())
        await asyncio.sleep(0)  # the first is in, the second waits
        first.cancel()
        await asyncio.sleep(0)  # the first has left: the second was let in, but has not run
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.wait_for(visit(), 10)

    asyncio.run(main())
