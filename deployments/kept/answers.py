"""What is kept, and what goes first: plain memory, standard library only."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

Key = tuple[str, str]  # (tenant, id)


class Kept(Protocol):
    """Where a router keeps answers. What one tenant keeps, another cannot tell from what is not there."""

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        """False: it is larger than what one tenant may keep, and is not kept."""
        ...

    async def get(self, tenant: str, name: str) -> bytes | None: ...

    async def delete(self, tenant: str, name: str) -> bool:
        """Whether it was there."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    data: bytes
    until_s: float


class Answers:
    """At most `max_bytes` in all and `max_bytes_of_one` of a tenant; what was used longest ago goes first.

    `now_s` is any clock that does not go back.
    """

    def __init__(
        self, max_bytes: int, max_bytes_of_one: int, max_age_s: float, now_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_of_one = min(max_bytes, max_bytes_of_one)
        self._max_age_s = max_age_s
        self._now_s = now_s
        self._all: OrderedDict[Key, _Answer] = OrderedDict()  # used longest ago first
        self._of: dict[str, OrderedDict[Key, None]] = {}  # by tenant, in the same order
        self._num_bytes: Counter[str] = Counter()  # by tenant
        self.num_bytes = 0

    def put(self, tenant: str, name: str, data: bytes) -> bool:
        """See `Kept.put`."""
        self.delete(tenant, name)
        if len(data) > self._max_bytes_of_one:
            return False
        self._drop_old()
        while self._num_bytes[tenant] + len(data) > self._max_bytes_of_one:
            self._drop(next(iter(self._of[tenant])))
        while self.num_bytes + len(data) > self._max_bytes:
            self._drop(next(iter(self._all)))
        key = (tenant, name)
        self._all[key] = _Answer(data, self._now_s() + self._max_age_s)
        self._of.setdefault(tenant, OrderedDict())[key] = None
        self._num_bytes[tenant] += len(data)
        self.num_bytes += len(data)
        return True

    def get(self, tenant: str, name: str) -> bytes | None:
        """See `Kept.get`. Whoever goes on from an answer keeps it from going first, not from growing old."""
        key = (tenant, name)
        found = self._all.get(key)
        if found is None:
            return None
        if self._now_s() >= found.until_s:
            self._drop(key)
            return None
        self._all.move_to_end(key)
        self._of[tenant].move_to_end(key)
        return found.data

    def delete(self, tenant: str, name: str) -> bool:
        """See `Kept.delete`."""
        is_there = self.get(tenant, name) is not None
        if is_there:
            self._drop((tenant, name))
        return is_there

    def _drop_old(self) -> None:
        """Those at the front: one behind them that is old too goes when it is asked for, or its turn comes."""
        now_s = self._now_s()
        while self._all and now_s >= next(iter(self._all.values())).until_s:
            self._drop(next(iter(self._all)))

    def _drop(self, key: Key) -> None:
        tenant = key[0]
        num_bytes = len(self._all.pop(key).data)
        self.num_bytes -= num_bytes
        self._num_bytes[tenant] -= num_bytes
        of_one = self._of[tenant]
        del of_one[key]
        if not of_one:
            del self._of[tenant], self._num_bytes[tenant]


class OwnAnswers:
    """Of one process: where there is one router, or in tests."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        """See `Kept.put`."""
        return self._answers.put(tenant, name, data)

    async def get(self, tenant: str, name: str) -> bytes | None:
        """See `Kept.get`."""
        return self._answers.get(tenant, name)

    async def delete(self, tenant: str, name: str) -> bool:
        """See `Kept.delete`."""
        return self._answers.delete(tenant, name)
