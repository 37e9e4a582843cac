"""The adapter store: leases packed images to replicas, fetching each adapter version once for all of them.

Plain asyncio on one loop; every piece of state changes between two awaits. Neither ray nor a clock of its own.
An image is looked for on the host, on disk, and in its source, in this order (`flights.py`); what a name stands for is
known by `resolver.py`, what is kept warm by `warmth.py`.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from itertools import count
from typing import Any

from adapter_store.errors import AdapterRejected, AdapterTooLarge, SourceUnavailable, StoreError
from adapter_store.image.spec import Spec, read_spec
from adapter_store.names.catalog import ImageKey, NameKey
from adapter_store.names.mirror import Shelf
from adapter_store.records import (
    AdapterPage,
    AdapterRecord,
    Lease,
    Registration,
    StoreConfig,
    StoreStatus,
    check_name,
)
from adapter_store.reports import Reports
from adapter_store.sources.base import Source, SourceChanged
from adapter_store.tiers.assembly import Tiers
from adapter_store.tiers.blobs import BlobStore
from adapter_store.tiers.specs import Specs

_log = logging.getLogger(__name__)
TICK_S = 5.0  # between two looks at what could be better


class AdapterStore:
    """See the methods; all of them are for one event loop. `sources` are asked in their order. `shelf` is where
    registrations and pins are mirrored, `owner` what the stores that follow each other on a disk have in common.

    Raises: StoreConfigInvalid when `disk_path` is no folder and cannot become one, or a source is named "catalog".
    """

    def __init__(
        self,
        sources: Sequence[Source],
        blobs: BlobStore,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        tick_s: float = TICK_S,
        shelf: Shelf | None = None,
        owner: str = "",
    ) -> None:
        self.config = config or StoreConfig()
        self._clock, self._tick_s = clock, tick_s
        self._lease_numbers = count(int(wall() * 1e6))  # those of a restarted store go on behind its last ones
        self._tiers = Tiers(sources, blobs, self.config, clock, wall, sleep, jitter, shelf, owner)
        self._catalog, self._resolver, self._pins = self._tiers.catalog, self._tiers.resolver, self._tiers.pins
        self._flights, self._warmth, self._registry = self._tiers.flights, self._tiers.warmth, self._tiers.registry
        self._specs = Specs(self.config.lease_ttl_s, clock, self._forget_spec)
        self._tasks: set[asyncio.Task[None]] = set()
        self._beginning: asyncio.Task[None] | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._loading: dict[str, asyncio.Task[None]] = {}  # what is warm, by spec
        self._reports = Reports(self._tiers, self._specs, self.config, clock)

    # What a name stands for

    async def register_spec(self, spec: Mapping[str, Any], owner: str = "") -> str:
        """Makes a spec (an `ImageSpec.to_dict()`) known, which `owner` serves, and returns its digest.

        It is packed for as long as an owner names it: here, in a heartbeat, by a lease; then for `lease_ttl_s`. What is
        warm begins to come back from disk for it. Raises: SpecInvalid.
        """
        read = read_spec(spec)
        if self._specs.add(read, owner):
            await self._begin()
            self._load_warm(read)
        return read.digest

    async def resolve(self, name: str, source: str | None = None) -> AdapterRecord:
        """What `name` stands for now. Raises: AdapterNameInvalid, AdapterNotFound, SourceUnavailable, SourceUnknown."""
        await self._begin()
        return self._reports.record(await self._resolver.resolve(name, source))

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        """`resolve`, whatever is remembered: the source is asked, and a refused adapter may be tried again.

        If it was refused for digests that its files had before, these do not count any more; registered ones do.
        Raises: as `resolve`; SourceUnavailable (of "catalog") when such digests cannot be forgotten now.
        """
        await self._begin()
        version = await self._resolver.resolve(name, source, force=True)
        failures = self._catalog.failures(version.digest)
        if any(isinstance(failure, AdapterRejected) and failure.is_own_digest for failure in failures):
            await self._registry.forget_digests(version.key)
        self._catalog.forgive(version.digest)
        return self._reports.record(version)

    async def register(self, rows: tuple[Registration, ...]) -> None:
        """Makes names known that their sources would not find by themselves, or replaces what they stood for.

        They come before the same names in any source. A call may be repeated. Raises: RegistrationInvalid, having
        written nothing; SourceUnavailable (of "catalog") when only some rows may have been written, if any.
        """
        await self._begin()
        await self._registry.register(rows)

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The registered names are not found any more; leases go on. Returns those that were there.

        Raises: SourceUnavailable (of "catalog"), as `register`.
        """
        await self._begin()
        return await self._registry.unregister(names)

    async def note_pin(self, name: str, source: str | None, is_pinned: bool) -> None:
        """Writes down what another shard has pinned or unpinned. Raises: SourceUnavailable (of "catalog")."""
        await self._begin()
        await self._registry.note_pin(name, source, is_pinned)

    # Bringing images to the host

    async def expect(self, name: str, source: str | None = None) -> None:
        """`expect_all` of one request."""
        await self.expect_all(((name, source, 1),))

    async def expect_all(self, expected: Sequence[tuple[str, str | None, int]]) -> None:
        """(name, source, how many requests have come to a router): traffic, whose images start to come to the host.

        Returns at once; what goes wrong is told to the one who acquires it. Raises: AdapterNameInvalid.
        """
        for name, source, number in expected:
            check_name(name)
            self._spawn(self._bring(name, self._specs.live(), source, num_requests=number))

    async def prefetch(self, name: str, spec_digest: str | None = None, source: str | None = None) -> None:
        """Starts to bring an adapter to the host, for one spec or all that are served, and returns at once.

        What goes wrong is told to the one who acquires it. Raises: AdapterNameInvalid, SpecUnknown.
        """
        check_name(name)
        specs = self._specs.live() if spec_digest is None else (self._specs.named(spec_digest, ""),)
        self._spawn(self._bring(name, specs, source))

    async def warm_set(self, spec_digest: str, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        """What is worth having in so many bytes: pinned adapters, then by traffic, of those on the host or on disk."""
        await self._begin()
        return tuple(
            self._reports.record(warm.version) for warm in await self._warmth.warm_set(spec_digest, budget_bytes)
        )

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord:
        """Keeps `name` on the host and on disk, for all specs that are served and that it fits, until `unpin`.

        Raises: PinRefused; what `acquire` raises but StoreFull for its own lease, AdapterRejected and AdapterTooLarge
        only if it fits none of the specs; SourceUnavailable (of "catalog") when that cannot be written down.
        """
        await self._begin()
        version = await self._resolver.resolve(name, source)
        sizes: dict[ImageKey, int] = {}
        refusals: list[StoreError] = []
        for spec in self._specs.live():
            try:
                version, held = await self._tiers.finder.found(name, spec, None, source)
            except (AdapterRejected, AdapterTooLarge) as error:  # another base model may be what it was made for
                refusals.append(error)
            else:
                sizes[ImageKey(version.digest, spec.digest)] = held.num_bytes
        if refusals and not sizes:
            raise refusals[0]
        self._pins.add(version.key, sizes)
        try:
            await self._registry.set_pin(version.key, True)
        except SourceUnavailable:
            self._pins.remove(version.key)
            raise
        return self._reports.record(version)

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord:
        """Ends `pin`; of a name that is not pinned, nothing. Raises: AdapterNameInvalid, AdapterNotFound, as `pin`."""
        check_name(name)
        await self._begin()
        pinned = sorted(key for key in self._pins.names if key.name == name and source in (None, key.source))
        for key in pinned:
            await self._registry.set_pin(key, False)
            self._pins.remove(key)
        if not pinned:
            return self._reports.record(await self._resolver.resolve(name, source))
        await self._resolver.recall(pinned[0])
        return self._reports.named(pinned[0])

    # Leases

    async def acquire(
        self, name: str, spec_digest: str, owner: str, version: str | None = None, source: str | None = None
    ) -> Lease:
        """Leases the image of `name` to `owner`, bringing it to the host first where needed.

        `version` asks for that one, which may have been replaced since. An owner has one lease per image: acquiring
        again renews it, so a call may be repeated.
        Raises: AdapterNameInvalid, AdapterNotFound, AdapterRejected, AdapterTooLarge, AdapterVersionGone,
        SourceUnavailable, SourceUnknown, SpecUnknown, StoreFull.
        """
        check_name(name)
        spec = self._specs.named(spec_digest, owner)
        await self._begin()
        self._tiers.host.expire()
        target, held = await self._tiers.finder.found(name, spec, version, source)
        # No await since the image was found, so it is still there.
        key = ImageKey(target.digest, spec_digest)
        number = next(self._lease_numbers)
        self._catalog.lease(key, owner, self._clock() + self.config.lease_ttl_s, number)
        self._specs.named(spec_digest, owner)
        self._tiers.host.touch(key)
        return Lease(
            name=target.key.name,
            version=target.digest,
            source=target.key.source,
            owner=owner,
            spec_digest=spec_digest,
            manifest=held.manifest,
            image=held.handle,
            num_bytes=held.num_bytes,
            rank=held.rank,
            ttl_s=self.config.lease_ttl_s,
            number=number,
        )

    async def release(self, version: str, owner: str, number: int | None = None) -> None:
        """Ends the lease of `owner` on `version`, or only that one of this `number`, which may have been followed by
        another since. Releasing what is not held is nothing.
        """
        self._tiers.host.evict(self._catalog.release(version, owner, number))

    async def heartbeat(self, owner: str, versions: tuple[str, ...], spec_digest: str | None = None) -> tuple[str, ...]:
        """Renews the leases of `owner` on `versions`; returns those it has none on (after a restart: all of them).

        `spec_digest` is what it serves (None: what it has served). Raises: SpecUnknown, having renewed nothing.
        """
        if spec_digest is not None:
            self._specs.named(spec_digest, owner)
        self._specs.beat(owner)
        self._tiers.host.expire()
        expires_at = self._clock() + self.config.lease_ttl_s
        return tuple(version for version in versions if not self._catalog.renew(version, owner, expires_at))

    async def read_image(self, version: str, spec_digest: str, start: int, num_bytes: int) -> bytes | None:
        """Bytes of a leased image that lies in a file, for who cannot open it. None: it is not there any more."""
        return await self._tiers.host.part(ImageKey(version, spec_digest), start, num_bytes)

    # Telling

    async def list_adapters(self, cursor: str | None = None, limit: int = 100) -> AdapterPage:
        """At most `limit` adapters, registered ones first, then source by source; `next_cursor` None is the end.

        A page may be short. A source that is away is named and left out. Raises: SourceUnavailable when all are.
        """
        return await self._reports.page(cursor, limit)

    async def described(self, keys: Sequence[tuple[str, str]]) -> tuple[AdapterRecord, ...]:
        """What is known of each (source, name), without asking the sources."""
        await self._begin()
        return tuple(self._reports.named(NameKey(*key)) for key in keys)

    async def status(self) -> StoreStatus:
        """Sizes and counters."""
        await self._begin()
        return await self._reports.status()

    async def close(self) -> None:
        """Ends everything under way. Images that others hold stay theirs; what is on disk stays there."""
        if self._beginning is not None:
            await asyncio.wait([self._beginning])
        tasks = [task for task in (*self._tasks, self._housekeeping) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._tiers.close()

    def check_invariants(self) -> None:
        """Raises: AssertionError when the parts contradict each other."""
        self._tiers.check_invariants()

    # Inside

    async def _begin(self) -> None:
        """Reads what was written down before the first answer is given that depends on it."""
        if self._beginning is None:
            self._beginning = asyncio.create_task(self._tiers.begin())
            self._housekeeping = asyncio.create_task(self._keep_house())
        if not self._beginning.done():
            await asyncio.shield(self._beginning)

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(self._tick_s)
            for spec in self._specs.live():
                self._load_warm(spec)
            task = self._spawn(self._tiers.keep_house())
            await asyncio.wait([task])  # what it raises is told, and it is tried again

    def _load_warm(self, spec: Spec) -> None:
        """In the background, as it gives way to other loads: while there are always some, it does not end."""
        if spec.digest not in self._loading or self._loading[spec.digest].done():
            self._loading[spec.digest] = self._spawn(self._warmth.load(spec))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("work in the background of the store has failed", exc_info=error)

    def _forget_spec(self, spec_digest: str) -> None:
        """Nobody serves it any more: nothing is kept, pinned or warmed for it. What is on disk goes by its worth."""
        if (loading := self._loading.pop(spec_digest, None)) is not None:
            loading.cancel()
        self._pins.drop_spec(spec_digest)
        self._tiers.host.evict(self._catalog.forget_spec(spec_digest))

    async def _bring(self, name: str, specs: Sequence[Spec], source: str | None, *, num_requests: int = 0) -> None:
        try:
            await self._begin()
            version = await self._resolver.resolve(name, source, is_awaited=not num_requests)
            for _ in range(num_requests):
                self._warmth.count(version.key)
        except (StoreError, SourceChanged) as error:
            _log.info("adapter %s was not brought to the host: %s", name, error)
            return
        for spec in specs:
            try:
                await self._flights.image(ImageKey(version.digest, spec.digest), version, spec)
            except (StoreError, SourceChanged) as error:  # of this base model; another may be what it was made for
                _log.info("adapter %s was not brought to the host: %s", name, error)
