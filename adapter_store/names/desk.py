"""Whose turn it is to have a source asked. Anybody can ask for names that nobody has; they must not cost the others.

A name that is known to be there is asked for at once. Names that were never found share a part of the source's threads:
first those that somebody waits for, then those that are only expected, each the newest first. Whoever is pushed out is
told to try again, or, having only been expected, is forgotten. So however many wait, a new name has at most
`MAX_UNKNOWN` look-ups before it.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum

from adapter_store.errors import SourceUnavailable
from adapter_store.names.catalog import NameKey
from adapter_store.sources.threads import MAX_LOOKUPS

MAX_UNKNOWN = 3 * MAX_LOOKUPS // 4  # look-ups of names that were never found, at a time
MAX_EXPECTED = MAX_UNKNOWN // 2  # of them, those that nobody waits for
MAX_WAITING = 256  # names of each kind that wait for their turn


class Urgency(Enum):
    """Why a name is asked for."""

    KNOWN = "known"  # it was there the last time
    AWAITED = "awaited"  # never found; somebody waits for the answer
    EXPECTED = "expected"  # never found; nobody waits


_UNKNOWN = (Urgency.AWAITED, Urgency.EXPECTED)


class Desk:
    """The turns of one source. For one event loop."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._running = dict.fromkeys(_UNKNOWN, 0)
        self._waiting: dict[Urgency, OrderedDict[NameKey, asyncio.Future[Urgency]]] = {
            urgency: OrderedDict() for urgency in _UNKNOWN
        }

    @property
    def num_waiting(self) -> int:
        """Names that wait for their turn."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def turn(self, key: NameKey, urgency: Urgency) -> AsyncIterator[None]:
        """A turn for `key`, of which no other is wanted meanwhile.

        Raises: SourceUnavailable when it was pushed out.
        """
        if urgency is Urgency.KNOWN:
            yield
            return
        if self._may_run(urgency):
            self._running[urgency] += 1
        else:
            urgency = await self._wait(key, urgency)
        try:
            yield
        finally:
            self._running[urgency] -= 1
            self._call_next()

    def hurry(self, key: NameKey) -> None:
        """Somebody waits for `key` now, whose turn was wanted before: it counts as the newest of those."""
        for waiting in self._waiting.values():
            future = waiting.pop(key, None)
            if future is not None:
                self._line_up(key, Urgency.AWAITED, future)
                self._call_next()

    def refusal(self) -> SourceUnavailable:
        """What is told to a name that has to give way."""
        return SourceUnavailable(
            self._source, "too many names that were never found are being looked up; try again in a moment"
        )

    async def _wait(self, key: NameKey, urgency: Urgency) -> Urgency:
        future: asyncio.Future[Urgency] = asyncio.get_running_loop().create_future()
        self._line_up(key, urgency, future)
        try:
            return await future
        except asyncio.CancelledError:
            for waiting in self._waiting.values():
                if waiting.get(key) is future:
                    del waiting[key]
            if future.done() and not future.cancelled() and future.exception() is None:
                self._running[future.result()] -= 1  # its turn came, and it had just left
                self._call_next()
            raise

    def _line_up(self, key: NameKey, urgency: Urgency, future: asyncio.Future[Urgency]) -> None:
        waiting = self._waiting[urgency]
        waiting[key] = future
        if len(waiting) > MAX_WAITING:
            _, oldest = waiting.popitem(last=False)
            if not oldest.done():  # whoever waited may just have left
                oldest.set_exception(self.refusal())

    def _call_next(self) -> None:
        for urgency in _UNKNOWN:
            waiting = self._waiting[urgency]
            while waiting and self._may_run(urgency):
                _, newest = waiting.popitem(last=True)
                if newest.done():
                    continue
                self._running[urgency] += 1
                newest.set_result(urgency)

    def _may_run(self, urgency: Urgency) -> bool:
        if urgency is Urgency.EXPECTED and self._running[urgency] >= MAX_EXPECTED:
            return False
        return sum(self._running.values()) < MAX_UNKNOWN
