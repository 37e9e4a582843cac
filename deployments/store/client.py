"""The adapter store's actor, seen from a router or a replica: found or created, waited for, told its specs again.

The actor may die and come back empty at any time. Calls wait for it up to `wait_s`; an image whose bytes died with
their owner is leased again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from adapter_store.errors import SpecUnknown, StoreError
from adapter_store.records import AdapterPage, AdapterRecord, Lease, Registration, StoreStatus
from adapter_store.tiers.blobs import FileImage, map_image
from deployments.calls import Fault, Refused

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 1.0


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

    async def start(self) -> None:
        """Raises: Refused (`store_unavailable`) when no store could be started in time."""
        await self._call("status")
        if self._spec is not None:
            await self._call("register_spec", self._spec, self._owner)

    # ---- for routers

    def expect(self, name: str, source: str | None) -> None:
        """Tells the store that a request for `name` is on its way, without waiting for anything."""
        if self._actor is not None:
            self._actor.expect.remote(name, source)  # what fails is told when a replica leases it

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
                return lease, await _bytes_of(lease.image, self._wait_s)
            except (ObjectLostError, GetTimeoutError, FileNotFoundError) as error:
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
            except (RayActorError, ValueError, TimeoutError) as error:
                self._actor = None
                if time.monotonic() + pause_s > deadline:
                    raise _unavailable(f"the adapter store did not answer for {limit_s:g} s") from error
                logger.info("the adapter store is away (%s), asking again", type(error).__name__)
                await asyncio.sleep(pause_s)
                pause_s = min(LAST_PAUSE_S, 2 * pause_s)

    async def _try(self, method: str, args: tuple[Any, ...], deadline: float | None) -> Any:
        async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
            if self._actor is None:
                self._actor = await asyncio.to_thread(self._connect)
            try:
                return await getattr(self._actor, method).remote(*args)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, StoreError):
                    raise cause from None
                raise


async def _bytes_of(image: Any, timeout_s: float) -> object:
    """In a thread: an image may be on its way from another node, and a file be slow to open."""
    if isinstance(image, FileImage):
        return await asyncio.to_thread(map_image, image)
    return await asyncio.to_thread(ray.get, image, timeout=timeout_s)


def _unavailable(message: str) -> Refused:
    return Refused(Fault(code="store_unavailable", message=f"{message}; try again later"))
