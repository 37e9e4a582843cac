"""The adapter store, seen from a router or a replica: one actor, or several that share the names (shards).

This is the place that knows which of them has a name (`shard_of`). The first, which leads, also keeps what is
registered and pinned of all names, and lists them; the others have it from there when they begin. An image whose bytes
died with their owner is leased again.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError

from adapter_store.records import AdapterPage, AdapterRecord, Lease, Registration, StoreStatus, shard_of
from adapter_store.tiers.blobs import FileImage, map_image
from deployments.losses import LOST, meaning
from deployments.store import link
from deployments.store.link import StoreLink, unavailable
from deployments.store.shards import merged_status, merged_warm_set

logger = logging.getLogger("ray.serve")

PART_BYTES = 64 << 10  # below what Ray sends with an answer itself, without its object store
PARALLEL_PARTS = 16
ALIGNMENT_BYTES = 64  # of an image's first byte
BEAT_WAIT_S = 5.0  # for a shard, beside others: none of them misses beats because one is away


class StoreClient:
    """`shards` connect to the actors, the leading one first. `spec` is the image spec of a replica's engine; a router
    has none.
    """

    def __init__(
        self,
        shards: Sequence[Callable[[], Any]],
        *,
        wait_s: float,
        owner: str = "",
        spec: dict[str, Any] | None = None,
        digest: str = "",
    ) -> None:
        self.links = tuple(StoreLink(connect, wait_s, owner, spec) for connect in shards)
        self._leader = self.links[0]
        self._wait_s = wait_s
        self._owner = owner
        self._digest = digest

    async def start(self) -> None:
        """Raises: Refused (`store_unavailable`) when no store could be started in time."""
        await self._leader.start()  # first: the others begin with what it has written down
        await asyncio.gather(*(shard.start() for shard in self.links[1:]))

    # ---- for routers

    def expect(self, name: str, source: str | None) -> None:
        """Tells the store that a request for `name` is on its way, without waiting for anything."""
        self._of(name).expect(name, source)

    async def list_adapters(self, cursor: str | None, limit: int) -> AdapterPage:
        """A page of all names as the leader lists them, each as the shard that has it describes it."""
        page: AdapterPage = await self._leader.call("list_adapters", cursor, limit)
        if len(self.links) == 1:
            return page
        places: dict[int, list[int]] = {}
        for place, record in enumerate(page.records):
            if shard := self._shard(record.name):
                places.setdefault(shard, []).append(place)
        records = list(page.records)

        async def describe(shard: int, places: list[int]) -> None:
            keys = tuple((records[place].source, records[place].name) for place in places)
            for place, record in zip(places, await self.links[shard].call("described", keys), strict=True):
                records[place] = record

        await asyncio.gather(*(describe(shard, of_shard) for shard, of_shard in places.items()))
        return dataclasses.replace(page, records=tuple(records))

    async def status(self) -> StoreStatus:
        """Of all shards together."""
        return merged_status(await asyncio.gather(*(shard.call("status") for shard in self.links)))

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._of(name).call("refresh", name, source)
        return record

    async def prefetch(self, name: str, source: str | None = None) -> None:
        await self._of(name).call("prefetch", name, None, source)

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._of(name).call("pin", name, source)
        if self._shard(name):
            await self._leader.call("note_pin", name, record.source, True)
        return record

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord:
        if self._shard(name):  # first: what is written down counts when a shard begins
            await self._leader.call("note_pin", name, source, False)
        record: AdapterRecord = await self._of(name).call("unpin", name, source)
        return record

    async def register(self, rows: tuple[Registration, ...]) -> None:
        await self._leader.call("register", rows)
        if len(self.links) > 1:
            shards = self._split(rows, [row.name for row in rows])
            await asyncio.gather(*(self.links[shard].call("register", tuple(of)) for shard, of in shards.items()))

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        gone: tuple[str, ...] = await self._leader.call("unregister", names)
        if len(self.links) > 1:  # also those that are gone at the leader: a call that failed half-way may be repeated
            shards = self._split(names, names)
            await asyncio.gather(*(self.links[shard].call("unregister", tuple(of)) for shard, of in shards.items()))
        return gone

    # ---- for both

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._of(name).call("resolve", name, source, wait_s=wait_s)
        return record

    # ---- for replicas

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        """A lease and its image's bytes, read in place from shared memory."""
        deadline = time.monotonic() + self._wait_s
        shard = self._of(name)
        while True:
            lease: Lease = await shard.call("acquire", name, self._digest, self._owner, version, source)
            try:
                return lease, await self._bytes_of(lease)
            except Exception as error:
                if not (isinstance(error, GetTimeoutError | FileNotFoundError) or meaning(error) in LOST):
                    raise
                # The store died after it answered: a miss, not an error.
                if time.monotonic() > deadline:
                    raise unavailable(f"the image of {name!r} was lost {self._wait_s:g} s long") from error
                logger.warning("the image of %r is lost, asking again: %s", name, error)
                await asyncio.sleep(link.FIRST_PAUSE_S)

    async def warm_set(self, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        """What a new replica should begin with: pinned adapters, then those with the most requests of late."""
        sets = await asyncio.gather(*(shard.call("warm_set", self._digest, budget_bytes) for shard in self.links))
        return merged_warm_set(sets, budget_bytes)

    async def lease_again(self, lease: Lease) -> Lease:
        again: Lease = await self._of(lease.name).call(
            "acquire", lease.name, self._digest, self._owner, lease.version, lease.source
        )
        return again

    async def release(self, lease: Lease) -> None:
        await self._of(lease.name).call("release", lease.version, self._owner, lease.number)

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        """Every shard hears of the replica, also one that it has no lease of: it serves a spec.

        Raises: as the call, when no shard has answered.
        """
        held: list[list[str]] = [[] for _ in self.links]
        for lease in leases:
            held[self._shard(lease.name)].append(lease.version)
        wait_s = None if len(self.links) == 1 else BEAT_WAIT_S
        beats = (
            shard.call("heartbeat", self._owner, tuple(versions), self._digest, wait_s=wait_s)
            for shard, versions in zip(self.links, held, strict=True)
        )
        answers = await asyncio.gather(*beats, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        if len(failures) == len(answers):
            raise failures[0]
        for failure in failures:
            logger.warning("a shard of the adapter store has heard no heartbeat: %s", failure)
        return tuple(version for lost in answers if not isinstance(lost, BaseException) for version in lost)

    # ---- which shard

    def _shard(self, name: str) -> int:
        return 0 if len(self.links) == 1 else shard_of(name, len(self.links))

    def _of(self, name: str) -> StoreLink:
        return self.links[self._shard(name)]

    def _split(self, items: Sequence[Any], names: Sequence[str]) -> dict[int, list[Any]]:
        """By shard, but for the leader's."""
        shards: dict[int, list[Any]] = {}
        for item, name in zip(items, names, strict=True):
            if shard := self._shard(name):
                shards.setdefault(shard, []).append(item)
        return shards

    # ---- bytes

    async def _bytes_of(self, lease: Lease) -> object:
        """In a thread: an image may be on its way from another node, and a file be slow to open."""
        image = lease.image
        if not isinstance(image, FileImage):
            return await asyncio.to_thread(ray.get, image, timeout=self._wait_s)
        if not image.node or image.node == self._node():
            try:
                return await asyncio.to_thread(map_image, image)
            except FileNotFoundError:
                if not image.node:
                    raise
        return await self._copy(lease)  # the file is on another node, or in another container

    async def _copy(self, lease: Lease) -> object:
        """The image in memory of this process: the object store of its node was full, so it takes no way through one.

        Raises: FileNotFoundError when it is not there any more.
        """
        raw = np.empty(lease.num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT_BYTES
        data = raw[skip : skip + lease.num_bytes]
        turns = asyncio.Semaphore(PARALLEL_PARTS)
        shard = self._of(lease.name)

        async def part(start: int) -> None:
            num_bytes = min(PART_BYTES, lease.num_bytes - start)
            async with turns:
                read = await shard.call("read_image", lease.version, lease.spec_digest, start, num_bytes)
            if read is None or len(read) != num_bytes:
                raise FileNotFoundError(f"{lease.name!r} is not in the store's files any more")
            data[start : start + num_bytes] = np.frombuffer(read, dtype=np.uint8)

        await asyncio.gather(*(part(start) for start in range(0, lease.num_bytes, PART_BYTES)))
        return data

    def _node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())
