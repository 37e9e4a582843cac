"""What the store tells of its adapters and of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from contextlib import suppress

from adapter_store.errors import SourceUnavailable
from adapter_store.names.catalog import ImageKey, NameKey, Version
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.images import ImageRow
from adapter_store.records import AdapterPage, AdapterRecord, AdapterState, StoreConfig, StoreStatus
from adapter_store.sources.base import SourcePage
from adapter_store.tiers.assembly import Tiers
from adapter_store.tiers.host import Held
from adapter_store.tiers.specs import Specs

LIST_TIMEOUT_S = 10.0  # for one page of one source: beside others it is left out then
_STATE_ORDER = (
    AdapterState.HOST,
    AdapterState.FETCHING,
    AdapterState.DISK,
    AdapterState.FAILED,
    AdapterState.COLD,
)


class Reports:
    """Reads, changes nothing. `specs` are those that somebody serves at the time."""

    def __init__(self, tiers: Tiers, specs: Specs, config: StoreConfig, clock: Callable[[], float]) -> None:
        self._tiers, self._specs, self._config, self._clock = tiers, specs, config, clock
        self._started_at = clock()
        self._num_registered = 0

    def record(self, version: Version) -> AdapterRecord:
        """What is known of a version. Of several images, the one that is nearest counts."""
        tiers = self._tiers
        states = dict(tiers.catalog.states_of(version.digest))
        for spec_digest in self._specs.digests():
            key = ImageKey(version.digest, spec_digest)
            if tiers.disk is not None and tiers.disk.row(key) and key not in states:
                states[key] = AdapterState.DISK
        nearest = min(states, key=lambda key: _STATE_ORDER.index(states[key]), default=None)
        state = AdapterState.COLD if nearest is None else states[nearest]
        image: Held | ImageRow | None = None
        if nearest is not None:
            image = tiers.host.get(nearest) or (tiers.disk.row(nearest) if tiers.disk is not None else None)
        failure = tiers.catalog.failure(nearest, self._clock()) if nearest is not None else None
        return AdapterRecord(
            name=version.key.name,
            source=version.key.source,
            version=version.digest,
            state=state,
            rank=image.rank if image else None,
            num_bytes=image.num_bytes if image else None,
            reason=str(failure) if failure else None,
            notices=_notices(image),
            is_pinned=version.key in tiers.pins.names,
            requests=tiers.warmth.requests(version.key),
        )

    def named(self, key: NameKey) -> AdapterRecord:
        """What is known of a name, without asking its source."""
        digest = self._tiers.catalog.current(key)
        version = None if digest is None else self._tiers.catalog.version(digest)
        if version is not None:
            return self.record(version)
        is_pinned, requests = key in self._tiers.pins.names, self._tiers.warmth.requests(key)
        return AdapterRecord(name=key.name, source=key.source, version=None, is_pinned=is_pinned, requests=requests)

    async def page(self, cursor: str | None, limit: int) -> AdapterPage:
        """See `AdapterStore.list_adapters`."""
        sources = self._tiers.resolver.source_names
        index, _, inner = (cursor or "0:").partition(":")
        position = int(index) if index in map(str, range(len(sources))) else len(sources)
        away: dict[str, SourceUnavailable] = {}
        num_asked = 0
        while position < len(sources):
            name, num_asked = sources[position], num_asked + 1
            try:
                page = await self._list(name, inner or None, limit)
            except SourceUnavailable as error:
                away[name] = error
                page = SourcePage(names=(), next_cursor=None)
            records = tuple(self.named(NameKey(name, found)) for found in page.names)
            if page.next_cursor is not None:
                return self._page(records, f"{position}:{page.next_cursor}", away)
            position, inner = position + 1, ""
            if records:
                return self._page(records, f"{position}:" if position < len(sources) else None, away)
        if away and len(away) == num_asked == len(sources):
            raise next(iter(away.values()))
        return self._page((), None, away)

    @staticmethod
    def _page(records: tuple[AdapterRecord, ...], cursor: str | None, away: Iterable[str]) -> AdapterPage:
        return AdapterPage(records=records, next_cursor=cursor, unavailable=tuple(away))

    async def _list(self, source: str, cursor: str | None, limit: int) -> SourcePage:
        """Raises: SourceUnavailable, also when it says nothing for long."""
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                return await self._tiers.resolver.source(source).list(cursor, max(1, limit))
        except TimeoutError as error:
            raise SourceUnavailable(source, f"no list within {LIST_TIMEOUT_S:g} s") from error

    async def status(self) -> StoreStatus:
        """See `AdapterStore.status`."""
        host, disk, catalog = self._tiers.host, self._tiers.disk, self._tiers.catalog
        counts = self._tiers.flights.counts
        host.expire()
        with suppress(IndexUnavailable):  # then it is the number that was known last; `degraded` says the rest
            self._num_registered = await self._tiers.index.num_registered()
        return StoreStatus(
            host_bytes=self._config.host_bytes,
            host_used_bytes=host.used_bytes,
            host_leased_bytes=host.pinned_bytes,
            num_images=len(host),
            num_leases=catalog.num_leases,
            num_fetching=len(self._tiers.flights),
            num_failed=catalog.count(AdapterState.FAILED),
            num_specs=len(self._specs.live()),
            sources=self._tiers.resolver.source_names,
            hits=counts["hits"],
            misses=counts["misses"],
            fetches=counts["fetches"],
            fetched_bytes=counts["fetched_bytes"],
            evictions=host.evictions,
            rejections=counts["rejections"],
            uptime_s=self._clock() - self._started_at,
            disk_bytes=0 if disk is None else self._config.disk_bytes,
            disk_used_bytes=0 if disk is None else disk.used_bytes,
            num_disk_images=0 if disk is None else disk.num_images,
            disk_hits=0 if disk is None else disk.hits,
            disk_evictions=0 if disk is None else disk.evictions,
            num_registered=self._num_registered,
            num_pinned=len(self._tiers.pins.names),
            degraded=self._tiers.degraded,
        )


def _notices(image: Held | ImageRow | None) -> tuple[str, ...]:
    if isinstance(image, Held):
        return tuple(image.manifest.get("notices", ()))
    return () if image is None else image.notices
