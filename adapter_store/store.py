"""The adapter store: leases packed images to replicas, fetching each adapter version once for all of them.

Plain asyncio on one loop; every piece of state changes between two awaits. Neither ray nor a clock of its own.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapter_store.blobs import BlobStore
from adapter_store.catalog import Catalog, ImageKey, NameKey, Version
from adapter_store.errors import AdapterVersionGone, SourceUnavailable, SpecUnknown, StoreError, StoreFull
from adapter_store.fetcher import Fetcher
from adapter_store.host_cache import HostCache
from adapter_store.image import PackedImage
from adapter_store.records import AdapterPage, AdapterRecord, AdapterState, Lease, StoreConfig, StoreStatus, check_name
from adapter_store.resolver import Resolver
from adapter_store.sources.base import Source, SourceChanged
from adapter_store.spec import Spec, read_spec

_log = logging.getLogger(__name__)
_STATE_ORDER = (AdapterState.HOST, AdapterState.FETCHING, AdapterState.FAILED, AdapterState.COLD)


@dataclass(frozen=True, slots=True)
class _Held:
    """An image on the host."""

    handle: Any
    manifest: dict[str, Any]
    num_bytes: int
    rank: int


class AdapterStore:
    """See the methods; all of them are for one event loop. `sources` are asked in their order."""

    def __init__(
        self,
        sources: Sequence[Source],
        blobs: BlobStore,
        config: StoreConfig | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.config = config or StoreConfig()
        self._clock = clock
        self._blobs = blobs
        self._catalog = Catalog()
        self._cache: HostCache[ImageKey] = HostCache(self.config.host_bytes, self._is_pinned)
        self._resolver = Resolver(self._catalog, sources, self.config, clock, self._evict_unwanted)
        self._fetcher = Fetcher(self.config, clock, sleep, jitter)
        self._specs: dict[str, Spec] = {}
        self._held: dict[ImageKey, _Held] = {}
        self._flights: dict[ImageKey, asyncio.Task[_Held]] = {}
        self._awaited: Counter[ImageKey] = Counter()  # how many callers are about to lease an image
        self._prefetches: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()
        self._started_at = clock()

    async def register_spec(self, spec: Mapping[str, Any]) -> str:
        """Makes a spec (an `ImageSpec.to_dict()`) known and returns its digest. Raises: SpecInvalid."""
        read = read_spec(spec)
        self._specs[read.digest] = read
        return read.digest

    async def resolve(self, name: str, source: str | None = None) -> AdapterRecord:
        """What `name` stands for now. Raises: AdapterNameInvalid, AdapterNotFound, SourceUnavailable, SourceUnknown."""
        return self._record(await self._resolver.resolve(name, source))

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        """`resolve`, whatever is remembered: the source is asked, and a refused adapter may be tried again."""
        version = await self._resolver.resolve(name, source, force=True)
        self._catalog.forgive(version.digest)
        return self._record(version)

    async def prefetch(self, name: str, spec_digest: str | None = None, source: str | None = None) -> None:
        """Starts to bring an adapter to the host, for one spec or all known ones, and returns at once.

        What goes wrong is told to the one who acquires it. Raises: AdapterNameInvalid, SpecUnknown.
        """
        check_name(name)
        specs = list(self._specs.values()) if spec_digest is None else [self._spec(spec_digest)]
        task = asyncio.create_task(self._prefetch(name, specs, source))
        self._prefetches.add(task)
        task.add_done_callback(self._prefetches.discard)

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
        spec = self._spec(spec_digest)
        self._expire()
        for _ in range(self.config.fetch_retries + 1):
            target = await self._target(name, version, spec_digest, source)
            key = ImageKey(target.digest, spec_digest)
            try:
                held = await self._image(key, target, spec)
            except SourceChanged:
                await self._resolver.resolve(name, source, force=True)
                continue
            # No await since the image was found, so it is still there.
            self._catalog.lease(key, owner, self._clock() + self.config.lease_ttl_s)
            self._cache.touch(key)
            return self._lease(target, spec_digest, owner, held)
        raise SourceUnavailable(source or "any", f"the files of adapter {name!r} change faster than they can be read")

    async def release(self, version: str, owner: str) -> None:
        """Ends the lease of `owner` on `version`. Releasing what is not held is nothing."""
        self._evict(self._catalog.release(version, owner))

    async def heartbeat(self, owner: str, versions: tuple[str, ...]) -> tuple[str, ...]:
        """Renews the leases of `owner` on `versions`; returns those it has none on (after a restart: all of them)."""
        self._expire()
        expires_at = self._clock() + self.config.lease_ttl_s
        return tuple(version for version in versions if not self._catalog.renew(version, owner, expires_at))

    async def list_adapters(self, cursor: str | None = None, limit: int = 100) -> AdapterPage:
        """At most `limit` adapters, source by source. A page may be short; `next_cursor` None is the end.

        Raises: SourceUnavailable.
        """
        sources = self._resolver.source_names
        index, _, inner = (cursor or "0:").partition(":")
        position = int(index) if index.isdecimal() else len(sources)
        if position >= len(sources):
            return AdapterPage(records=(), next_cursor=None)
        page = await self._resolver.source(sources[position]).list(inner or None, max(1, limit))
        records = tuple(self._listed(NameKey(sources[position], name)) for name in page.names)
        if page.next_cursor is not None:
            return AdapterPage(records=records, next_cursor=f"{position}:{page.next_cursor}")
        more = position + 1 < len(sources)
        return AdapterPage(records=records, next_cursor=f"{position + 1}:" if more else None)

    async def status(self) -> StoreStatus:
        """Sizes and counters."""
        self._expire()
        return StoreStatus(
            host_bytes=self.config.host_bytes,
            host_used_bytes=self._cache.used_bytes,
            host_leased_bytes=self._cache.pinned_bytes,
            num_images=len(self._held),
            num_leases=self._catalog.num_leases,
            num_fetching=len(self._flights),
            num_failed=self._catalog.count(AdapterState.FAILED),
            num_specs=len(self._specs),
            sources=self._resolver.source_names,
            hits=self._counts["hits"],
            misses=self._counts["misses"],
            fetches=self._counts["fetches"],
            fetched_bytes=self._counts["fetched_bytes"],
            evictions=self._counts["evictions"],
            rejections=self._counts["rejections"],
            uptime_s=self._clock() - self._started_at,
        )

    async def close(self) -> None:
        """Ends everything under way. Images that others hold stay theirs."""
        tasks = [*self._flights.values(), *self._prefetches]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fetcher.close()
        await self._resolver.close()

    def check_invariants(self) -> None:
        """Raises: AssertionError when the parts contradict each other."""
        self._catalog.check_invariants()
        self._cache.check_invariants()
        on_host = {key for key in self._held if self._catalog.state(key) is AdapterState.HOST}
        assert on_host == set(self._held), "an image is held that the catalog does not know on the host"
        assert self._catalog.count(AdapterState.HOST) == len(self._held), "the catalog knows an image that is not held"
        assert set(self._held) <= set(self._cache.keys()), "an image is held outside the budget"

    # Finding the version

    def _spec(self, spec_digest: str) -> Spec:
        if spec_digest not in self._specs:
            raise SpecUnknown(spec_digest)
        return self._specs[spec_digest]

    async def _target(self, name: str, version: str | None, spec_digest: str, source: str | None) -> Version:
        if version is None:
            return await self._resolver.resolve(name, source)
        known = self._catalog.version(version)
        if known is not None and known.key.name == name and source in (None, known.key.source):
            state = self._catalog.state(ImageKey(version, spec_digest))
            if state in (AdapterState.HOST, AdapterState.FETCHING):
                return known
        current = await self._resolver.resolve(name, source)
        if current.digest != version:
            raise AdapterVersionGone(name, version)
        return current

    # Finding the image

    async def _image(self, key: ImageKey, version: Version, spec: Spec) -> _Held:
        """The image on the host, fetched by one flight for all who ask. What is returned is there until an await."""
        self._awaited[key] += 1
        try:
            while (held := self._held.get(key)) is not None:
                there = await self._blobs.has(held.handle)
                if self._held.get(key) is not held:
                    continue  # somebody else found it lost meanwhile
                if there:
                    self._counts["hits"] += 1
                    return held
                _log.warning("adapter %s: its image was lost, it is fetched again", version.key.name)
                self._lose(key)
            flight = self._flights.get(key)
            if flight is None:
                failure = self._catalog.failure(key, self._clock())
                if failure is not None:
                    raise failure
                flight = self._start(key, version, spec)
            return await asyncio.shield(flight)  # a cancelled waiter cancels nobody else
        finally:
            self._awaited[key] -= 1
            if not self._awaited[key]:
                del self._awaited[key]

    def _start(self, key: ImageKey, version: Version, spec: Spec) -> asyncio.Task[_Held]:
        self._counts["misses"] += 1
        self._catalog.start_fetch(key)
        flight = asyncio.create_task(self._fly(key, version, spec))
        self._flights[key] = flight
        flight.add_done_callback(lambda task: task.cancelled() or task.exception())  # every waiter may have left
        return flight

    async def _fly(self, key: ImageKey, version: Version, spec: Spec) -> _Held:
        try:
            fetched = await self._fetcher.fetch(version, self._resolver.source(version.key.source), spec)
            held = await self._keep(key, fetched.packed)
        except BaseException as error:
            self._ended(key, error)
            raise
        else:
            self._catalog.fetched(key)
            self._held[key] = held
            self._counts["fetches"] += 1
            self._counts["fetched_bytes"] += version.listing.num_bytes
            return held
        finally:
            del self._flights[key]

    def _ended(self, key: ImageKey, error: BaseException) -> None:
        """A flight that brought nothing: what the adapter or its source did is remembered, other things are not."""
        if not isinstance(error, StoreError) or isinstance(error, StoreFull):
            self._catalog.fetch_dropped(key)
            return
        self._counts["rejections"] += not error.retryable
        ttl_s = self.config.unavailable_ttl_s if error.retryable else self.config.failure_ttl_s
        self._catalog.fetch_failed(key, error, self._clock() + ttl_s)

    async def _keep(self, key: ImageKey, packed: PackedImage) -> _Held:
        self._expire()
        self._evict(self._cache.add(key, packed.num_bytes), from_cache=False)
        try:
            handle = await self._blobs.put(packed.data)
        except BaseException:
            self._cache.drop(key)
            raise
        return _Held(handle, packed.manifest, packed.num_bytes, packed.rank)

    # Letting images go

    def _is_pinned(self, key: ImageKey) -> bool:
        return key in self._flights or key in self._awaited or self._catalog.is_leased(key)

    def _expire(self) -> None:
        self._evict(self._catalog.expire(self._clock()))

    def _evict_unwanted(self, digest: str) -> None:
        self._evict(self._catalog.unwanted(digest))

    def _evict(self, keys: Sequence[ImageKey], *, from_cache: bool = True) -> None:
        for key in keys:
            if from_cache:
                if key in self._awaited:
                    continue  # somebody is about to lease it; the budget will find it later
                self._cache.drop(key)
            self._catalog.evict(key)
            self._blobs.drop(self._held.pop(key).handle)
            self._counts["evictions"] += 1

    def _lose(self, key: ImageKey) -> None:
        del self._held[key]
        self._cache.drop(key)
        self._catalog.lose(key)

    # Telling

    async def _prefetch(self, name: str, specs: list[Spec], source: str | None) -> None:
        try:
            version = await self._resolver.resolve(name, source)
            for spec in specs:
                await self._image(ImageKey(version.digest, spec.digest), version, spec)
        except (StoreError, SourceChanged) as error:
            _log.info("prefetch of adapter %s: %s", name, error)

    def _lease(self, version: Version, spec_digest: str, owner: str, held: _Held) -> Lease:
        return Lease(
            name=version.key.name,
            version=version.digest,
            source=version.key.source,
            owner=owner,
            spec_digest=spec_digest,
            manifest=held.manifest,
            image=held.handle,
            num_bytes=held.num_bytes,
            rank=held.rank,
            ttl_s=self.config.lease_ttl_s,
        )

    def _listed(self, key: NameKey) -> AdapterRecord:
        digest = self._catalog.current(key)
        version = None if digest is None else self._catalog.version(digest)
        return self._record(version) if version else AdapterRecord(name=key.name, source=key.source, version=None)

    def _record(self, version: Version) -> AdapterRecord:
        states = dict(self._catalog.states_of(version.digest))
        state = min(states.values(), key=_STATE_ORDER.index, default=AdapterState.COLD)
        key = next((key for key, known in states.items() if known is state), None)
        held = None if key is None else self._held.get(key)
        failure = None if key is None else self._catalog.failure(key, self._clock())
        return AdapterRecord(
            name=version.key.name,
            source=version.key.source,
            version=version.digest,
            state=state,
            rank=held.rank if held else None,
            num_bytes=held.num_bytes if held else None,
            reason=str(failure) if failure else None,
        )
