"""Registrations and pins beside the index, where every node of the cluster can read them.

The index lies on the disk of one node, or in the memory of one process. A store that begins elsewhere takes what people
have written down from here. Names are spread over buckets, so that a change writes a few kilobytes; a number that rises
with each change says who is behind: the index that was left on a node, or this.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Protocol

from adapter_store.names.catalog import NameKey
from adapter_store.names.index import Index
from adapter_store.records import NUM_BUCKETS, StoreConfig, bucket_of

_log = logging.getLogger(__name__)

_PAGE_ROWS = 2_000


class Shelf(Protocol):
    """Small values that outlive the process and are there for all nodes. Both raise OSError."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, value: bytes) -> None: ...


class Mirror:
    """`shelf` None mirrors nothing. What cannot be mirrored now is so later, by `retry`: `is_behind` tells."""

    def __init__(self, index: Index, shelf: Shelf | None) -> None:
        self._index, self._shelf = index, shelf
        self._lock = asyncio.Lock()
        self.is_behind = False

    async def begin(self) -> None:
        """Makes index and shelf say the same: what the one with the higher number says. Raises: IndexUnavailable."""
        if self._shelf is None:
            return
        async with self._lock:
            try:
                theirs = int(await self._shelf.get("number") or 0)
                ours = await self._index.number()
                if theirs > ours:
                    await self._pull(theirs)
                elif ours > theirs:
                    await self._push()
            except OSError as error:
                self._fall_behind(error)

    async def changed(self, names: Iterable[str]) -> None:
        """These registrations and maybe pins have changed in the index, which has counted it."""
        if self._shelf is None:
            return
        async with self._lock:
            try:
                if self.is_behind:
                    await self._push()
                    return
                by_bucket: defaultdict[str, list[str]] = defaultdict(list)
                for name in names:
                    by_bucket[_bucket(name)].append(name)
                for bucket, of_it in by_bucket.items():
                    rows = {row[0]: row for row in await _read(self._shelf, bucket)}
                    for name in of_it:
                        rows.pop(name, None)
                    rows |= {row[0]: row for row in await self._index.rows(of_it)}
                    await self._shelf.put(bucket, _packed(list(rows.values())))
                await self._finish()
            except OSError as error:
                self._fall_behind(error)

    async def retry(self) -> None:
        """Now and then."""
        if self.is_behind:
            await self.begin()

    async def _pull(self, number: int) -> None:
        assert self._shelf is not None
        rows = [row for bucket in range(NUM_BUCKETS) for row in await _read(self._shelf, f"names-{bucket}")]
        pins = [NameKey(*key) for key in await _read(self._shelf, "pins")]
        await self._index.replace_all([tuple(row) for row in rows], pins, number)
        _log.warning("%d registered and %d pinned names were taken from the Ray head node", len(rows), len(pins))

    async def _push(self) -> None:
        assert self._shelf is not None
        by_bucket: defaultdict[str, list[Any]] = defaultdict(list)
        after: str | None = None
        while names := await self._index.list_registered(after, _PAGE_ROWS):
            for row in await self._index.rows(names):
                by_bucket[_bucket(row[0])].append(row)
            after = names[-1]
        for number in range(NUM_BUCKETS):
            await self._shelf.put(f"names-{number}", _packed(by_bucket[f"names-{number}"]))
        await self._finish()

    async def _finish(self) -> None:
        assert self._shelf is not None
        await self._shelf.put("pins", _packed([list(key) for key in await self._index.pins()]))
        await self._shelf.put("number", str(await self._index.number()).encode())
        self.is_behind = False

    def _fall_behind(self, error: OSError) -> None:
        if not self.is_behind:
            _log.error("what is registered and pinned is on the disk of this node only, until this works: %s", error)
        self.is_behind = True


class Follower:
    """The mirror of a shard that does not lead: it begins with what the leader has put on the shelf of its names, and
    hears of every change beside the leader. It writes nothing there.
    """

    def __init__(self, index: Index, shelf: Shelf | None, config: StoreConfig) -> None:
        self._index, self._shelf, self._config = index, shelf, config
        self._has_begun = False
        self.is_behind = False

    async def begin(self) -> None:
        """What the leader's last number says takes the place of what was here. Raises: IndexUnavailable."""
        if self._shelf is None or self._has_begun:
            return
        try:
            number = int(await self._shelf.get("number") or 0)
            if number:  # else the leader has put down nothing yet
                config, rows = self._config, []
                for bucket in range(config.shard, NUM_BUCKETS, config.num_shards):
                    rows += await _read(self._shelf, f"names-{bucket}")
                pins = [NameKey(*key) for key in await _read(self._shelf, "pins")]
                mine = [key for key in pins if config.has(key.name)]
                await self._index.replace_all([tuple(row) for row in rows], mine, number)
        except OSError as error:
            if not self.is_behind:
                _log.error("what is registered and pinned is as this shard knew it last, until this works: %s", error)
            self.is_behind = True
        else:
            self._has_begun, self.is_behind = True, False

    async def changed(self, names: Iterable[str]) -> None:
        """Nothing: the leader writes it down."""

    async def retry(self) -> None:
        """Now and then."""
        await self.begin()


async def _read(shelf: Shelf, bucket: str) -> list[list[Any]]:
    value = await shelf.get(bucket)
    rows: list[list[Any]] = json.loads(zlib.decompress(value)) if value else []
    return rows


def _bucket(name: str) -> str:
    return f"names-{bucket_of(name)}"


def _packed(rows: list[Any]) -> bytes:
    return zlib.compress(json.dumps(rows).encode())
