"""The adapter store's actor, seen from a router or a replica: found or created, waited for, told its specs again.

The actor may die and come back empty at any time. Calls wait for it up to `wait_s`; an image whose bytes died with
their owner is leased again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from adapter_store.errors import SpecUnknown, StoreError
from adapter_store.records import AdapterPage, AdapterRecord, Lease, Registration, StoreStatus
from adapter_store.tiers.blobs import FileImage, map_image
from deployments.calls import Fault, Refused
from deployments.losses import LOST, Meaning, meaning

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 1.0
_AWAY = LOST | {Meaning.OVERLOADED}  # worth another try
PART_BYTES = 64 << 10  # below what Ray sends with an answer itself, without its object store
PARALLEL_PARTS = 16
ALIGNMENT_BYTES = 64  # of an image's first byte


class StoreClient:
    """`spec` is the image spec of a replica's engine; a router has none."""

    def __init__(
        self,
        connect: Callable[[], Any],
        *,
        wait_s: float,
        owner: str = "",
        spec: dict[str, Any] | None = None,
        digest: str = "",
    ) -> None:
        self._connect = connect
        self._wait_s = wait_s
        self._owner = owner
        self._spec = spec
        self._digest = digest
        self._actor: Any = None
        self._expected: Counter[tuple[str, str | None]] = Counter()  # requests that the store was not told of yet
        self._telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises: Refused (`store_unavailable`) when no store could be started in time."""
        await self._call("status")
        if self._spec is not None:
            await self._call("register_spec", self._spec, self._owner)

    # ---- for routers

    def expect(self, name: str, source: str | None) -> None:
        """Tells the store that a request for `name` is on its way, without waiting for anything."""
        if self._actor is None:
            return
        self._expected[name, source] += 1
        if self._telling is None or self._telling.done():
            self._telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        """One call at a time; what comes meanwhile goes with the next. What fails is told when a replica leases it."""
        while self._expected:
            expected, self._expected = self._expected, Counter()
            try:
                await self._call("expect_all", tuple((*key, number) for key, number in expected.items()))
            except Exception as error:
                logger.info("the adapter store does not know what is asked for: %s: %s", type(error).__name__, error)

    async def list_adapters(self, cursor: str | None, limit: int) -> AdapterPage:
        page: AdapterPage = await self._call("list_adapters", cursor, limit)
        return page

    async def status(self) -> StoreStatus:
        status: StoreStatus = await self._call("status")
        return status

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._call("refresh", name, source)
        return record

    async def prefetch(self, name: str, source: str | None = None) -> None:
        await self._call("prefetch", name, None, source)

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._call("pin", name, source)
        return record

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._call("unpin", name, source)
        return record

    async def register(self, rows: tuple[Registration, ...]) -> None:
        await self._call("register", rows)

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        gone: tuple[str, ...] = await self._call("unregister", names)
        return gone

    # ---- for both

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        record: AdapterRecord = await self._call("resolve", name, source, wait_s=wait_s)
        return record

    # ---- for replicas

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        """A lease and its image's bytes, read in place from shared memory."""
        deadline = time.monotonic() + self._wait_s
        while True:
            lease: Lease = await self._call("acquire", name, self._digest, self._owner, version, source)
            try:
                return lease, await self._bytes_of(lease)
            except Exception as error:
                if not (isinstance(error, GetTimeoutError | FileNotFoundError) or meaning(error) in LOST):
                    raise
                # The store died after it answered: a miss, not an error.
                if time.monotonic() > deadline:
                    raise _unavailable(f"the image of {name!r} was lost {self._wait_s:g} s long") from error
                logger.warning("the image of %r is lost, asking again: %s", name, error)
                await asyncio.sleep(FIRST_PAUSE_S)

    async def warm_set(self, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        """What a new replica should begin with: pinned adapters, then those with the most requests of late."""
        records: tuple[AdapterRecord, ...] = await self._call("warm_set", self._digest, budget_bytes)
        return records

    async def lease_again(self, lease: Lease) -> Lease:
        again: Lease = await self._call("acquire", lease.name, self._digest, self._owner, lease.version, lease.source)
        return again

    async def release(self, lease: Lease) -> None:
        await self._call("release", lease.version, self._owner, lease.number)

    async def heartbeat(self, versions: tuple[str, ...]) -> tuple[str, ...]:
        lost: tuple[str, ...] = await self._call("heartbeat", self._owner, versions, self._digest)
        return lost

    # ---- the actor

    async def _call(self, method: str, *args: Any, wait_s: float | None = None) -> Any:
        """Raises: a StoreError of the store's; Refused (`store_unavailable`) after `wait_s`."""
        limit_s = self._wait_s if wait_s is None else wait_s
        deadline = time.monotonic() + limit_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._try(method, args, None if wait_s is None else deadline)
            except SpecUnknown:
                if self._spec is None or time.monotonic() > deadline:
                    raise
                await self._try("register_spec", (self._spec, self._owner), None)
            except RayTaskError:
                raise  # the store is there and has a fault; its class may also be one of those below
            except Exception as error:
                # A ValueError: its name is not there, or was taken in the same moment. TimeoutError is an OSError.
                if not (isinstance(error, ValueError | OSError) or meaning(error) in _AWAY):
                    raise
                if time.monotonic() + pause_s > deadline:
                    raise _unavailable(f"the adapter store did not answer for {limit_s:g} s") from error
                logger.info("the adapter store is away (%s: %s), asking again", type(error).__name__, error)
                await asyncio.sleep(pause_s)
                pause_s = min(LAST_PAUSE_S, 2 * pause_s)

    async def _try(self, method: str, args: tuple[Any, ...], deadline: float | None) -> Any:
        async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
            actor = self._actor
            if actor is None:
                self._actor = actor = await asyncio.to_thread(self._connect)
            try:
                return await getattr(actor, method).remote(*args)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, StoreError):
                    raise cause from None
                raise
            except Exception as error:
                is_away = isinstance(error, ValueError | TimeoutError) or meaning(error) in _AWAY
                if is_away and self._actor is actor:  # else somebody has found the next one already
                    self._actor = None
                raise

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

        async def part(start: int) -> None:
            num_bytes = min(PART_BYTES, lease.num_bytes - start)
            async with turns:
                read = await self._call("read_image", lease.version, lease.spec_digest, start, num_bytes)
            if read is None or len(read) != num_bytes:
                raise FileNotFoundError(f"{lease.name!r} is not in the store's files any more")
            data[start : start + num_bytes] = np.frombuffer(read, dtype=np.uint8)

        await asyncio.gather(*(part(start) for start in range(0, lease.num_bytes, PART_BYTES)))
        return data

    def _node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())


def _unavailable(message: str) -> Refused:
    return Refused(Fault(code="store_unavailable", message=f"{message}; try again later"))
