"""Which version a name stands for now: asks the sources in their order, and no more often than it must."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from adapter_store.asking import ask
from adapter_store.catalog import Catalog, NameKey, Version
from adapter_store.errors import AdapterNotFound, SourceUnavailable, SourceUnknown
from adapter_store.records import StoreConfig, check_name
from adapter_store.sources.base import Source

_log = logging.getLogger(__name__)


class Resolver:
    """Names -> versions. Simultaneous questions about a name are asked once; an answer counts for `refresh_s`.

    `on_replaced` is told of the version that a name has just left.
    """

    def __init__(
        self,
        catalog: Catalog,
        sources: Sequence[Source],
        config: StoreConfig,
        clock: Callable[[], float],
        on_replaced: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._sources = {source.name: source for source in sources}
        self._config = config
        self._clock = clock
        self._on_replaced = on_replaced
        self._asking: dict[NameKey, asyncio.Task[str | None]] = {}

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources, in the order in which they are asked."""
        return tuple(self._sources)

    def source(self, name: str) -> Source:
        """Raises: SourceUnknown."""
        if name not in self._sources:
            raise SourceUnknown(name, self.source_names)
        return self._sources[name]

    async def resolve(self, name: str, source: str | None = None, *, force: bool = False) -> Version:
        """The version of `name` in `source`, or in the first source that has it; `force` asks whatever is known.

        A source that does not answer ends the search: a later one might hold another adapter of the same name.
        Raises: AdapterNameInvalid, AdapterNotFound, SourceUnavailable, SourceUnknown.
        """
        check_name(name)
        wanted = self.source_names if source is None else (self.source(source).name,)
        for source_name in wanted:
            digest = await self._digest(NameKey(source_name, name), force)
            version = None if digest is None else self._catalog.version(digest)
            if version is not None:
                return version
        raise AdapterNotFound(name, wanted)

    async def close(self) -> None:
        """Ends the questions under way and the sources."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in self._sources.values():
            await source.close()

    async def _digest(self, key: NameKey, force: bool) -> str | None:
        if not force and self._is_fresh(key):
            return self._catalog.current(key)
        running = self._asking.get(key)
        if running is not None and force:
            await asyncio.wait([running])  # it may have looked before the change that the caller knows of
            running = None
        if running is None:
            running = asyncio.create_task(self._ask(key))
            self._asking[key] = running
            running.add_done_callback(lambda task: self._asked(key, task))
        return await asyncio.shield(running)  # a cancelled waiter cancels nobody else

    def _asked(self, key: NameKey, task: asyncio.Task[str | None]) -> None:
        if self._asking.get(key) is task:
            del self._asking[key]
        if not task.cancelled():
            task.exception()  # every waiter may have left; then nobody else looks at it

    def _is_fresh(self, key: NameKey) -> bool:
        checked_at = self._catalog.checked_at(key)
        if checked_at is None:
            return False
        missing = self._catalog.current(key) is None
        return self._clock() - checked_at < (self._config.missing_ttl_s if missing else self._config.refresh_s)

    async def _ask(self, key: NameKey) -> str | None:
        before = self._catalog.current(key)
        try:
            listing = await ask(self._sources[key.source], key.name, self._config.stat_timeout_s)
        except SourceUnavailable as error:
            if before is None:
                raise
            _log.warning("adapter %s: its source cannot be asked, its known version stays: %s", key.name, error)
            pause_s = min(self._config.unavailable_ttl_s, self._config.refresh_s)
            self._catalog.postpone(key, self._clock() - self._config.refresh_s + pause_s)
            return before
        digest = self._catalog.observe(key, listing, self._clock())
        if before is not None and before != digest:
            _log.info("adapter %s: version %s -> %s", key.name, before[:12], digest and digest[:12])
            self._on_replaced(before)
        return digest
