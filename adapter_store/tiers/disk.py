"""The disk tier: packed images in files named by their content, within a budget of bytes, over restarts.

One process at a time writes to a folder; another store with the same `disk_path` goes without this tier until the
folder is free. A disk that fails costs time, never an answer: the tier is left alone for a while and tried again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import StoreFull
from adapter_store.names.catalog import ImageKey
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.images import ImageRow
from adapter_store.names.index import Index, RowBroken
from adapter_store.sources.threads import nice_pool
from adapter_store.tiers.objects import FolderLock, ObjectBroken, ObjectFiles
from adapter_store.tiers.value_cache import ValueCache

_log = logging.getLogger(__name__)

RETRY_S = 30.0
_PAGE_ROWS = 500

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DiskImage:
    """An image as read back, checked, and how long that took."""

    data: NDArray[np.uint8]
    manifest: dict[str, Any]
    rank: int
    read_s: float


class DiskTier:
    """Images by (version, spec digest); those with the same bytes share a file.

    `is_held` says of an image that it is leased or pinned: it stays. `start` takes stock in the background; what is
    there is read from the first moment, written is after that.
    """

    def __init__(
        self,
        folder: Path,
        budget_bytes: int,
        index: Index,
        lock: FolderLock,
        is_held: Callable[[ImageKey], bool],
        *,
        niceness: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.hits = self.evictions = self.broken = 0
        self._index, self._lock, self._clock = index, lock, clock
        self._files = ObjectFiles(folder / "objects")
        self._pool = nice_pool(2, "adapters-disk", niceness)
        self._rows: dict[ImageKey, ImageRow] = {}
        self._keys: dict[str, set[ImageKey]] = {}  # by object
        self._cache: ValueCache[str] = ValueCache(
            budget_bytes, lambda digest: any(map(is_held, self._keys.get(digest, ())))
        )
        self._has_stock = False
        self._off_until = float("-inf")
        self._is_off = False
        self._seconds_per_byte = 0.0
        self._stocktaking: asyncio.Task[None] | None = None

    @property
    def used_bytes(self) -> int:
        """Of the files."""
        return self._cache.used_bytes

    @property
    def num_images(self) -> int:
        """How many are known to be there."""
        return len(self._rows)

    @property
    def is_degraded(self) -> bool:
        """Whether the tier is out of order, or another process has it."""
        return self._is_off or not self._lock.is_held or not self._index.database.is_writable

    def row(self, key: ImageKey) -> ImageRow | None:
        """What is known of an image, as soon as stock was taken."""
        return self._rows.get(key)

    def cost_s(self, num_bytes: int) -> float | None:
        """What it takes to read so much, by what was measured so far; None: nothing was."""
        return num_bytes * self._seconds_per_byte or None

    async def has_stock(self) -> bool:
        """Waits for the stocktaking under way; whether it is known what is there."""
        if self._stocktaking is not None:
            await asyncio.wait([self._stocktaking])
        return self._has_stock

    def start(self) -> None:
        """Takes stock in the background, if the folder is free and that was not done before. For one event loop."""
        if self._stocktaking is None and self._lock.is_held:
            self._stocktaking = asyncio.get_running_loop().create_task(self._take_stock())

    async def retry(self) -> None:
        """Now and then: tries to have what could not be had."""
        if not self._lock.is_held:
            try:
                got = await self._in_thread(self._lock.try_acquire)
            except OSError as error:
                self._switch_off(error)
                return
            if got:
                _log.info("disk tier %s: the folder is free, it is used from now on", self.folder)
        if self._lock.is_held and await self._index.database.reopen(may_replace=True):
            self.start()

    async def get(self, key: ImageKey) -> DiskImage | None:
        """The image, or None: it is not there, was broken, or the disk does not work."""
        if not self._lock.is_held or self._is_resting():
            return None
        started_at = time.perf_counter()
        try:
            found = await self._index.image(key)
            if found is None:
                return None
            row, manifest = found
            data = await self._in_thread(self._files.read, row.object, row.num_bytes)
        except FileNotFoundError:
            await self.has_stock()
            await self._forget(row.object, key)
            return None
        except (ObjectBroken, RowBroken) as error:
            self.broken += 1
            _log.error("disk tier: an image of version %s is broken, it is deleted: %s", key.version[:12], error)
            await self.has_stock()  # which may have seen the row, and would take it for a good one afterwards
            known = self._rows.get(key) if isinstance(error, RowBroken) else row
            await self._forget(None if known is None else known.object, key)
            return None
        except (OSError, IndexUnavailable) as error:
            self._switch_off(error)
            return None
        self._works()
        read_s = time.perf_counter() - started_at
        self._measured(row.num_bytes, read_s)
        self.hits += 1
        if row.object in self._cache:
            self._cache.touch(row.object)
        return DiskImage(data, manifest, row.rank, read_s)

    async def put(
        self, key: ImageKey, data: NDArray[np.uint8], manifest: dict[str, Any], rank: int, cost_s: float
    ) -> None:
        """Writes an image that took `cost_s` to fetch; does nothing when there is no room or the disk does not work.

        One at a time.
        """
        if not self._lock.is_held or self._is_resting() or not await self.has_stock() or key in self._rows:
            return
        digest = await self._in_thread(lambda: hashlib.sha256(data.data).hexdigest())
        notices = tuple(manifest.get("notices", ()))
        row = ImageRow(
            key=key, object=digest, num_bytes=data.nbytes, rank=rank, cost_s=cost_s, uses=1, notices=notices
        )  # fmt: skip
        is_new = digest not in self._cache
        try:
            if is_new:
                victims = self._cache.add(digest, data.nbytes, cost_s)
                await self._delete(victims)
                started_at = time.perf_counter()
                await self._in_thread(self._files.write, digest, data)
                if not self._seconds_per_byte:  # until something is read, writing tells how fast the disk is
                    self._measured(data.nbytes, time.perf_counter() - started_at)
            if digest not in self._cache:
                return  # meanwhile a read of it, as it was before, found it broken
            self._enter(row)
            await self._index.add_image(row, manifest)
        except StoreFull:
            return  # everything there is leased or pinned
        except (OSError, IndexUnavailable) as error:
            self._switch_off(error)
            await self._undo(row, is_new)
        else:
            self._works()

    async def flush(self) -> None:
        """Writes down how often images were used."""
        used = []
        for key, row in self._rows.items():
            uses = self._cache.uses_of(row.object)
            if uses != row.uses:
                used.append((key, uses))
        for key, uses in used:
            self._rows[key] = replace(self._rows[key], uses=uses)
        await self._index.used(used)

    async def close(self) -> None:
        """Ends what is under way and gives the folder back."""
        if self._stocktaking is not None:
            self._stocktaking.cancel()
            await asyncio.gather(self._stocktaking, return_exceptions=True)
        await asyncio.to_thread(self._pool.shutdown)

    def check_invariants(self) -> None:
        """Raises: AssertionError when the parts contradict each other."""
        self._cache.check_invariants()
        assert {key for keys in self._keys.values() for key in keys} == set(self._rows), "images and files differ"
        assert all(row.object in self._cache for row in self._rows.values()), "an image without a file"

    # Stock

    async def _take_stock(self) -> None:
        """Rows without files and files without rows are dropped."""
        after = 0
        try:
            while page := await self._index.images(after, _PAGE_ROWS):
                after = page[-1][0]
                rows = [row for _, row in page]
                there = await self._in_thread(lambda rows=rows: [self._files.has(r.object, r.num_bytes) for r in rows])
                await self._index.drop_images(
                    row.key for row, is_there in zip(rows, there, strict=True) if not is_there
                )
                for row, is_there in zip(rows, there, strict=True):
                    if is_there and row.key not in self._rows:
                        await self._admit(row)
            await self._in_thread(self._files.sweep, self._cache.__contains__)
        except (OSError, IndexUnavailable) as error:
            self._switch_off(error)
            self._stocktaking = None  # `retry` begins again
        else:
            self._has_stock = True

    async def _admit(self, row: ImageRow) -> None:
        if row.object not in self._cache:
            try:
                await self._delete(self._cache.add(row.object, row.num_bytes, row.cost_s, row.uses))
            except StoreFull:  # the budget is smaller than it was
                await self._index.drop_images([row.key])
                return
        self._enter(row)

    # Inside

    def _enter(self, row: ImageRow) -> None:
        self._rows[row.key] = row
        self._keys.setdefault(row.object, set()).add(row.key)

    def _leave(self, digest: str) -> set[ImageKey]:
        keys = self._keys.pop(digest, set())
        for key in keys:
            del self._rows[key]
        return keys

    async def _delete(self, digests: tuple[str, ...]) -> None:
        """Objects that the cache has let go. Rows first: a row without a file is a miss, a file without one is lost."""
        self.evictions += len(digests)
        keys = [key for digest in digests for key in self._leave(digest)]
        if keys:
            await self._index.drop_images(keys)
        for digest in digests:
            await self._in_thread(self._files.delete, digest)

    async def _forget(self, digest: str | None, key: ImageKey) -> None:
        """An object that is not there, or not what it should be; None: the row does not even tell which."""
        keys = {key, *(() if digest is None else self._leave(digest))}
        if digest is not None and digest in self._cache:
            self._cache.drop(digest)
        try:
            await self._index.drop_images(keys)
            if digest is not None:
                await self._in_thread(self._files.delete, digest)
        except (OSError, IndexUnavailable) as error:
            self._switch_off(error)

    async def _undo(self, row: ImageRow, is_new: bool) -> None:
        self._keys.get(row.object, set()).discard(row.key)
        self._rows.pop(row.key, None)
        if not is_new or self._keys.get(row.object):
            return
        self._keys.pop(row.object, None)
        if row.object in self._cache:
            self._cache.drop(row.object)
        try:
            await self._in_thread(self._files.delete, row.object)
        except OSError as error:
            _log.debug("disk tier: a file that could not be written could not be deleted either: %s", error)

    def _is_resting(self) -> bool:
        return self._clock() < self._off_until

    def _switch_off(self, error: Exception) -> None:
        if not self._is_off:
            _log.error("disk tier %s does not work, it is tried again every %g s: %s", self.folder, RETRY_S, error)
        self._is_off = True
        self._off_until = self._clock() + RETRY_S

    def _works(self) -> None:
        if self._is_off:
            _log.info("disk tier %s works again", self.folder)
        self._is_off = False

    def _measured(self, num_bytes: int, seconds: float) -> None:
        rate = seconds / max(1, num_bytes)
        self._seconds_per_byte = 0.8 * self._seconds_per_byte + 0.2 * rate if self._seconds_per_byte else rate

    async def _in_thread(self, call: Callable[..., T], *values: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *values)
