"""What people have written down of names: registrations and pins. The index keeps them, the resolver hears of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from adapter_store.errors import SourceUnavailable
from adapter_store.names.catalog import NameKey
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.index import CATALOG, Index
from adapter_store.names.mirror import Follower, Mirror
from adapter_store.names.registered import check_rows, origin
from adapter_store.names.resolver import Resolver
from adapter_store.records import Registration

T = TypeVar("T")


class Registry:
    """All methods raise SourceUnavailable (of "catalog") when the index cannot be written now."""

    def __init__(self, index: Index, resolver: Resolver, mirror: Mirror | Follower) -> None:
        self._index, self._resolver, self._mirror = index, resolver, mirror

    async def register(self, rows: tuple[Registration, ...]) -> None:
        """See `AdapterStore.register`."""
        sources = {name: source for name, source in self._resolver.sources.items() if name != CATALOG}
        await asyncio.to_thread(check_rows, rows, sources)
        await self._written(self._index.register(rows))
        await self._written(self._mirror.changed(row.name for row in rows))
        for row in rows:
            await self._resolver.registered(NameKey(CATALOG, row.name), origin(row))

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `AdapterStore.unregister`."""
        gone = await self._written(self._index.unregister(names))
        await self._written(self._mirror.changed(gone))
        for name in gone:
            await self._resolver.gone(NameKey(CATALOG, name))
        return gone

    async def set_pin(self, key: NameKey, is_pinned: bool) -> None:
        """Pins or unpins a name, over restarts."""
        await self._written(self._index.set_pin(key, is_pinned))
        await self._written(self._mirror.changed(()))

    async def note_pin(self, name: str, source: str | None, is_pinned: bool) -> None:
        """Writes down the pin of another shard's `name`; `source` None unpins it wherever it lies."""
        keys = (
            [NameKey(source, name)]
            if source is not None
            else [key for key in await self._written(self._index.pins()) if key.name == name]
        )
        for key in keys:
            await self.set_pin(key, is_pinned)

    async def forget_digests(self, key: NameKey) -> None:
        """What the files of `key` were when they were read last does not count any more."""
        await self._written(self._index.forget_digests(key))

    async def _written(self, work: Awaitable[T]) -> T:
        try:
            return await work
        except IndexUnavailable as error:
            raise SourceUnavailable(CATALOG, str(error)) from error
