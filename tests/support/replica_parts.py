"""What a replica is made of, put together without Serve: an engine, the images it needs, and their store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, Protocol, cast

from adapter_store.records import AdapterRecord, Lease
from adapter_store.store import AdapterStore
from deployments.replica.held import HeldAdapters, Store
from engine.aio.async_engine import AsyncEngine
from engine.engine import Engine
from engine.request import OutputDelta, Request, SamplingParams

POLL_S = 0.002


class BeatingStore(Store, Protocol):
    """A store, and the heartbeat that keeps the leases."""

    async def heartbeat(self, versions: tuple[str, ...]) -> None: ...


class LocalStore:
    """An `AdapterStore` of the same event loop as a replica sees it: `deployments.store.client` without Ray.

    `open_image` turns the blob store's handle into the image's bytes.
    """

    def __init__(
        self,
        store: AdapterStore,
        digest: str,
        owner: str = "local",
        open_image: Callable[[Any], Any] = lambda data: data,
    ) -> None:
        self._store = store
        self._digest = digest
        self._owner = owner
        self._open_image = open_image

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        return await self._store.resolve(name, source)

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        lease = await self._store.acquire(name, self._digest, self._owner, version, source)
        return lease, self._open_image(lease.image)

    async def release(self, version: str) -> None:
        await self._store.release(version, self._owner)

    async def heartbeat(self, versions: tuple[str, ...]) -> None:
        await self._store.heartbeat(self._owner, versions)


class ReplicaParts:
    """Answers requests as `deployments.replica` does. Lives on one event loop; close it with `close`."""

    def __init__(
        self, engine: Engine, store: BeatingStore, *, lease_ttl_s: float = 30.0, refresh_s: float = 60.0
    ) -> None:
        self.held = HeldAdapters(store, engine.image_spec, refresh_s=refresh_s)
        self.engine = AsyncEngine(engine, on_adapter_released=self.held.dropped)
        self.engine.start()
        self._store = store
        self._lease_ttl_s = lease_ttl_s
        self._heart = asyncio.ensure_future(self._beat())

    async def generate(
        self, request_id: str, adapter: str | None, prompt: tuple[int, ...], params: SamplingParams
    ) -> AsyncGenerator[OutputDelta]:
        """The deltas of one request. Raises: what the store, the engine and the store's client raise."""
        async with AsyncExitStack() as stack:
            held = None
            if adapter is not None:
                held = await stack.enter_async_context(self.held.borrowed(adapter, None, None))
            version = held.version if held else None
            request = Request(request_id=request_id, prompt_token_ids=prompt, params=params, seed=0, adapter=version)
            stream = cast("AsyncGenerator[OutputDelta]", self.engine.generate(request, held.image if held else None))
            async for delta in await stack.enter_async_context(aclosing(stream)):
                if held:
                    held.in_engine = True
                yield delta

    async def settled(self, num_held: int) -> None:
        """Waits until no more than `num_held` images are held: leases are given back beside the answers."""
        while len(self.held.versions) > num_held:
            await asyncio.sleep(POLL_S)

    async def _beat(self) -> None:
        while True:
            await self._store.heartbeat(self.held.versions)
            await asyncio.sleep(self._lease_ttl_s / 3)

    async def close(self) -> None:
        self._heart.cancel()
        with suppress(asyncio.CancelledError):
            await self._heart
        await asyncio.to_thread(self.engine.close)
        await self.held.settled()
