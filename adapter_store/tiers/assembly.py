"""The parts of a store put together: what it knows, its tiers, and how they begin and end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from adapter_store.errors import StoreConfigInvalid
from adapter_store.fetch.fetcher import Fetcher
from adapter_store.names.catalog import Catalog, ImageKey, NameKey
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.index import CATALOG, FILE_NAME, Index
from adapter_store.names.mirror import Follower, Mirror, Shelf
from adapter_store.names.pins import Pins
from adapter_store.names.registered import CatalogSource
from adapter_store.names.registry import Registry
from adapter_store.names.resolver import Resolver
from adapter_store.names.sealing import from_environment
from adapter_store.records import StoreConfig
from adapter_store.sources.base import Source
from adapter_store.tiers.blobs import BlobStore, ImageFiles
from adapter_store.tiers.disk import DiskTier
from adapter_store.tiers.finder import Finder
from adapter_store.tiers.flights import Flights
from adapter_store.tiers.host import HostTier
from adapter_store.tiers.objects import FolderLock
from adapter_store.tiers.warmth import Warmth

_log = logging.getLogger(__name__)

LOCK_NAME = "lock"


class Tiers:
    """Opened by the constructor; `begin` reads what was written down, `close` gives everything back.

    Raises: StoreConfigInvalid.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        blobs: BlobStore,
        config: StoreConfig,
        clock: Callable[[], float],
        wall: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        jitter: Callable[[], float],
        shelf: Shelf | None = None,
        owner: str = "",
    ) -> None:
        if any(source.name == CATALOG for source in sources):
            raise StoreConfigInvalid("sources", f"the name {CATALOG!r} is taken by registered adapters; choose another")
        self._lock: FolderLock | None = None
        folder = None if config.disk_path is None else _open_folder(config.disk_path, config.shard)
        if folder is not None:
            self._lock = FolderLock(folder / LOCK_NAME, owner)
            _try_lock(self._lock)
        may_replace = self._lock is None or self._lock.is_held
        path = None if folder is None else folder / FILE_NAME
        self.index = Index(
            path,
            may_replace=may_replace,
            may_open=self._lock is None or not self._lock.is_anothers,
            niceness=config.niceness,
            sealer=from_environment(config.url_key_env, os.environ),
        )
        leads = config.shard == 0
        self.mirror: Mirror | Follower = Mirror(self.index, shelf) if leads else Follower(self.index, shelf, config)
        self.catalog = Catalog()
        self.pins = Pins(config.host_bytes)
        self._files = ImageFiles(folder, blobs.node)
        if self._lock is not None and self._lock.is_held:
            self._files.sweep()
        self.host = HostTier(self.catalog, blobs, self._files, config.host_bytes, self._stays, self._is_awaited, clock)
        self.disk: DiskTier | None = None
        if folder is not None and self._lock is not None:
            self.disk = DiskTier(
                folder, config.disk_bytes, self.index, self._lock, self._is_held, niceness=config.niceness, clock=clock
            )
        every_source = (CatalogSource(self.index, sources), *sources)
        self.resolver = Resolver(self.catalog, every_source, self.index, config, clock, self._replaced, wall)
        self.registry = Registry(self.index, self.resolver, self.mirror)
        self._fetcher = Fetcher(config, clock, sleep, jitter)
        self.flights = Flights(
            self.catalog,
            self.host,
            self.disk,
            self.index,
            self._fetcher,
            self.resolver,
            self.pins,
            config,
            clock,
        )
        self.finder = Finder(self.catalog, self.resolver, self.flights, config)
        self.warmth = Warmth(
            self.catalog, self.host, self.disk, self.index, self.flights, self.resolver, self.pins, config, wall
        )

    @property
    def degraded(self) -> tuple[str, ...]:
        """The tiers that are out of order now."""
        is_disk = self.disk is not None and self.disk.is_degraded
        return ("disk",) * is_disk + ("host",) * self.host.is_degraded + ("mirror",) * self.mirror.is_behind

    async def begin(self) -> None:
        """Reads pins and traffic; the disk tier takes stock in the background."""
        try:
            await self.index.reseal()
            await self.mirror.begin()
            await self.warmth.restore()
        except IndexUnavailable as error:
            _log.error("pins and traffic are not known: %s", error)
        if self.disk is not None:
            self.disk.start()

    async def keep_house(self) -> None:
        """Now and then: writes down what is worth it, and tries to have what could not be had."""
        try:
            if self.disk is not None:
                await self.disk.retry()
            await self.mirror.retry()
            await self.warmth.write_down()
        except IndexUnavailable as error:
            _log.debug("traffic is not written down now: %s", error)

    async def close(self) -> None:
        """Ends everything under way, writes down what is worth it and gives the folder back."""
        await self.flights.close()
        self._fetcher.close()
        try:
            await self.warmth.write_down()
        except IndexUnavailable as error:
            _log.warning("traffic is not remembered: %s", error)
        if self.disk is not None:
            await self.disk.close()
        await self.resolver.close()
        await asyncio.to_thread(self.index.database.close)
        self._files.close()
        if self._lock is not None:
            self._lock.release()

    def check_invariants(self) -> None:
        """Raises: AssertionError when the parts contradict each other."""
        self.catalog.check_invariants()
        self.host.check_invariants()
        if self.disk is not None:
            self.disk.check_invariants()

    def _is_held(self, key: ImageKey) -> bool:
        return self.catalog.is_leased(key) or self.pins.keeps(key)

    def _is_awaited(self, key: ImageKey) -> bool:
        return self.flights.is_awaited(key)

    def _stays(self, key: ImageKey) -> bool:
        return self._is_held(key) or self._is_awaited(key) or self.flights.is_loading(key)

    def _replaced(self, key: NameKey, version: str) -> None:
        """`key` no longer stands for `version`."""
        self.pins.drop_version(version)
        self.host.evict(self.catalog.unwanted(version))


def _open_folder(path: str, shard: int) -> Path:
    folder = Path(path) / f"shard-{shard}" if shard else Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreConfigInvalid("disk_path", f"{path!r} is no folder and cannot become one: {error}") from error
    return folder


def _try_lock(lock: FolderLock) -> None:
    try:
        if not lock.try_acquire():
            _log.error(
                "the folder %s is in use by %s: this store goes without a disk tier until it is free%s; "
                "give each application a disk_path of its own",
                lock.path.parent,
                lock.holder(),
                ", and nothing can be registered or pinned" if lock.is_anothers else "",
            )
    except OSError as error:
        _log.error("the folder %s cannot be used, this store goes without a disk tier: %s", lock.path.parent, error)
