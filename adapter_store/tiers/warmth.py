"""What is asked for, and what follows from it: which adapters are warm, and which of them come back from disk.

Every few seconds, while the host has room: pinned adapters are loaded wherever they are, then those that were asked for
at least once of late come back from disk, the most wanted first. It stops at 80 % of the host budget, so it evicts
nothing, and gives way to every other load. A restarted store does the same with the traffic it finds written down.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from adapter_store.errors import StoreError
from adapter_store.image.spec import Spec
from adapter_store.names.catalog import Catalog, ImageKey, NameKey, Version
from adapter_store.names.index import Index
from adapter_store.names.pins import Pins
from adapter_store.names.resolver import Resolver
from adapter_store.names.traffic import MAX_KEYS, Traffic
from adapter_store.records import AdapterState, StoreConfig
from adapter_store.sources.base import SourceChanged
from adapter_store.tiers.disk import DiskTier
from adapter_store.tiers.flights import Flights
from adapter_store.tiers.host import HostTier

_log = logging.getLogger(__name__)

WARM_SHARE = 0.8  # of the host budget; the rest is for what is asked for now
MIN_REQUESTS = 1.0  # what was asked for less is not worth a read
_MAX_LOOKED_AT = 1_000
_FORGET_HALF_LIVES = 20.0  # after so many a count is nothing


class Warm(NamedTuple):
    """A version that can be had without its source."""

    version: Version
    image: ImageKey
    num_bytes: int


class Warmth:
    """Traffic, and what is done about it. `wall` is a clock that restarts do not touch, in seconds."""

    def __init__(
        self,
        catalog: Catalog,
        host: HostTier,
        disk: DiskTier | None,
        index: Index,
        flights: Flights,
        resolver: Resolver,
        pins: Pins,
        config: StoreConfig,
        wall: Callable[[], float],
    ) -> None:
        self.traffic: Traffic[NameKey] = Traffic(config.traffic_half_life_s)
        self._catalog, self._host, self._disk, self._index = catalog, host, disk, index
        self._flights, self._resolver, self._pins = flights, resolver, pins
        self._config = config
        self._forget_s = _FORGET_HALF_LIVES * config.traffic_half_life_s
        self._wall = wall
        self._told: dict[tuple[NameKey, str], str] = {}  # (pinned name, spec) -> why it could not be loaded last

    def count(self, key: NameKey) -> None:
        """A request for `key` has come."""
        self.traffic.count(key, self._wall())

    def requests(self, key: NameKey) -> float:
        """The decayed count of `key`."""
        return self.traffic.value(key, self._wall())

    async def restore(self) -> None:
        """Reads back what was written down. Raises: IndexUnavailable."""
        self._pins.names.update(key for key in await self._index.pins() if self._config.has(key.name))
        for key, value, at in await self._index.traffic(MAX_KEYS // 2):
            if self._config.has(key.name):
                self.traffic.restore(key, value, at)

    async def write_down(self) -> None:
        """Writes traffic, uses, and what sources have said since the last time. Raises: IndexUnavailable."""
        checked = {key for key in self._resolver.take_checked() if self._catalog.checked_at(key) is not None}
        if not self._index.is_durable:
            return
        now = self._wall()
        gone = {key for key in checked if self._catalog.current(key) is None}
        await self._index.checked((key, self._resolver.checked_at(key)) for key in checked - gone)
        await self._index.forget(gone)
        await self._index.set_traffic(self.traffic.take_changed(), before=now - self._forget_s)
        if self._disk is not None:
            await self._disk.flush()

    async def warm_set(self, spec_digest: str, budget_bytes: int) -> tuple[Warm, ...]:
        """Pinned first, then by traffic: as many as fit of those that are on the host or on disk."""
        if self._disk is not None:
            await self._disk.has_stock()
        chosen: list[Warm] = []
        async for warm in self._warm(spec_digest):
            if warm.num_bytes <= budget_bytes:
                budget_bytes -= warm.num_bytes
                chosen.append(warm)
        return tuple(chosen)

    async def load(self, spec: Spec) -> None:
        """Brings the warm set to the host, as described above. What goes wrong is told to the one who acquires it."""
        if self._disk is not None:
            await self._disk.has_stock()
        for key in sorted(self._pins.names):
            try:
                version = await self._resolver.resolve(key.name, key.source)
                await self._load(Warm(version, ImageKey(version.digest, spec.digest), 0), spec)
            except (StoreError, SourceChanged) as error:
                if self._told.get((key, spec.digest)) != str(error):  # once, not with every look
                    _log.warning("pinned adapter %s cannot be loaded now: %s", key.name, error)
                self._told[key, spec.digest] = str(error)
            else:
                self._told.pop((key, spec.digest), None)
        if self._disk is None:
            return
        async for warm in self._warm(spec.digest):
            if self._host.get(warm.image) is not None or self.requests(warm.version.key) < MIN_REQUESTS:
                continue
            await self._flights.quiet()
            if self._host.used_bytes + warm.num_bytes > WARM_SHARE * self._host.budget_bytes:
                return
            try:
                await self._load(warm, spec)
            except (StoreError, SourceChanged) as error:
                _log.info("adapter %s was not brought back from disk: %s", warm.version.key.name, error)

    async def _load(self, warm: Warm, spec: Spec) -> None:
        is_known = self._catalog.version(warm.version.digest) is not None  # it may have been replaced meanwhile
        if is_known and self._catalog.state(warm.image) is AdapterState.COLD:
            await self._flights.image(warm.image, warm.version, spec)

    async def _warm(self, spec_digest: str) -> AsyncIterator[Warm]:
        pinned = sorted(self._pins.names)
        wanted = self.traffic.top(_MAX_LOOKED_AT, self._wall())
        for key in (*pinned, *(key for key in wanted if key not in self._pins.names)):
            version = await self._resolver.recall(key)
            if version is None:
                continue
            image = ImageKey(version.digest, spec_digest)
            there = self._host.get(image) or (self._disk and self._disk.row(image))
            if there:
                yield Warm(version, image, there.num_bytes)
