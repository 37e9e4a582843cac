"""What callers of the store are promised: one fetch for all, remembered failures, limits, several sources."""

import asyncio

import numpy as np
import pytest

from adapter_store.errors import (
    AdapterNameInvalid,
    AdapterNotFound,
    AdapterRejected,
    AdapterTooLarge,
    SourceUnavailable,
    SourceUnknown,
    SpecUnknown,
)
from adapter_store.image.packing import pack
from adapter_store.records import AdapterState
from adapter_store.sources.base import SourcePage
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from tests.support.fake_sources import FakeSource, small_adapter, small_spec
from tests.support.store_world import DIGEST, SPEC, World, in_loop, turns
from tests.support.waiting import for_ever, until_async


@in_loop()
async def test_a_lease_carries_the_packed_image(world):
    lease = await world.acquire()
    want = pack(world.source.adapters["a"], SPEC)
    assert lease.manifest == want.manifest
    assert np.array_equal(world.blobs.arrays[lease.image], want.data)
    assert (lease.name, lease.owner, lease.source, lease.spec_digest) == ("a", "me", "fake", DIGEST)
    assert (lease.num_bytes, lease.rank) == (want.num_bytes, 2)


@in_loop()
async def test_two_hundred_simultaneous_callers_cost_one_fetch(world):
    leases = await asyncio.gather(*(world.acquire(owner=f"o{n}") for n in range(200)))
    assert world.source.fetches == ["a"]
    assert len({lease.image for lease in leases}) == 1
    assert (await world.store.status()).num_leases == 200


@in_loop()
async def test_a_cancelled_waiter_cancels_nobody_else(world):
    world.source.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.acquire(owner=f"o{n}")) for n in range(200)]
    await turns()
    for task in tasks[:150]:
        task.cancel()
    await turns()
    world.source.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results[:150])
    assert len({result.image for result in results[150:]}) == 1
    assert world.source.fetches == ["a"]


@in_loop()
async def test_a_fetch_whose_waiters_all_left_is_still_of_use(world):
    world.source.gate = asyncio.Event()
    task = asyncio.create_task(world.acquire())
    await turns()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    world.source.gate.set()
    await world.acquire()
    assert world.source.fetches == ["a"]
    assert (await world.store.status()).num_leases == 1


@in_loop()
async def test_a_refused_adapter_is_remembered_for_a_while_and_the_store_goes_on(world):
    world.source.adapters["bad"] = small_adapter(use_dora=True)
    for _ in range(5):
        with pytest.raises(AdapterRejected, match="use_dora") as caught:
            await world.acquire("bad")
    assert caught.value.name == "bad"
    assert world.source.fetches == ["bad"]
    record = await world.store.resolve("bad")
    assert record.state is AdapterState.FAILED
    assert "use_dora" in record.reason
    await world.acquire("a")
    world.clock.now += world.store.config.failure_ttl_s
    with pytest.raises(AdapterRejected):
        await world.acquire("bad")
    assert world.source.fetches.count("bad") == 2


@in_loop(refresh_s=0)
async def test_a_repaired_adapter_is_served_at_once_as_it_is_another_version(world):
    world.source.adapters["x"] = small_adapter(use_dora=True)
    with pytest.raises(AdapterRejected):
        await world.acquire("x")
    world.source.adapters["x"] = small_adapter()
    await world.acquire("x")


@in_loop()
async def test_refresh_forgives_a_remembered_failure(world):
    world.source.failing_fetches = 100
    with pytest.raises(SourceUnavailable):
        await world.acquire()
    world.source.failing_fetches = 0
    with pytest.raises(SourceUnavailable):
        await world.acquire()
    await world.store.refresh("a")
    await world.acquire()


@in_loop(retry_base_s=0.2, fetch_retries=3)
async def test_a_source_that_stumbles_is_asked_again_after_growing_pauses(world):
    world.source.failing_fetches = 3
    await world.acquire()
    assert world.clock.slept == [0.2, 0.4, 0.8]


@in_loop(fetch_retries=2)
async def test_a_source_that_stays_down_is_told_with_its_reason_and_asked_again_soon(world):
    world.source.failing_fetches = 3
    with pytest.raises(SourceUnavailable, match="connection reset"):
        await world.acquire()
    world.clock.now += world.store.config.unavailable_ttl_s
    await world.acquire()


@in_loop(fetch_timeout_s=0.05)
async def test_a_download_that_hangs_ends_with_its_time(world):
    world.source.gate = asyncio.Event()
    with pytest.raises(SourceUnavailable, match="fetch_timeout_s"):
        await world.acquire()


@in_loop()
async def test_an_adapter_that_is_not_there_is_not_found_and_seen_soon_after_it_comes(world):
    for _ in range(3):
        with pytest.raises(AdapterNotFound, match="'new'"):
            await world.acquire("new")
    assert world.source.stats.count("new") == 1
    world.source.adapters["new"] = small_adapter()
    world.clock.now += world.store.config.missing_ttl_s
    await world.acquire("new")


@in_loop()
async def test_a_bad_name_never_reaches_a_source(world):
    for call in (world.acquire("../a"), world.store.resolve("/a"), world.store.prefetch("a/../b")):
        with pytest.raises(AdapterNameInvalid):
            await call
    assert world.source.stats == []


@in_loop()
async def test_an_unknown_spec_is_told_so_that_it_can_be_registered(world):
    with pytest.raises(SpecUnknown):
        await world.store.acquire("a", "0" * 64, "me")
    with pytest.raises(SpecUnknown):
        await world.store.prefetch("a", "0" * 64)


@in_loop()
async def test_each_spec_has_its_own_image_of_one_version(world):
    half = await world.store.register_spec(small_spec("float16"))
    first, second = await world.acquire(), await world.store.acquire("a", half, "me")
    assert first.version == second.version
    assert first.image != second.image
    assert second.manifest["dtype"] == "float16"


@in_loop(max_adapter_bytes=100)
async def test_an_adapter_that_is_too_large_is_refused_before_it_is_downloaded(world):
    with pytest.raises(AdapterTooLarge, match="'a'"):
        await world.acquire()
    assert world.source.fetches == []


@in_loop()
async def test_a_pickle_is_refused_before_it_is_downloaded(world):
    world.source.adapters["p"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"}
    with pytest.raises(AdapterRejected, match="pickle"):
        await world.acquire("p")
    assert world.source.fetches == []


@in_loop(max_rank=1)
async def test_a_rank_above_the_limit_is_refused(world):
    with pytest.raises(AdapterRejected, match="max_rank=1"):
        await world.acquire()


async def has_both_images(world):
    return (await world.store.status()).num_images >= 2


@in_loop()
async def test_a_prefetched_adapter_is_there_when_it_is_acquired(world):
    await world.store.prefetch("a", DIGEST)
    await world.store.prefetch("b")
    await world.store.prefetch("missing")
    await until_async(lambda: has_both_images(world), "both images")
    await world.acquire("a")
    await world.acquire("b")
    assert sorted(world.source.fetches) == ["a", "b"]
    assert (await world.store.resolve("a")).state is AdapterState.HOST


@in_loop(max_parallel_fetches=2)
async def test_no_more_adapters_are_fetched_at_a_time_than_allowed(world):
    for number in range(6):
        world.source.adapters[f"n{number}"] = small_adapter(seed=number)
    world.source.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.acquire(f"n{number}")) for number in range(6)]
    await until_async(lambda: len(world.source.fetches) >= 2, "two fetches")
    await turns()
    assert len(world.source.fetches) == 2
    world.source.gate.set()
    await asyncio.gather(*tasks)


def test_the_first_source_that_has_a_name_has_it_and_one_that_is_down_is_not_passed_over():
    async def main():
        first, second = FakeSource({"a": small_adapter(seed=1)}, "one"), FakeSource({"b": small_adapter()}, "two")
        second.adapters["a"] = small_adapter(seed=2)
        world = World(first, second)
        await world.store.register_spec(SPEC)
        assert (await world.acquire("a")).source == "one"
        assert (await world.acquire("b")).source == "two"
        assert (await world.acquire("a", source="two")).source == "two"
        with pytest.raises(SourceUnknown, match="three"):
            await world.acquire("a", source="three")
        first.down = "refused"
        second.adapters["c"] = small_adapter(seed=3)
        with pytest.raises(SourceUnavailable, match="one"):
            await world.acquire("c")
        await world.store.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "away", [("one",), ("two",), ("three",), ("one", "three"), ("two", "three"), ("one", "two", "three")]
)
@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
@pytest.mark.parametrize("limit", [1, 2, 10])
def test_a_source_that_is_away_is_named_and_hides_no_other(
    away: tuple[str, ...], hangs: bool, limit: int, monkeypatch: pytest.MonkeyPatch
):
    """However many adapters a page has."""
    if hangs:
        monkeypatch.setattr("adapter_store.reports.LIST_TIMEOUT_S", 0.01)

    async def nothing(*_: object) -> SourcePage:
        return SourcePage(names=(), next_cursor=None)

    async def hang(*_: object) -> None:
        await for_ever()

    async def main():
        sources = [
            FakeSource({f"{name}-{n}": small_adapter() for n in range(2)}, name) for name in ("one", "two", "three")
        ]
        for source in sources:
            if source.name in away:
                source.down = "no route to host"
                if hangs:
                    monkeypatch.setattr(source, "list", hang)
        world = World(*sources)
        if hangs:  # the registered names are read in a thread, which a busy machine lets wait for longer than that
            monkeypatch.setattr(world.store._tiers.resolver.source("catalog"), "list", nothing)
        records, unavailable, cursor = [], set(), None
        for _ in range(20):
            page = await world.store.list_adapters(cursor, limit)
            records += page.records
            unavailable |= set(page.unavailable)
            cursor = page.next_cursor
            if cursor is None:
                break
        assert [record.name for record in records] == [
            f"{source.name}-{n}" for source in sources if source.name not in away for n in range(2)
        ]
        assert unavailable == set(away)
        await world.store.close()

    asyncio.run(main())


def test_a_listing_goes_through_all_sources_page_by_page():
    async def main():
        first = FakeSource({f"a{n}": small_adapter() for n in range(5)}, "one")
        second = FakeSource({f"b{n}": small_adapter() for n in range(3)}, "two")
        world = World(first, second)
        await world.store.register_spec(SPEC)
        await world.acquire("a3")
        records, cursor = [], None
        while True:
            page = await world.store.list_adapters(cursor, 2)
            assert len(page.records) <= 2
            records += page.records
            cursor = page.next_cursor
            if cursor is None:
                break
        assert [record.name for record in records] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"]
        assert [record.state for record in records].count(AdapterState.HOST) == 1
        for nonsense in ("x", "9:", "-1:a"):
            assert (await world.store.list_adapters(nonsense)).records == ()
        await world.store.close()

    asyncio.run(main())


def test_without_ray_the_image_is_a_readonly_array():
    async def main():
        store = AdapterStore([FakeSource({"a": small_adapter()})], MemoryBlobs())
        lease = await store.acquire("a", await store.register_spec(SPEC), "me")
        assert lease.image.dtype == np.uint8
        assert not lease.image.flags.writeable
        await store.close()

    asyncio.run(main())


@in_loop()
async def test_behind_a_cursor_that_no_page_gave_there_is_nothing(world):
    for cursor in ("9" * 5000, "-1:a", "x", "²:a", "7:a"):
        assert (await world.store.list_adapters(cursor)).records == ()
