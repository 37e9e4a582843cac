"""What a replica is made of, put together without Serve: an engine, the images it needs, and their store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, cast

from adapter_store.records import AdapterRecord, Lease
from adapter_store.store import AdapterStore
from deployments.replica.held import HeldAdapters, Store
from engine.aio.async_engine import AsyncEngine
from engine.engine import Engine
from engine.request import OutputDelta, Request, SamplingParams
from tests.support.waiting import until_async

SETTLE_S = 20.0


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

    async def lease_again(self, lease: Lease) -> Lease:
        return await self._store.acquire(lease.name, self._digest, self._owner, lease.version, lease.source)

    async def release(self, lease: Lease) -> None:
        await self._store.release(lease.version, self._owner, lease.number)

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        return await self._store.heartbeat(self._owner, tuple(lease.version for lease in leases), self._digest)


class ReplicaParts:
    """Answers requests as `deployments.replica` does. Lives on one event loop; close it with `close`."""

    def __init__(self, engine: Engine, store: Store, *, lease_ttl_s: float = 30.0, refresh_s: float = 60.0) -> None:
        self.held = HeldAdapters(store, engine.image_spec, refresh_s=refresh_s)
        self.engine = AsyncEngine(engine, image_owner=self.held)
        self.engine.start()
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
                yield delta

    async def settled(self) -> None:
        """Waits until what is held is what the idle engine has in its slots: it tells that beside the answers.

        Raises: TimeoutError, naming what is held and what the engine has.
        """

        def both() -> tuple[list[str], list[str]]:
            return sorted(self.held.versions), sorted(self.engine.stats().resident_adapters)

        await until_async(
            lambda: both()[0] == both()[1],
            lambda: "leases on what the engine has: leases on {}, the engine has {}".format(*both()),
            SETTLE_S,
        )
        await self.held.settled()

    async def _beat(self) -> None:
        while True:
            await self.held.beat()
            await asyncio.sleep(self._lease_ttl_s / 3)

    async def close(self) -> None:
        self._heart.cancel()
        with suppress(asyncio.CancelledError):
            await self._heart
        await asyncio.to_thread(self.engine.close)
        await self.held.settled()
