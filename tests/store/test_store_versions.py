"""Versions and leases: a new upload is seen, the old one stays for its holders, and nothing is held for ever."""

import asyncio

import numpy as np
import pytest

from adapter_store.errors import (
    AdapterNotFound,
    AdapterVersionGone,
    SourceUnavailable,
    StoreFull,
)
from adapter_store.image.packing import pack
from adapter_store.tiers.host import LOOK_S
from tests.support.fake_sources import FakeSource, small_adapter
from tests.support.store_world import IMAGE_BYTES, SPEC, World, in_loop


@in_loop()
async def test_a_reuploaded_adapter_is_seen_within_refresh_s_and_not_before(world):
    old = await world.acquire()
    world.source.adapters["a"] = small_adapter(seed=9)
    world.clock.now += world.store.config.refresh_s / 2
    assert (await world.acquire()).version == old.version
    world.clock.now += world.store.config.refresh_s / 2
    new = await world.acquire()
    assert new.version != old.version
    assert not np.array_equal(world.blobs.arrays[new.image], world.blobs.arrays[old.image])


@in_loop()
async def test_the_old_version_stays_for_its_holders_until_they_release_it(world):
    old = await world.acquire(owner="x")
    world.source.adapters["a"] = small_adapter(seed=9)
    await world.store.refresh("a")
    again = await world.acquire(owner="y", version=old.version)
    assert again.image == old.image
    await world.store.release(old.version, "x")
    assert old.image in world.blobs.arrays
    await world.store.release(old.version, "y")
    assert old.image not in world.blobs.arrays
    with pytest.raises(AdapterVersionGone) as caught:
        await world.acquire(version=old.version)
    assert caught.value.code == "adapter_version_gone"


@in_loop()
async def test_a_version_of_another_name_is_not_handed_out(world):
    other = await world.acquire("b")
    with pytest.raises(AdapterVersionGone):
        await world.acquire("a", version=other.version)


@in_loop()
async def test_the_current_version_may_be_asked_for_by_its_digest_while_it_is_cold(world):
    version = (await world.store.resolve("a")).version
    assert (await world.acquire(version=version)).version == version


@in_loop()
async def test_an_upload_in_the_middle_of_a_download_gives_the_new_version(world):
    def upload():
        world.source.on_fetch = None
        world.source.adapters["a"] = small_adapter(seed=7)

    world.source.on_fetch = upload
    lease = await world.acquire()
    assert np.array_equal(world.blobs.arrays[lease.image], pack(small_adapter(seed=7), SPEC).data)
    assert lease.version == (await world.store.resolve("a")).version


@in_loop()
async def test_half_an_upload_is_not_served_with_half_of_the_one_before(world):
    def finish_upload():
        world.source.on_fetched = None
        world.source.adapters["a"] = small_adapter(seed=7, lora_alpha=64)

    whole = small_adapter(seed=7, lora_alpha=64)
    world.source.adapters["a"] = {**small_adapter(seed=1), "adapter_config.json": whole["adapter_config.json"]}
    world.source.on_fetched = finish_upload  # the new weights come when the old ones were read
    lease = await world.acquire()
    assert np.array_equal(world.blobs.arrays[lease.image], pack(whole, SPEC).data)


@in_loop()
async def test_files_that_never_stand_still_are_given_up_with_a_reason(world):
    seeds = iter(range(100, 1000))

    def upload():
        world.source.adapters["a"] = small_adapter(seed=next(seeds))

    world.source.on_fetch = upload
    with pytest.raises(SourceUnavailable, match="change faster"):
        await world.acquire()


@in_loop()
async def test_known_adapters_are_served_while_their_source_is_down(world):
    lease = await world.acquire()
    world.source.down = "no route to host"
    world.clock.now += 100 * world.store.config.refresh_s
    await world.store.heartbeat("me", (lease.version,))
    assert (await world.acquire()).version == lease.version
    with pytest.raises(SourceUnavailable, match="no route to host"):
        await world.acquire("never-seen")
    world.source.down = None
    world.source.adapters["a"] = small_adapter(seed=3)
    world.clock.now += world.store.config.unavailable_ttl_s
    assert (await world.acquire()).version != lease.version


@in_loop()
async def test_a_deleted_adapter_is_gone_for_new_requests_but_not_for_its_holders(world):
    lease = await world.acquire()
    del world.source.adapters["a"]
    world.clock.now += world.store.config.refresh_s
    with pytest.raises(AdapterNotFound):
        await world.acquire()
    assert (await world.acquire(version=lease.version)).image == lease.image


@in_loop(host_bytes=5000, max_adapter_bytes=5000)
async def test_the_store_never_holds_more_than_its_budget_nor_evicts_what_is_leased(world):
    room = 5000 // IMAGE_BYTES
    for number in range(room + 3):
        world.source.adapters[f"n{number}"] = small_adapter(seed=number)
    held = [await world.acquire(f"n{number}") for number in range(room)]
    with pytest.raises(StoreFull) as caught:
        await world.acquire(f"n{room}")
    assert caught.value.retryable
    await world.store.release(held[3].version, "me")
    await world.acquire(f"n{room + 1}")
    assert held[3].image not in world.blobs.arrays
    assert all(lease.image in world.blobs.arrays for lease in held[:3])
    status = await world.store.status()
    assert status.host_used_bytes == room * IMAGE_BYTES == status.host_leased_bytes
    assert status.evictions == 1


@in_loop(host_bytes=5000, max_adapter_bytes=5000)
async def test_a_killed_replica_leaks_nothing_once_its_leases_run_out(world):
    room = 5000 // IMAGE_BYTES
    for number in range(room + 1):
        world.source.adapters[f"n{number}"] = small_adapter(seed=number)
    alive = await world.acquire("n0", owner="alive")
    for number in range(1, room):
        await world.acquire(f"n{number}", owner="killed")
    world.clock.now += world.store.config.lease_ttl_s / 2
    assert await world.store.heartbeat("alive", (alive.version,)) == ()
    world.clock.now += world.store.config.lease_ttl_s / 2
    await world.acquire(f"n{room}")
    status = await world.store.status()
    assert status.num_leases == 2
    assert alive.image in world.blobs.arrays


@in_loop()
async def test_a_heartbeat_tells_which_leases_are_gone(world):
    lease = await world.acquire()
    assert await world.store.heartbeat("me", (lease.version, "0" * 64)) == ("0" * 64,)
    world.clock.now += world.store.config.lease_ttl_s
    assert await world.store.heartbeat("me", (lease.version,)) == (lease.version,)


@in_loop()
async def test_acquiring_and_releasing_twice_is_as_once(world):
    lease = await world.acquire()
    await world.acquire()
    await world.store.release(lease.version, "me")
    await world.store.release(lease.version, "me")
    await world.store.release("0" * 64, "nobody")
    assert (await world.store.status()).num_leases == 0


@in_loop()
async def test_a_lost_image_is_a_miss_and_no_error(world):
    lease = await world.acquire()
    world.blobs.lost.add(lease.image)
    world.clock.now += LOOK_S
    leases = await asyncio.gather(*(world.acquire(owner=f"o{n}") for n in range(10)))
    assert {again.image for again in leases} == {lease.image + 1}
    assert world.source.fetches == ["a", "a"]


@in_loop()
async def test_an_image_in_steady_use_is_looked_at_once_a_second(world):
    for _ in range(100):
        await world.acquire()
    assert world.blobs.num_looks == 0
    world.clock.now += LOOK_S
    for _ in range(100):
        await world.acquire()
    assert world.blobs.num_looks == 1


@in_loop()
async def test_a_hot_acquire_asks_nobody_and_waits_for_nothing(world):
    """No statement of the index, no thread, no source: it is done before anything else has its turn."""
    await world.acquire("a")
    acquiring = world.acquire("a")
    with pytest.raises(StopIteration) as done:
        acquiring.send(None)
    assert done.value.value.name == "a"


def test_a_name_that_one_source_has_is_asked_of_the_others_no_more_often():
    """And one that comes there is found within `refresh_s`."""

    async def main():
        first, second = FakeSource({}, "one"), FakeSource({"a": small_adapter(seed=1)}, "two")
        world = World(first, second, refresh_s=10.0, missing_ttl_s=1.0)
        await world.store.register_spec(SPEC)
        await world.acquire("a")
        world.clock.now += 9.0
        assert (await world.acquire("a")).source == "two"
        assert first.stats == ["a"]
        first.adapters["a"] = small_adapter(seed=2)
        world.clock.now += 1.0
        assert (await world.acquire("a")).source == "one"
        await world.store.close()

    asyncio.run(main())
