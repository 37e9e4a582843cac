"""Pinned adapters stay, what is asked for comes back from disk, and nothing is evicted for it."""

import asyncio
import logging

import pytest

from adapter_store.errors import AdapterNameInvalid, AdapterNotFound, PinRefused
from adapter_store.names.catalog import NameKey
from adapter_store.records import AdapterState
from tests.support.disk_world import play
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.store_world import DIGEST, IMAGE_BYTES, SPEC, World, in_loop
from tests.support.waiting import for_ever, until_async, within


def in_world(**config):
    """As `in_loop`, with a disk tier, eight adapters n0 .. n7, and room for five images on the host."""

    def wrap(test):
        def run(tmp_path):
            async def main():
                world = World(
                    **{
                        "disk_path": str(tmp_path / "disk"),
                        "host_bytes": 5 * IMAGE_BYTES,
                        "max_adapter_bytes": 5 * IMAGE_BYTES,
                        "traffic_half_life_s": 100.0,
                        **config,
                    }
                )
                world.source.adapters.update({f"n{seed}": small_adapter(seed=seed) for seed in range(8)})
                await play(world, test)

            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return wrap


async def use(world, *names):
    """A request for each, as a router and a replica make it; then nobody leases it any more."""
    for name in names:
        await world.store.expect(name)
        lease = await world.acquire(name)
        await world.store.release(lease.version, "me")
        await world.settle()


async def warm_names(world, budget=1 << 30):
    return [record.name for record in await world.store.warm_set(DIGEST, budget)]


async def on_host(world):
    records = [await world.store.resolve(name) for name in sorted(world.source.adapters)]
    return {record.name for record in records if record.state is AdapterState.HOST}


@in_loop()
async def test_an_expected_adapter_is_counted_and_brought_to_the_host(world):
    for _ in range(2):
        await world.store.expect("a")
        await world.settle()
    record = await world.store.resolve("a")
    assert (record.state, record.requests) == (AdapterState.HOST, 2.0)
    assert world.source.fetches == ["a"]
    await world.store.prefetch("a")
    await world.settle()
    assert (await world.store.resolve("a")).requests == 2.0, "a prefetch is no request"


@in_loop()
async def test_expecting_what_is_broken_or_not_there_disturbs_nobody(world):
    world.source.adapters["bad"] = small_adapter(use_dora=True)
    for name in ("bad", "missing"):
        await world.store.expect(name)
    await world.settle()
    with pytest.raises(AdapterNameInvalid):
        await world.store.expect("../a")
    assert await warm_names(world) == []


@in_world()
async def test_the_warm_set_is_pinned_first_then_by_traffic_as_much_as_fits(world):
    await use(world, "n0", "n1", "n1", "n1", "n2", "n2")
    await world.store.pin("n3")
    assert await warm_names(world) == ["n3", "n1", "n2", "n0"]
    assert await warm_names(world, 2 * IMAGE_BYTES) == ["n3", "n1"]
    assert await warm_names(world, 0) == []
    world.clock.now += 1000
    await use(world, "n0")
    assert (await warm_names(world))[:2] == ["n3", "n0"]


@in_world()
async def test_after_a_restart_what_was_asked_for_comes_back_from_disk_by_itself(world):
    await use(world, "n0", "n1", "n1", "n2", "n2", "n2", "n3", "n3", "n4", "n4", "n5", "n5")
    await world.restart()
    world.source.down = "nobody may ask it"
    await world.settle()
    status = await world.store.status()
    assert status.host_used_bytes == 4 * IMAGE_BYTES, "80 % of the host, and no more"
    assert (status.evictions, status.fetches, status.disk_hits) == (0, 0, 4)
    world.source.down = None
    assert "n2" in await on_host(world)
    assert "n0" not in await on_host(world)


@in_world()
async def test_a_wanted_adapter_that_was_evicted_comes_back_when_there_is_room(world):
    await use(world, "n0", "n0", "n1", "n2", "n3", "n4", "n5", "n6", "n7")
    gone = set(world.source.adapters) - await on_host(world) - {"a", "b"}
    assert gone
    fetched = len(world.source.fetches)
    for name in await on_host(world):
        del world.source.adapters[name]  # its images go with it, and leave room
        with pytest.raises(AdapterNotFound):
            await world.store.refresh(name)
    await world.store._warmth.load(world.store._specs.named(DIGEST, ""))
    assert await on_host(world) == gone
    assert len(world.source.fetches) == fetched


@in_world()
async def test_what_was_asked_for_long_ago_does_not_come_back(world):
    await use(world, "n0")
    await world.settle()
    world.clock.now += 150
    await world.restart()
    await world.settle()
    assert (await world.store.status()).num_images == 0


@in_world()
async def test_a_pinned_adapter_stays_on_host_and_disk_over_restarts_until_it_is_unpinned(world):
    assert (await world.store.pin("n0")).is_pinned
    await use(world, *(f"n{number}" for number in range(1, 8)))
    assert "n0" in await on_host(world)
    await world.restart()
    await world.settle()
    assert "n0" in await on_host(world)
    record = await world.store.resolve("n0")
    assert (record.is_pinned, (await world.store.status()).num_pinned) == (True, 1)
    assert not (await world.store.unpin("n0")).is_pinned
    await use(world, *(f"n{number}" for number in range(1, 8)), *(f"n{number}" for number in range(1, 8)))
    assert "n0" not in await on_host(world)
    await world.restart()
    assert (await world.store.status()).num_pinned == 0


@in_world()
async def test_a_pinned_adapter_that_is_gone_from_disk_is_fetched_again(world):
    await world.store.pin("n0")
    await world.settle()
    for path in world.store._tiers.disk.folder.glob("objects/*/*"):
        path.unlink()
    await world.restart()
    await world.settle()
    assert "n0" in await on_host(world)


@in_world(refresh_s=0)
async def test_the_new_version_of_a_pinned_adapter_takes_the_place_of_the_old(world):
    await world.store.pin("n0")
    old = (await world.store.resolve("n0")).version
    world.source.adapters["n0"] = small_adapter(seed=50)
    await world.store._warmth.load(world.store._specs.named(DIGEST, ""))
    record = await world.store.resolve("n0")
    assert (record.state, record.is_pinned, record.version != old) == (AdapterState.HOST, True, True)
    assert (await world.store.status()).num_images == 1
    await use(world, *(f"n{number}" for number in range(1, 8)))
    assert "n0" in await on_host(world)


@in_world()
async def test_pins_take_at_most_half_of_the_host(world):
    await world.store.pin("n0")
    await world.store.pin("n1")
    await world.store.pin("n1")
    with pytest.raises(PinRefused, match="'n2'") as caught:
        await world.store.pin("n2")
    assert (caught.value.num_bytes, caught.value.limit_bytes) == (IMAGE_BYTES, 5 * IMAGE_BYTES // 2)
    assert (await world.store.status()).num_pinned == 2
    await world.store.unpin("n0")
    await world.store.pin("n2")


@in_world()
async def test_a_pin_holds_for_a_spec_that_comes_later(world):
    await world.store.pin("n0")
    half = await world.store.register_spec(small_spec("float16"))
    await world.settle()
    assert [record.name for record in await world.store.warm_set(half, 1 << 30)] == ["n0"]


@in_world()
async def test_unpinning_what_is_not_pinned_or_gone_is_no_error_of_its_own(world):
    assert not (await world.store.unpin("n0")).is_pinned
    await world.store.pin("n0")
    del world.source.adapters["n0"]
    world.clock.now += 100
    assert (await world.store.unpin("n0")).name == "n0"
    with pytest.raises(AdapterNotFound):
        await world.store.unpin("n0")


@in_world()
async def test_traffic_is_written_down_while_there_is_always_something_to_load(world):
    """What gives way to every load must not keep back what does not."""
    await use(world, *(f"n{number}" for number in range(8)))
    await world.store.close()
    world.begin()
    world.store._tick_s = 0.01
    busy = asyncio.Event()

    async def never_quiet():
        busy.set()
        await for_ever()

    world.store._flights.quiet = never_quiet
    await world.store.register_spec(SPEC)
    await within(busy.wait(), "a load to give way")
    key = NameKey("fake", "new")
    world.store._warmth.count(key)

    async def is_written():
        return key in {name for name, _, _ in await world.store._tiers.index.traffic(100)}

    await until_async(is_written, "the traffic to be written down")
    for task in world.store._loading.values():
        task.cancel()


def test_without_a_disk_nothing_piles_up_that_only_a_disk_would_take():
    async def main():
        world = World()
        world.source.adapters.update({f"n{number}": small_adapter() for number in range(20)})
        for name in world.source.adapters:
            await world.store.expect(name)
        await world.settle()
        assert len(world.store._resolver._checked) == len(world.source.adapters)
        await world.store._tiers.keep_house()
        assert world.store._resolver.take_checked() == set()
        await world.store.close()

    asyncio.run(main())


@in_world()
async def test_housekeeping_that_fails_is_told_and_goes_on(world):
    world.store._tick_s = 0.01
    world.store._housekeeping.cancel()
    failed = asyncio.Event()
    again = asyncio.Event()

    async def fail():
        (again if failed.is_set() else failed).set()
        raise RuntimeError("unforeseen")

    world.store._tiers.keep_house = fail
    world.store._housekeeping = asyncio.create_task(world.store._keep_house())
    await within(again.wait(), "housekeeping to be tried again")


@in_world(refresh_s=0)
async def test_a_pinned_adapter_that_cannot_be_loaded_is_told_once_for_each_reason(world):
    log = logging.getLogger("adapter_store.tiers.warmth")
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = told.append
    log.addHandler(handler)
    try:
        await world.store.pin("n0")
        files = world.source.adapters.pop("n0")
        for _ in range(5):
            await world.store._warmth.load(world.store._specs.named(DIGEST, ""))
        assert len(told) == 1
        world.source.adapters["n0"] = files
        world.clock.now += world.config.missing_ttl_s
        await world.store._warmth.load(world.store._specs.named(DIGEST, ""))
        del world.source.adapters["n0"]
        await world.store._warmth.load(world.store._specs.named(DIGEST, ""))
        assert len(told) == 2
    finally:
        log.removeHandler(handler)
