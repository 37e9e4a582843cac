"""A store with everything around it in the test's hands: its source, its clock, its blobs."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

from adapter_store.image.packing import pack
from adapter_store.image.spec import spec_digest
from adapter_store.records import Lease, StoreConfig
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import FileImage, map_image
from tests.support.fake_sources import FakeBlobs, FakeClock, FakeSource, small_adapter, small_spec
from tests.support.waiting import patience, within

SPEC = small_spec()
DIGEST = spec_digest(SPEC)
IMAGE_BYTES = pack(small_adapter(), SPEC).num_bytes


class World:
    """A store with one source, unless others are given."""

    def __init__(self, *sources: FakeSource, **config: Any) -> None:
        self.sources = sources or (FakeSource({"a": small_adapter(seed=1), "b": small_adapter(seed=2)}),)
        self.source = self.sources[0]
        self.clock = FakeClock()
        config = {"host_bytes": 10 * IMAGE_BYTES, "max_adapter_bytes": 5000, "max_parallel_fetches": 2, **config}
        self.config = StoreConfig(**config)
        self.begin()

    def begin(self) -> None:
        """A new store, as a process has it that was just started."""
        self.blobs = FakeBlobs()
        self.store = AdapterStore(
            self.sources,
            self.blobs,
            self.config,
            clock=self.clock,
            wall=self.clock,
            sleep=self.clock.sleep,
            jitter=lambda: 1.0,
        )

    async def restart(self) -> None:
        """Ends the store and begins a new one on the same disk; callers tell it their spec again."""
        await self.settle()
        self.store.check_invariants()
        await self.store.close()
        self.begin()
        await self.store.register_spec(SPEC)

    async def settle(self) -> None:
        """Returns when nothing goes on in the background any more."""
        tiers = self.store._tiers
        for _ in patience("the store's background to be quiet"):
            tasks = [*self.store._tasks, *tiers.flights._flights.values()]
            if not tasks:
                break
            await within(asyncio.wait(tasks), f"the store's background: {tasks}")
        await tiers.flights.spilled()
        if tiers.disk is not None:
            await tiers.disk.has_stock()

    def bytes_of(self, lease: Lease) -> Any:
        """What the holder of a lease reads."""
        return map_image(lease.image) if isinstance(lease.image, FileImage) else self.blobs.arrays[lease.image]

    async def acquire(self, name: str = "a", owner: str = "me", **more: Any) -> Lease:
        return await self.store.acquire(name, DIGEST, owner, **more)


def in_loop(**config: Any) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """Runs an async test with a fresh World; at its end the store's parts must agree."""

    def wrap(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        @functools.wraps(test)
        def run() -> None:
            async def main() -> None:
                world = World(**config)
                await world.store.register_spec(SPEC)
                await test(world)
                world.store.check_invariants()
                await world.store.close()
                assert all(source.closed for source in world.sources)

            asyncio.run(main())

        del run.__wrapped__  # type: ignore[attr-defined]  # pytest would look for a fixture named `world`
        return run

    return wrap


async def turns(number: int = 50) -> None:
    """Lets everything that is ready run."""
    for _ in range(number):
        await asyncio.sleep(0)
