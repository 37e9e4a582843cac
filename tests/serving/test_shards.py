"""A store of several shards is one store to whoever asks: nothing is fetched twice, lost, or listed out of order."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.exceptions import RayActorError

from adapter_store.errors import AdapterNotFound
from adapter_store.records import AdapterState, Lease, Registration, StoreConfig, shard_of
from adapter_store.store import AdapterStore
from deployments.calls import Refused
from deployments.settings.app import AdapterSettings
from deployments.store import client as client_module
from deployments.store.actor import connectors, store_config
from deployments.store.client import StoreClient
from tests.support.fake_sources import FakeBlobs, FakeSource, small_adapter
from tests.support.store_world import DIGEST, IMAGE_BYTES, SPEC

NUM_SHARDS = 4
NAMES = tuple(f"adapter-{number:02d}" for number in range(24))


class Shelf:
    """What the head node keeps."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    async def put(self, key: str, value: bytes) -> None:
        self.values[key] = value


class Shards:
    """The shards of a store in one process, and a client of them. Each can be killed: it comes back empty."""

    def __init__(self, count: int, *, folder: Path | None = None, shelf: Shelf | None = None) -> None:
        self.source = FakeSource({name: small_adapter(seed=number) for number, name in enumerate(NAMES)})
        self.shelf = shelf or Shelf()
        self._config = StoreConfig(
            host_bytes=40 * IMAGE_BYTES,
            max_adapter_bytes=5000,
            num_shards=count,
            disk_path=None if folder is None else str(folder),
        )
        self.away: set[int] = set()
        self.stores = [self._store(shard) for shard in range(count)]
        connects = [functools.partial(self._connect, shard) for shard in range(count)]
        self.client = StoreClient(connects, wait_s=0.2, owner="r", spec=SPEC, digest=DIGEST)

    def _store(self, shard: int) -> AdapterStore:
        config = dataclasses.replace(self._config, shard=shard)
        return AdapterStore([self.source], FakeBlobs(), config, shelf=self.shelf)

    def _connect(self, shard: int) -> Any:
        return _Actor(lambda: self.stores[shard], lambda: shard in self.away)

    async def kill(self, shard: int) -> None:
        await self.stores[shard].close()
        self.stores[shard] = self._store(shard)

    async def lease(self, name: str) -> Lease:
        lease: Lease = await self.client._of(name).call("acquire", name, DIGEST, "r", None, None)
        return lease

    async def close(self) -> None:
        for store in self.stores:
            store.check_invariants()
            await store.close()


class _Actor:
    def __init__(self, store: Callable[[], AdapterStore], is_away: Callable[[], bool]) -> None:
        self._store, self._is_away = store, is_away

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any) -> Any:
            if self._is_away():
                raise RayActorError
            return await getattr(self._store(), method)(*args)

        return SimpleNamespace(remote=call)


def with_shards(count: int = NUM_SHARDS) -> Callable[[Callable[[Shards], Awaitable[None]]], Callable[[], None]]:
    def wrap(test: Callable[[Shards], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                shards = Shards(count)
                await shards.client.start()
                await test(shards)
                await shards.close()

            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return wrap


async def names_of(client: StoreClient, limit: int) -> list[tuple[str, AdapterState, bool]]:
    """All pages."""
    found: list[tuple[str, AdapterState, bool]] = []
    cursor = None
    while True:
        page = await client.list_adapters(cursor, limit)
        found += [(record.name, record.state, record.is_pinned) for record in page.records]
        if (cursor := page.next_cursor) is None:
            return found


@with_shards()
async def test_each_adapter_is_fetched_once_by_the_shard_that_has_it(shards: Shards):
    await asyncio.gather(*(shards.lease(name) for name in NAMES for _ in range(3)))
    assert Counter(shards.source.fetches) == Counter(NAMES)
    held = [{version.key.name for version in store._catalog._versions.values()} for store in shards.stores]
    assert held == [{name for name in NAMES if shard_of(name, NUM_SHARDS) == shard} for shard in range(NUM_SHARDS)]
    assert all(held), "every shard has some of these names"
    assert [len(store._specs.live()) for store in shards.stores] == [1] * NUM_SHARDS
    status = await shards.client.status()
    assert (status.num_images, status.num_leases, status.fetches) == (len(NAMES),) * 3
    assert (status.num_specs, status.sources, status.host_bytes) == (1, ("catalog", "fake"), 160 * IMAGE_BYTES)


@with_shards()
async def test_the_pages_of_all_shards_are_those_of_one_in_order_with_the_states_of_each(shards: Shards):
    for name in NAMES[::3]:
        await shards.lease(name)
    await shards.client.pin(NAMES[5])
    await shards.client.register((Registration(name="z", source="fake", location="adapter-01"),))
    for limit in (1, 5, 100):
        assert await names_of(shards.client, limit) == [
            ("z", AdapterState.COLD, False),
            *((name, AdapterState.HOST, name == NAMES[5]) if name in (*NAMES[::3], NAMES[5])
              else (name, AdapterState.COLD, False) for name in NAMES),
        ]  # fmt: skip


@with_shards()
async def test_a_shard_that_is_killed_loses_no_registration_and_no_pin(shards: Shards):
    rows = [Registration(name=f"r-{number}", source="fake", location=NAMES[number]) for number in range(24)]
    await shards.client.register(tuple(rows))
    for name in ("r-1", "r-2", "r-3", "r-4", NAMES[7]):
        assert (await shards.client.pin(name)).is_pinned
    assert await shards.client.unregister(("r-0", "r-5", "nobody")) == ("r-0", "r-5")
    assert not (await shards.client.unpin("r-3")).is_pinned
    for shard in range(NUM_SHARDS):
        await shards.kill(shard)
    for row in rows:
        if row.name in ("r-0", "r-5"):
            with pytest.raises(AdapterNotFound):
                await shards.client.resolve(row.name)
        else:
            assert (await shards.client.resolve(row.name)).source == "catalog"
    pinned = {name for name, _, is_pinned in await names_of(shards.client, 100) if is_pinned}
    assert pinned == {"r-1", "r-2", "r-4", NAMES[7]}
    assert (await shards.client.status()).num_registered == 22


@with_shards()
async def test_leases_are_kept_and_lost_where_they_were_given_while_another_shard_is_away(shards: Shards):
    leases = tuple([await shards.lease(name) for name in NAMES])
    assert await shards.client.heartbeat(leases) == ()
    gone = shard_of(NAMES[0], NUM_SHARDS)
    await shards.kill(gone)
    lost = {lease.version for lease in leases if shard_of(lease.name, NUM_SHARDS) == gone}
    assert set(await shards.client.heartbeat(leases)) == lost
    again = await shards.client.lease_again(leases[0])
    assert (again.version, await shards.client.heartbeat((again,))) == (leases[0].version, ())
    await shards.client.release(again)
    assert await shards.client.heartbeat((again,)) == (again.version,)
    shards.away = {0}
    client_module.BEAT_WAIT_S, before = 0.05, client_module.BEAT_WAIT_S
    try:
        answered = {lease.version for lease in leases if shard_of(lease.name, NUM_SHARDS) != 0}
        assert set(await shards.client.heartbeat(leases)) == (lost & answered)
        shards.away = set(range(NUM_SHARDS))
        with pytest.raises(Refused, match="did not answer"):
            await shards.client.heartbeat(leases)
    finally:
        client_module.BEAT_WAIT_S = before


@with_shards()
async def test_names_of_one_shard_are_served_while_another_is_away(shards: Shards):
    shards.away = {shard_of(NAMES[0], NUM_SHARDS)}
    for name in NAMES:
        if shard_of(name, NUM_SHARDS) in shards.away:
            with pytest.raises(Refused, match="did not answer"):
                await shards.client.resolve(name, wait_s=0.01)
        else:
            assert (await shards.lease(name)).name == name


@with_shards()
async def test_each_shard_is_told_of_the_requests_for_its_names(shards: Shards):
    for name in NAMES:
        for _ in range(2):
            shards.client.expect(name, None)
    await asyncio.gather(*(link.telling for link in shards.client.links if link.telling is not None))
    await asyncio.gather(*(task for store in shards.stores for task in store._tasks))
    assert Counter(shards.source.fetches) == Counter(NAMES)
    warm = await shards.client.warm_set(5 * IMAGE_BYTES)
    assert len(warm) == 5
    await shards.client.pin(NAMES[9])
    assert (await shards.client.warm_set(IMAGE_BYTES))[0].name == NAMES[9], "what is pinned comes first, of all shards"


def test_another_number_of_shards_finds_what_was_registered_and_pinned_before(tmp_path: Path):
    async def main() -> None:
        shelf: Shelf | None = Shelf()
        names = [f"r-{number}" for number in range(12)]
        shards = Shards(1, folder=tmp_path, shelf=shelf)
        await shards.client.start()
        await shards.client.register(tuple(Registration(name=name, source="fake", location=NAMES[0]) for name in names))
        await shards.client.pin("r-3")
        await shards.close()
        for count in (4, 1, 3, 2):
            if count == 3:
                shelf = None  # another cluster, with the same disk
            shards = Shards(count, folder=tmp_path, shelf=shelf)
            shelf = shards.shelf
            await shards.client.start()
            for name in names:
                assert (await shards.client.resolve(name)).source == "catalog", (count, name)
                assert (await shards.client.resolve(name)).is_pinned == (name == "r-3")
            await shards.close()

    asyncio.run(main())


def test_a_shard_has_its_part_of_every_budget_and_one_that_could_hold_no_adapter_is_refused():
    settings = AdapterSettings.model_validate(
        {"shards": 4, "host_bytes": 4000, "max_adapter_bytes": 1000, "disk_bytes": 8000, "fetch_bytes_per_s": 400}
    )
    configs: Sequence[StoreConfig] = [store_config(settings, shard) for shard in range(4)]
    assert [(config.shard, config.num_shards) for config in configs] == [(shard, 4) for shard in range(4)]
    assert {(config.host_bytes, config.disk_bytes, config.fetch_bytes_per_s) for config in configs} == {
        (1000, 2000, 100)
    }
    assert len(connectors(settings)) == 4
    with pytest.raises(ValidationError, match="3999 is too little for 4 shards"):
        AdapterSettings.model_validate({"shards": 4, "host_bytes": 3999, "max_adapter_bytes": 1000})
    assert AdapterSettings(shards=8).host_bytes_in(1 << 30) == 8 * (256 << 20)
