"""The host tier: packed images in shared memory, within a budget of bytes; in files when that memory is full."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import StoreFull
from adapter_store.names.catalog import Catalog, ImageKey
from adapter_store.records import AdapterState
from adapter_store.tiers.blobs import BlobsFull, BlobStore, FileImage, ImageFiles, map_image, read_part
from adapter_store.tiers.value_cache import ValueCache

_log = logging.getLogger(__name__)

QUIET_S = 60.0
LOOK_S = 1.0  # an image that was there is looked at again after this; whoever finds it lost meanwhile asks again


@dataclass(frozen=True, slots=True)
class Held:
    """An image on the host."""

    handle: Any
    manifest: dict[str, Any]
    num_bytes: int
    rank: int


class HostTier:
    """What is held, and the catalog's states of it, which change together.

    `is_pinned` says of an image that it stays: leased, pinned, or about to be leased.
    """

    def __init__(
        self,
        catalog: Catalog,
        blobs: BlobStore,
        files: ImageFiles,
        budget_bytes: int,
        is_pinned: Callable[[ImageKey], bool],
        is_awaited: Callable[[ImageKey], bool],
        clock: Callable[[], float],
    ) -> None:
        self.evictions = 0
        self._catalog, self._blobs, self._files = catalog, blobs, files
        self._cache: ValueCache[ImageKey] = ValueCache(budget_bytes, is_pinned)
        self._is_pinned, self._is_awaited = is_pinned, is_awaited
        self._clock = clock
        self._told_at: dict[str, float] = {}
        self._held: dict[ImageKey, Held] = {}
        self._in_files: set[ImageKey] = set()
        self._seen_at: dict[ImageKey, float] = {}  # when an image was there

    def __len__(self) -> int:
        return len(self._held)

    @property
    def used_bytes(self) -> int:
        """Of the images that are held or on their way into memory."""
        return self._cache.used_bytes

    @property
    def budget_bytes(self) -> int:
        """What it may hold."""
        return self._cache.budget_bytes

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be freed now."""
        return self._cache.pinned_bytes

    @property
    def is_degraded(self) -> bool:
        """Whether shared memory was full, so that images lie in files."""
        return bool(self._in_files)

    def get(self, key: ImageKey) -> Held | None:
        """The image, if it is held; it may have been lost."""
        return self._held.get(key)

    async def find(self, key: ImageKey) -> Held | None:
        """The image, if it is held and can still be had. What is returned is there until the next await."""
        while (held := self._held.get(key)) is not None:
            if self._clock() - self._seen_at[key] < LOOK_S:
                return held
            there = await self._has(held.handle)
            if self._held.get(key) is not held:
                continue  # somebody else found it lost meanwhile
            if there:
                self._seen_at[key] = self._clock()
                return held
            _log.warning("version %s: its image was lost, it is loaded again", key.version[:12])
            self._lose(key)
        return None

    async def keep(
        self, key: ImageKey, data: NDArray[np.uint8], manifest: dict[str, Any], rank: int, cost_s: float
    ) -> Held:
        """Takes in an image that took `cost_s` to load. Raises: StoreFull."""
        self.expire()
        self._gone(self._cache.add(key, data.nbytes, cost_s))
        try:
            handle = await self._put(data)
        except BaseException:
            self._cache.drop(key)
            raise
        held = Held(handle, manifest, data.nbytes, rank)
        self._catalog.fetched(key)
        self._held[key], self._seen_at[key] = held, self._clock()
        if isinstance(handle, FileImage):
            self._in_files.add(key)
        return held

    async def view(self, key: ImageKey) -> NDArray[np.uint8] | None:
        """The bytes of an image, if it is held."""
        held = self._held.get(key)
        if held is None:
            return None
        try:
            return map_image(held.handle) if isinstance(held.handle, FileImage) else await self._blobs.view(held.handle)
        except FileNotFoundError:
            return None

    async def part(self, key: ImageKey, start: int, num_bytes: int) -> bytes | None:
        """Bytes of an image that lies in a file; None: it does not, or is not there any more."""
        held = self._held.get(key)
        if held is None or not isinstance(held.handle, FileImage):
            return None
        try:
            return await asyncio.to_thread(read_part, held.handle, start, num_bytes)
        except OSError:
            return None

    def touch(self, key: ImageKey) -> None:
        """The image is used now."""
        self._cache.touch(key)

    def recost(self, key: ImageKey, cost_s: float) -> None:
        """From now on it takes `cost_s` to load the image again."""
        if key in self._held:
            self._cache.recost(key, cost_s)

    def expire(self) -> None:
        """Ends the leases whose time is over."""
        self.evict(self._catalog.expire(self._clock()))

    def evict(self, keys: Iterable[ImageKey]) -> None:
        """Lets images go, but for those somebody is about to lease: the budget will find them later."""
        for key in keys:
            if not self._is_awaited(key):
                self._cache.drop(key)
                self._gone((key,))

    def check_invariants(self) -> None:
        """Raises: AssertionError when the parts contradict each other."""
        self._cache.check_invariants()
        on_host = {key for key in self._held if self._catalog.state(key) is AdapterState.HOST}
        assert on_host == set(self._held), "an image is held that the catalog does not know on the host"
        assert self._catalog.count(AdapterState.HOST) == len(self._held), "the catalog knows an image that is not held"
        assert set(self._seen_at) == set(self._held), "it is not known when an image was there"
        assert set(self._held) <= set(self._cache.keys()), "an image is held outside the budget"

    async def _put(self, data: NDArray[np.uint8]) -> Any:
        for _ in range(3):
            try:
                return await self._blobs.put(data)
            except BlobsFull as error:
                self._tell("%s; images that nobody leases make room", error)
                if not self._free(2 * data.nbytes):
                    break
        try:
            handle = await asyncio.to_thread(self._files.put, data)
        except OSError as error:
            self._tell("an image fits neither into shared memory nor into a file: %s", error)
            raise StoreFull(data.nbytes, self.pinned_bytes, self.budget_bytes) from error
        self._tell("shared memory is full of leased images: images are served from files, the first is %s", handle.path)
        return handle

    def _tell(self, what: str, detail: object) -> None:
        """Once, and again when there was no such trouble for a while."""
        now = self._clock()
        if now - self._told_at.get(what, float("-inf")) >= QUIET_S:
            _log.error(what, detail)
        self._told_at[what] = now

    def _free(self, num_bytes: int) -> bool:
        """Drops what is worth least, `num_bytes` of it if there is so much; whether there was anything."""
        freed = 0
        for key in tuple(self._cache.keys()):
            if freed < num_bytes and key in self._held and not self._is_pinned(key):
                freed += self._cache.size_of(key)
                self.evict((key,))
        return freed > 0

    async def _has(self, handle: Any) -> bool:
        return os.path.exists(handle.path) if isinstance(handle, FileImage) else await self._blobs.has(handle)

    def _gone(self, keys: Iterable[ImageKey]) -> None:
        for key in keys:
            self._catalog.evict(key)
            self._let_go(key)
            self.evictions += 1

    def _lose(self, key: ImageKey) -> None:
        self._cache.drop(key)
        self._catalog.lose(key)
        held = self._held.pop(key)
        del self._seen_at[key]
        self._in_files.discard(key)
        if isinstance(held.handle, FileImage):
            self._files.drop(held.handle)

    def _let_go(self, key: ImageKey) -> None:
        handle = self._held.pop(key).handle
        del self._seen_at[key]
        self._in_files.discard(key)
        if isinstance(handle, FileImage):
            self._files.drop(handle)
        else:
            self._blobs.drop(handle)
