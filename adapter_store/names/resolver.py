"""Which version a name stands for now: asks the sources in their order, and no more often than it must."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from adapter_store.errors import AdapterNotFound, SourceUnavailable, SourceUnknown
from adapter_store.names.asking import ask_in_turn
from adapter_store.names.catalog import Catalog, NameKey, Version
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.desk import Desk, Urgency
from adapter_store.names.index import CATALOG, Index, Known
from adapter_store.names.registered import CatalogSource
from adapter_store.records import StoreConfig, check_name
from adapter_store.sources.base import Source

_log = logging.getLogger(__name__)
MAX_QUESTIONS = 4096  # under way; with more, names that are only expected are passed over


class Resolver:
    """Names -> versions. Simultaneous questions about a name are asked once; an answer counts for `refresh_s`.

    What the index remembers of a name counts as an answer that was given when it was written down, so that a store that
    was restarted goes on while a source is down. `on_replaced` is told of the version that a name has just left.
    """

    def __init__(
        self,
        catalog: Catalog,
        sources: Sequence[Source],
        index: Index,
        config: StoreConfig,
        clock: Callable[[], float],
        on_replaced: Callable[[NameKey, str], None],
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._catalog = catalog
        self._sources = {source.name: source for source in sources}
        self._index = index
        self._config = config
        self._clock, self._wall = clock, wall
        self._on_replaced = on_replaced
        self._desks = {name: Desk(name) for name in self._sources}
        self._asking: dict[NameKey, asyncio.Task[str | None]] = {}
        self._down: set[str] = set()  # sources of which the log says so
        self._checked: set[NameKey] = set()  # since the index was told last

    @property
    def sources(self) -> dict[str, Source]:
        """By name, in the order in which they are asked."""
        return self._sources

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names of the sources, in the order in which they are asked."""
        return tuple(self._sources)

    def source(self, name: str) -> Source:
        """Raises: SourceUnknown."""
        if name not in self._sources:
            raise SourceUnknown(name, self.source_names)
        return self._sources[name]

    async def resolve(
        self, name: str, source: str | None = None, *, force: bool = False, is_awaited: bool = True
    ) -> Version:
        """The version of `name` in `source`, or in the first source that has it; `force` asks whatever is known.

        Where nobody waits for the answer, it gives way to others (`desk.py`).

        A source that does not answer ends the search, as a later one might hold another adapter of the same name;
        unless it said before that it has none, and a later one is known to have one.
        Raises: AdapterNameInvalid, AdapterNotFound, SourceUnavailable, SourceUnknown.
        """
        check_name(name)
        wanted = self.source_names if source is None else (self.source(source).name,)
        keys = [NameKey(source_name, name) for source_name in wanted]
        down: SourceUnavailable | None = None
        for key in keys:
            if down is not None and self._catalog.current(key) is None:
                continue
            try:
                # Of a name that one source has, the others are asked no more often than that one.
                is_known = any(map(self._catalog.current, keys)) and not self._catalog.is_final(key)
                is_fresh = not force and self._is_fresh(key, is_known)
                digest = self._catalog.current(key) if is_fresh else await self._answer(key, force, is_awaited)
            except SourceUnavailable as error:
                if self._catalog.checked_at(key) is None:
                    raise
                down = down or error
                continue
            version = None if digest is None else self._catalog.version(digest)
            if version is not None:
                return version
            if self._catalog.is_final(key):
                raise AdapterNotFound(name, (key.source,))
        if down is not None:
            raise down
        raise AdapterNotFound(name, wanted)

    async def recall(self, key: NameKey) -> Version | None:
        """What the index remembers of `key`, if nothing is known of it; the source is asked when its time is over."""
        if self._catalog.checked_at(key) is None:
            await self._remembered(key)
        digest = self._catalog.current(key)
        return None if digest is None else self._catalog.version(digest)

    def checked_at(self, key: NameKey) -> float:
        """When the source last spoke of `key`, by the clock on the wall."""
        checked_at = self._catalog.checked_at(key)
        return 0.0 if checked_at is None else self._wall() - (self._clock() - checked_at)

    async def registered(self, key: NameKey, origin: str) -> None:
        """`key` was registered, at `origin`: its source is asked next time, and what came from elsewhere is gone."""
        await self._asked_before(key)
        version = self._catalog.version(self._catalog.current(key) or "")
        if version is not None and version.listing.origin == origin:
            self._catalog.forget_name(key)
        else:
            await self.gone(key)
            self._catalog.drop_name(key)

    async def gone(self, key: NameKey) -> None:
        """`key` is not registered any more."""
        await self._asked_before(key)
        before = self._catalog.current(key)
        if self._catalog.checked_at(key) is not None:
            self._catalog.observe(key, None, self._clock())
        if before is not None:
            self._on_replaced(key, before)

    async def _asked_before(self, key: NameKey) -> None:
        """Lets a question under way end: it may have looked before the change that the caller knows of."""
        while (running := self._asking.get(key)) is not None:
            await asyncio.wait([running])
            await asyncio.sleep(0)  # what is called when it ends has its turn

    def take_checked(self) -> set[NameKey]:
        """The names of which a source has spoken since the last call."""
        checked, self._checked = self._checked, set()
        return checked

    async def close(self) -> None:
        """Ends the questions under way and the sources."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for source in self._sources.values():
            await source.close()

    async def _answer(self, key: NameKey, force: bool, is_awaited: bool) -> str | None:
        running = self._asking.get(key)
        if running is not None and force:
            await asyncio.wait([running])  # it may have looked before the change that the caller knows of
            running = None
        if running is not None and is_awaited:
            self._desks[key.source].hurry(key)
        if running is None:
            if not is_awaited and len(self._asking) >= MAX_QUESTIONS:
                raise self._desks[key.source].refusal()
            running = asyncio.create_task(self._ask(key, force, is_awaited))
            self._asking[key] = running
            running.add_done_callback(lambda task: self._asked(key, task))
        return await asyncio.shield(running)  # a cancelled waiter cancels nobody else

    def _asked(self, key: NameKey, task: asyncio.Task[str | None]) -> None:
        if self._asking.get(key) is task:
            del self._asking[key]
        if not task.cancelled():
            task.exception()  # every waiter may have left; then nobody else looks at it

    def _is_fresh(self, key: NameKey, is_known: bool) -> bool:
        checked_at = self._catalog.checked_at(key)
        if checked_at is None:
            return False
        return self._clock() - checked_at < (self._config.refresh_s if is_known else self._config.missing_ttl_s)

    async def _ask(self, key: NameKey, force: bool, is_awaited: bool) -> str | None:
        if self._catalog.checked_at(key) is None:
            await self._remembered(key)
            if not force and self._is_fresh(key, self._catalog.current(key) is not None):
                return self._catalog.current(key)
        before = self._catalog.current(key)
        try:
            # Rows of the index cost no source anything, and who registers names is known.
            is_known = before is not None or key.source == CATALOG
            urgency = Urgency.KNOWN if is_known else Urgency.AWAITED if is_awaited else Urgency.EXPECTED
            listing = await ask_in_turn(
                self._sources[key.source], self._desks[key.source], key, urgency, self._config.stat_timeout_s
            )
        except SourceUnavailable as error:
            if before is None:
                raise
            if key.source not in self._down:
                _log.warning("known versions of its adapters stay while a source cannot be asked: %s", error)
                self._down.add(key.source)
            pause_s = min(self._config.unavailable_ttl_s, self._config.refresh_s)
            self._catalog.postpone(key, self._clock() - self._config.refresh_s + pause_s)
            return before
        self._down.discard(key.source)
        source = self._sources[key.source]
        # A registered name stands for what its row says, or for nothing: never for another source's adapter.
        is_final = listing is None and isinstance(source, CatalogSource) and source.is_registered(key.name)
        digest = self._catalog.observe(key, listing, self._clock(), is_final=is_final)
        if before is not None or digest is not None:
            self._checked.add(key)
        if before is not None and before != digest:
            _log.info("adapter %s: version %s -> %s", key.name, before[:12], digest and digest[:12])
            self._on_replaced(key, before)
        return digest

    async def _remembered(self, key: NameKey) -> None:
        known = await self._known(key)
        if known is None or self._catalog.checked_at(key) is not None:
            return
        age_s = self._wall() - known.checked_at
        if age_s < 0:  # the clock was set back since
            age_s = self._config.refresh_s
        self._catalog.observe(key, known.listing, self._clock() - age_s)

    async def _known(self, key: NameKey) -> Known | None:
        if not self._index.is_durable:
            return None
        try:
            return await self._index.known(key)
        except IndexUnavailable as error:
            _log.debug("the index cannot be asked for adapter %s: %s", key.name, error)
            return None
