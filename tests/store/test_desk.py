"""A crowd that asks for names which nobody has costs its own time, and nobody else's."""

import asyncio
import random

import pytest

from adapter_store.errors import AdapterNotFound, SourceUnavailable
from adapter_store.names.catalog import NameKey
from adapter_store.names.desk import MAX_EXPECTED, MAX_UNKNOWN, MAX_WAITING, Desk, Urgency
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceFile, SourceListing, SourcePage
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from tests.support.waiting import until_async, within


class SlowSource:
    """Knows `there`. Writes down in which order it is asked, and answers when it is told to."""

    name, kind = "slow", "s3"

    def __init__(self, *there):
        self.there, self.asked, self.most = set(there), [], 0
        self.is_open = asyncio.Event()
        self.running = 0

    async def stat(self, name):
        self.asked.append(name)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await within(self.is_open.wait(), "the test to let the source answer")
        finally:
            self.running -= 1
        if name not in self.there:
            return None
        files = ("adapter_config.json", "adapter_model.safetensors")
        return SourceListing(files=tuple(SourceFile(name=file, etag=f'"{name}"', num_bytes=5) for file in files))

    async def list(self, cursor, limit):
        return SourcePage(names=(), next_cursor=None)

    async def close(self):
        pass


async def asked_for(source, store, number, of=lambda store: store._resolver._desks["slow"].num_waiting):
    """Waits until `number` names were asked for or wait for their turn."""
    await until_async(
        lambda: len(source.asked) + of(store) >= number, lambda: f"{number} names, now {len(source.asked)} asked for"
    )


def in_store(*there, **config):
    """The test, called with a store whose one source does not answer yet, and that source."""

    def wrap(test):
        def wrapped():
            async def main():
                source = SlowSource(*there)
                store = AdapterStore([source], MemoryBlobs(), StoreConfig(**{"stat_timeout_s": 60.0, **config}))
                try:
                    await within(test(store, source), test.__name__)
                finally:
                    await store.close()

            asyncio.run(main())

        return wrapped

    return wrap


@in_store("good")
async def test_a_good_name_has_no_look_up_before_it_however_many_unknown_ones_are_expected(store, source):
    for number in range(3000):
        await store.expect(f"no-such-{number}")
    await asked_for(source, store, MAX_EXPECTED + MAX_WAITING)
    before = len(source.asked)
    asked = asyncio.create_task(store.resolve("good"))
    await until_async(lambda: "good" in source.asked, "the good name's turn")
    assert source.asked.index("good") == before <= MAX_EXPECTED
    source.is_open.set()
    assert (await asked).name == "good"


@in_store("good")
async def test_a_good_name_has_a_bounded_number_of_look_ups_before_it_however_many_wait_for_unknown_ones(store, source):
    crowd = [asyncio.create_task(store.resolve(f"no-such-{number}")) for number in range(3000)]
    await until_async(lambda: sum(task.done() for task in crowd) >= 3000 - MAX_UNKNOWN - MAX_WAITING, "the crowd")
    asked = asyncio.create_task(store.resolve("good"))
    await until_async(lambda: sum(task.done() for task in crowd) > 3000 - MAX_UNKNOWN - MAX_WAITING, "the good name")
    source.is_open.set()
    assert (await asked).name == "good"
    assert source.asked.index("good") <= MAX_UNKNOWN
    ends = await asyncio.gather(*crowd, return_exceptions=True)
    kinds = [type(end) for end in ends]
    assert set(kinds) == {AdapterNotFound, SourceUnavailable}
    assert kinds.count(AdapterNotFound) == len(source.asked) - 1 <= MAX_UNKNOWN + MAX_WAITING
    assert source.most <= MAX_UNKNOWN
    assert "try again" in str(next(end for end in ends if isinstance(end, SourceUnavailable)))


@in_store("good", refresh_s=0.0)
async def test_a_name_that_was_there_is_asked_for_at_once(store, source):
    source.is_open.set()
    await store.resolve("good")
    source.is_open.clear()
    crowd = [asyncio.create_task(store.resolve(f"no-such-{number}")) for number in range(500)]
    await asked_for(source, store, MAX_UNKNOWN + MAX_WAITING)
    before = len(source.asked)
    asked = asyncio.create_task(store.refresh("good"))
    await until_async(lambda: len(source.asked) > before, "the known name's turn")
    assert source.asked[before:] == ["good"]
    source.is_open.set()
    await asked
    await asyncio.gather(*crowd, return_exceptions=True)


@in_store("good")
async def test_an_expected_name_that_somebody_waits_for_comes_before_those_that_are_only_expected(store, source):
    for number in range(MAX_EXPECTED + 50):
        await store.expect(f"no-such-{number}")
    await store.expect("good")
    for number in range(100):
        await store.expect(f"nor-this-{number}")
    await asked_for(source, store, MAX_EXPECTED + 151)
    assert "good" not in source.asked
    asked = asyncio.create_task(store.resolve("good"))
    await until_async(lambda: len(source.asked) > MAX_EXPECTED, "the expected name's turn")
    assert source.asked[MAX_EXPECTED:] == ["good"]
    source.is_open.set()
    await asked


@in_store("good", stat_timeout_s=0.05)
async def test_who_waits_too_long_for_a_turn_is_told_to_try_again(store, source):
    crowd = [asyncio.create_task(store.resolve(f"no-such-{number}")) for number in range(MAX_UNKNOWN + 5)]
    ends = await asyncio.gather(*crowd, return_exceptions=True)
    assert [type(end) for end in ends] == [SourceUnavailable] * len(ends)


@in_store("good")
async def test_expected_names_are_dropped_without_a_trace(store, source):
    for number in range(10_000):
        await store.expect(f"no-such-{number}")
    await until_async(lambda: len(store._tasks) <= MAX_EXPECTED + MAX_WAITING, "most of them to be passed over")
    source.is_open.set()
    await until_async(lambda: not store._tasks, "the expected names to be gone")
    assert len(source.asked) <= MAX_EXPECTED + MAX_WAITING


@pytest.mark.parametrize("seed", range(20))
def test_turns_are_never_lost_whoever_leaves_and_whenever(seed):
    """Random comings, goings and hurries: at the end nobody runs, nobody waits, and a newcomer has its turn at once."""
    draw = random.Random(seed)

    async def main():
        desk = Desk("s")
        running, most, tasks = set(), 0, {}

        async def visit(key, urgency):
            nonlocal most
            try:
                async with desk.turn(key, urgency):
                    running.add(key)
                    most = max(most, len(running))
                    try:
                        await asyncio.sleep(0.001 * draw.random())
                    finally:
                        running.discard(key)
            except SourceUnavailable:
                pass

        async with asyncio.timeout(60):  # all visits
            for number in range(600):
                key = NameKey("s", str(number))
                tasks[key] = asyncio.create_task(visit(key, draw.choice([Urgency.AWAITED, Urgency.EXPECTED])))
                if draw.random() < 0.3:
                    tasks[draw.choice(list(tasks))].cancel()
                if draw.random() < 0.3:
                    desk.hurry(draw.choice(list(tasks)))
                if draw.random() < 0.2:
                    await asyncio.sleep(0)
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            assert (desk.num_waiting, len(running)) == (0, 0)
            assert most <= MAX_UNKNOWN
            for number in range(MAX_EXPECTED):
                tasks[number] = asyncio.create_task(visit(NameKey("s", f"new-{number}"), Urgency.EXPECTED))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert len(running) == MAX_EXPECTED
            await asyncio.gather(*list(tasks.values()), return_exceptions=True)

    asyncio.run(main())
