"""What adapters are packed for: the image specs that somebody serves now, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from adapter_store.errors import AdapterRejected, SpecUnknown
from adapter_store.tiers.specs import MAX_DORMANT
from tests.support.fake_sources import small_spec
from tests.support.store_world import DIGEST, SPEC, World, in_loop


def other_base(**changes: Any) -> dict[str, Any]:
    """A base model that the small adapter does not fit."""
    spec = small_spec()
    sites = [{**site, "in_features": site["in_features"] * 2} for site in spec["sites"]]
    return {**spec, "base_fingerprint": "the base of yesterday", "sites": sites, **changes}


def other_dtype() -> dict[str, Any]:
    return {**small_spec(), "dtype": "int8" if SPEC["dtype"] != "int8" else "float32"}


async def beat(world: World, owner: str, digest: str, seconds: float) -> None:
    """So long only `owner` is there, as a replica is."""
    step = world.config.lease_ttl_s / 3
    for _ in range(int(seconds / step) + 1):
        world.clock.now += step
        await world.store.heartbeat(owner, (), digest)


@in_loop()
async def test_an_adapter_is_packed_once_when_the_replicas_of_another_dtype_are_gone(world: World) -> None:
    await world.store.register_spec(other_dtype(), "old replica")
    await beat(world, "new replica", DIGEST, world.config.lease_ttl_s)
    await world.store.expect("a")
    await world.settle()
    status = await world.store.status()
    assert (status.num_images, status.fetches, status.num_specs) == (1, 1, 1)


@in_loop()
async def test_while_replicas_of_two_dtypes_serve_both_have_their_images(world: World) -> None:
    digest = await world.store.register_spec(other_dtype(), "old replica")
    for _ in range(5):
        await beat(world, "old replica", digest, 1.0)
        await beat(world, "new replica", DIGEST, 1.0)
    await world.store.expect("a")
    await world.settle()
    assert (await world.store.status()).num_images == 2


@in_loop()
async def test_an_adapter_that_fits_one_of_two_bases_is_brought_and_pinned_for_that_one(world: World) -> None:
    digest = await world.store.register_spec(other_base(), "another application")
    await beat(world, "another application", digest, 0.0)
    await world.store.heartbeat("mine", (), DIGEST)
    await world.store.expect("a")
    await world.settle()
    assert (await world.store.pin("a")).is_pinned
    assert (await world.store.status()).num_images == 1


@in_loop()
async def test_an_adapter_that_fits_no_base_is_not_pinned(world: World) -> None:
    digest = await world.store.register_spec(other_base(), "replica")
    await beat(world, "replica", digest, world.config.lease_ttl_s)
    with pytest.raises(AdapterRejected):
        await world.store.pin("a")
    assert (await world.store.status()).num_pinned == 0


@in_loop()
async def test_images_pins_and_failures_of_a_base_go_with_its_last_replica(world: World) -> None:
    old = await world.store.register_spec(other_dtype(), "old replica")
    broken = await world.store.register_spec(other_base(), "older replica")
    await world.store.pin("a")
    kept = world.store._pins.used_bytes
    status = await world.store.status()
    assert (status.num_images, status.num_failed, status.num_specs) == (2, 1, 3)
    await beat(world, "new replica", DIGEST, 2 * world.config.lease_ttl_s)
    status = await world.store.status()
    assert (status.num_images, status.num_failed, status.num_specs) == (1, 0, 1)
    assert 0 < world.store._pins.used_bytes < kept
    assert old != broken
    assert (await world.store.resolve("a")).state == "host", "told of the base that is served"


@in_loop()
async def test_a_lease_is_kept_though_its_base_is_served_by_nobody_else(world: World) -> None:
    lease = await world.acquire(owner="replica")
    for _ in range(6):
        world.clock.now += world.config.lease_ttl_s / 2
        assert await world.store.heartbeat("replica", (lease.version,)) == ()
    assert (await world.store.status()).num_specs == 1, "an old caller's heartbeat names what it has served"


@in_loop()
async def test_a_base_that_comes_back_is_known_and_needs_not_be_told_again(world: World) -> None:
    await beat(world, "another", await world.store.register_spec(other_dtype(), "another"), world.config.lease_ttl_s)
    assert (await world.store.status()).num_specs == 1
    assert (await world.acquire()).spec_digest == DIGEST
    assert (await world.store.status()).num_specs == 2


@in_loop()
async def test_a_base_that_was_never_told_is_asked_for(world: World) -> None:
    with pytest.raises(SpecUnknown):
        await world.store.heartbeat("replica", (), "never told")


@in_loop()
async def test_bases_of_the_past_do_not_pile_up(world: World) -> None:
    for number in range(3 * MAX_DORMANT):
        await world.store.register_spec({**small_spec(), "base_fingerprint": f"base {number}"}, f"replica {number}")
        world.clock.now += world.config.lease_ttl_s + 1
    assert (await world.store.status()).num_specs == 0
    assert len(world.store._specs._specs) <= MAX_DORMANT


@in_loop()
async def test_an_end_that_comes_late_does_not_end_the_lease_that_followed(world: World) -> None:
    first = await world.acquire(owner="replica")
    second = await world.acquire(owner="replica")
    assert second.number > first.number
    await world.store.release(first.version, "replica", first.number)
    assert (await world.store.status()).num_leases == 1
    await world.store.release(second.version, "replica", second.number)
    assert (await world.store.status()).num_leases == 0


@in_loop()
async def test_leases_of_a_restarted_store_have_numbers_behind_those_before(world: World) -> None:
    before = await world.acquire()
    world.clock.now += 0.001
    await world.restart()
    after = await world.acquire()
    assert after.number > before.number
    assert dataclasses.replace(after, number=before.number, image=before.image) == before
