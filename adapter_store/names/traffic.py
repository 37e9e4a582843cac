"""How much each adapter is asked for: counts that halve with time, for a bounded number of names.

Pure: no I/O; the caller hands in the time, in seconds of a clock that all counts share (also over restarts).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

MAX_KEYS = 20_000


class Traffic(Generic[K]):
    """A request counts 1 when it comes and half of that `half_life_s` later.

    A count is kept as (what it was, when), and decayed when it is looked at. With more than `max_keys` keys the smaller
    half is forgotten, so that the cost of forgetting is spread over many requests.
    """

    def __init__(self, half_life_s: float, max_keys: int = MAX_KEYS) -> None:
        self._half_life_s = half_life_s
        self._max_keys = max_keys
        self._counts: dict[K, tuple[float, float]] = {}
        self._changed: set[K] = set()

    def __len__(self) -> int:
        return len(self._counts)

    def count(self, key: K, now: float) -> None:
        """A request for `key` has come."""
        self._counts[key] = (self.value(key, now) + 1.0, now)
        self._changed.add(key)
        if len(self._counts) > self._max_keys:
            self._forget(now)

    def restore(self, key: K, value: float, at: float) -> None:
        """A count that was kept elsewhere; it is added to what was counted since."""
        now = max(at, self._counts.get(key, (0.0, at))[1])
        self._counts[key] = (self.value(key, now) + self._decayed(value, at, now), now)
        if len(self._counts) > self._max_keys:
            self._forget(now)

    def value(self, key: K, now: float) -> float:
        """The decayed count of `key`."""
        value, at = self._counts.get(key, (0.0, now))
        return self._decayed(value, at, now)

    def top(self, limit: int, now: float) -> tuple[K, ...]:
        """The keys that are asked for most, at most `limit` of them."""
        return tuple(heapq.nlargest(limit, self._counts, key=lambda key: self.value(key, now)))

    def take_changed(self) -> tuple[tuple[K, float, float], ...]:
        """(key, count, when) of all that changed since the last call, to be kept elsewhere."""
        changed = tuple((key, *self._counts[key]) for key in self._changed)
        self._changed.clear()
        return changed

    def _decayed(self, value: float, at: float, now: float) -> float:
        # A clock that was set back takes nothing away.
        return float(value * 0.5 ** (max(0.0, now - at) / self._half_life_s))

    def _forget(self, now: float) -> None:
        kept = self.top(self._max_keys // 2, now)
        self._counts = {key: self._counts[key] for key in kept}
        self._changed.intersection_update(kept)
