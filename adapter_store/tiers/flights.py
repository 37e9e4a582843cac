"""Loads images: one flight for all who ask, from the disk tier or else from the source, and down to disk afterwards."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import StoreError, StoreFull
from adapter_store.fetch.fetcher import Fetcher
from adapter_store.image.spec import Spec
from adapter_store.names.catalog import Catalog, ImageKey, Version
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.index import CATALOG, Index, Known
from adapter_store.names.pins import Pins
from adapter_store.names.registered import CatalogSource
from adapter_store.names.resolver import Resolver
from adapter_store.records import StoreConfig
from adapter_store.tiers.disk import DiskTier
from adapter_store.tiers.host import Held, HostTier

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Spill:
    """What is written to disk of an image that was fetched."""

    version: Version
    manifest: dict[str, Any]
    rank: int
    cost_s: float
    sha256: dict[str, str]


class Flights:
    """See `image`. `counts`: hits, misses, fetches, fetched_bytes, rejections."""

    def __init__(
        self,
        catalog: Catalog,
        host: HostTier,
        disk: DiskTier | None,
        index: Index,
        fetcher: Fetcher,
        resolver: Resolver,
        pins: Pins,
        config: StoreConfig,
        clock: Callable[[], float],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._catalog, self._host, self._disk, self._index = catalog, host, disk, index
        self._fetcher, self._resolver, self._pins = fetcher, resolver, pins
        self._config, self._clock = config, clock
        self._flights: dict[ImageKey, asyncio.Task[Held]] = {}
        self._awaited: Counter[ImageKey] = Counter()  # how many callers are about to lease an image
        self._spills: dict[ImageKey, _Spill] = {}  # in the order in which they came
        self._spilling: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._flights)

    def is_awaited(self, key: ImageKey) -> bool:
        """Whether somebody is about to lease the image."""
        return key in self._awaited

    def is_loading(self, key: ImageKey) -> bool:
        """Whether the image is on its way."""
        return key in self._flights

    async def image(self, key: ImageKey, version: Version, spec: Spec) -> Held:
        """The image on the host. What is returned is there until the next await.

        Raises: SourceChanged; what a fetch raises; a failure that is remembered.
        """
        self._awaited[key] += 1
        try:
            held = await self._host.find(key)
            if held is not None:
                self.counts["hits"] += 1
                return held
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

    async def quiet(self) -> None:
        """Returns when nothing is being loaded."""
        while self._flights:
            await asyncio.wait(list(self._flights.values()))

    async def spilled(self) -> None:
        """Returns when everything that was fetched so far is on disk, or was given up."""
        while self._spilling is not None and not self._spilling.done():
            await asyncio.wait([self._spilling])

    async def close(self) -> None:
        """Ends everything under way. What was fetched and is not on disk yet is written."""
        tasks = list(self._flights.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.spilled()

    def _start(self, key: ImageKey, version: Version, spec: Spec) -> asyncio.Task[Held]:
        self.counts["misses"] += 1
        self._catalog.start_fetch(key)
        flight = asyncio.create_task(self._fly(key, version, spec))
        self._flights[key] = flight
        flight.add_done_callback(lambda task: task.cancelled() or task.exception())  # every waiter may have left
        return flight

    async def _fly(self, key: ImageKey, version: Version, spec: Spec) -> Held:
        try:
            held = await self._from_disk(key) or await self._from_source(key, version, spec)
        except BaseException as error:
            self._ended(key, error)
            raise
        else:
            self._pins.keep(version.key, key, held.num_bytes)
            return held
        finally:
            del self._flights[key]

    def _ended(self, key: ImageKey, error: BaseException) -> None:
        """A flight that brought nothing: what the adapter or its source did is remembered, other things are not."""
        if not isinstance(error, StoreError) or isinstance(error, StoreFull):
            self._catalog.fetch_dropped(key)
            return
        self.counts["rejections"] += not error.retryable
        ttl_s = self._config.unavailable_ttl_s if error.retryable else self._config.failure_ttl_s
        self._catalog.fetch_failed(key, error, self._clock() + ttl_s)

    async def _from_disk(self, key: ImageKey) -> Held | None:
        image = None if self._disk is None else await self._disk.get(key)
        if image is None:
            return None
        return await self._host.keep(key, image.data, image.manifest, image.rank, image.read_s)

    async def _from_source(self, key: ImageKey, version: Version, spec: Spec) -> Held:
        source = self._resolver.source(version.key.source)
        expected = await self._expected(version)
        started_at = self._clock()
        fetched = await self._fetcher.fetch(version, source, spec, expected)
        cost_s = self._clock() - started_at
        packed = fetched.packed
        held = await self._host.keep(key, packed.data, packed.manifest, packed.rank, cost_s)
        self.counts["fetches"] += 1
        self.counts["fetched_bytes"] += version.listing.num_bytes
        if self._index.is_durable:
            self._spills[key] = _Spill(version, packed.manifest, packed.rank, cost_s, fetched.sha256)
            if self._spilling is None or self._spilling.done():
                self._spilling = asyncio.create_task(self._spill_all())
        return held

    async def _expected(self, version: Version) -> dict[str, str]:
        """The digests that the files of a version had before, and those its registration gives."""
        expected: dict[str, str] = {}
        if self._index.is_durable:
            try:
                known = await self._index.known(version.key)
            except IndexUnavailable as error:
                _log.debug("the index cannot be asked for digests: %s", error)
            else:
                if known is not None and known.version == version.digest:
                    expected.update(known.sha256)
        if version.key.source == CATALOG:
            source = self._resolver.source(CATALOG)
            assert isinstance(source, CatalogSource)
            expected.update(await source.expected(version.key.name))
        return expected

    async def _spill_all(self) -> None:
        while self._spills:
            key = next(iter(self._spills))
            spill = self._spills.pop(key)
            try:
                await self._spill(key, spill)
            except IndexUnavailable as error:
                _log.warning("version %s is not remembered over a restart: %s", key.version[:12], error)

    async def _spill(self, key: ImageKey, spill: _Spill) -> None:
        """The version's name first, then the image: what is on disk can be found again while the source is down."""
        version = spill.version
        if self._catalog.current(version.key) == version.digest:
            known = Known(version.digest, version.listing, spill.sha256, self._resolver.checked_at(version.key))
            await self._index.remember(version.key, known)
        if self._disk is None or (data := await self._host.view(key)) is None:
            return
        await self._disk.put(key, data, spill.manifest, spill.rank, spill.cost_s)
        cost_s = self._disk.cost_s(data.nbytes)
        if cost_s is not None and self._disk.row(key) is not None:
            self._host.recost(key, cost_s)
