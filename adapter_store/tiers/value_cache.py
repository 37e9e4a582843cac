"""What a tier holds, by bytes: the entry that is worth least goes first, never one that is held on to.

GreedyDual-Size-Frequency: an entry is worth L + uses x reload cost / size at its last use, where L, the inflation, is
what the last evicted entry was worth. Whatever is not used any more is overtaken by what is, however dear it once was.
Pure: no I/O, no clock. The caller owns what is held; this only says which keys to drop.
Source: L. Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HPL-98-69R1.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from adapter_store.errors import StoreFull

K = TypeVar("K", bound=Hashable)

MAX_USES = 64  # more count no more: a former favourite must not outlive its time for ever


@dataclass(slots=True)
class _Entry:
    num_bytes: int
    cost_s: float
    uses: int
    worth: float
    turn: int  # of its last use; equal worth goes in the order of use


class ValueCache(Generic[K]):
    """Keys with their bytes, uses and reload costs. All calls are O(log n), seen over many.

    `is_pinned` answers, at the moment it matters, whether a key may not be dropped: leases and pins are the one truth,
    no second count is kept here. A pinned entry that an eviction comes across counts as used at that moment.
    """

    def __init__(self, budget_bytes: int, is_pinned: Callable[[K], bool]) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._is_pinned = is_pinned
        self._entries: dict[K, _Entry] = {}
        self._heap: list[tuple[float, int, K]] = []  # outdated ones are left in it until they come up
        self._inflation = 0.0
        self._turn = 0

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> tuple[K, ...]:
        """All keys, the one worth least first."""
        return tuple(sorted(self._entries, key=lambda key: (self._entries[key].worth, self._entries[key].turn)))

    def size_of(self, key: K) -> int:
        """The bytes of a held key."""
        return self._entries[key].num_bytes

    def uses_of(self, key: K) -> int:
        """How often a held key was used, its arrival included, up to MAX_USES."""
        return self._entries[key].uses

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be freed now."""
        return sum(entry.num_bytes for key, entry in self._entries.items() if self._is_pinned(key))

    def add(self, key: K, num_bytes: int, cost_s: float, uses: int = 1) -> tuple[K, ...]:
        """Takes `key` in and returns the keys that had to go for it, which the caller drops.

        `cost_s` is what it takes to have it again; `uses` what is known from an earlier stay.
        Raises: StoreFull, having changed nothing, when pinned keys leave no room.
        """
        if key in self._entries:
            raise ValueError(f"{key!r} is held already")
        victims = self._make_room(num_bytes)
        self._entries[key] = _Entry(num_bytes, cost_s, min(uses, MAX_USES), 0.0, 0)
        self.used_bytes += num_bytes
        self._rate(key)
        return victims

    def touch(self, key: K) -> None:
        """`key` is used now."""
        entry = self._entries[key]
        entry.uses = min(entry.uses + 1, MAX_USES)
        self._rate(key)

    def recost(self, key: K, cost_s: float) -> None:
        """From now on it takes `cost_s` to have `key` again."""
        self._entries[key].cost_s = cost_s
        self._rate(key)

    def drop(self, key: K) -> None:
        """Forgets a held key."""
        self.used_bytes -= self._entries.pop(key).num_bytes
        self._tidy()

    def check_invariants(self) -> None:
        """Raises: AssertionError when the sums do not add up."""
        assert self.used_bytes == sum(entry.num_bytes for entry in self._entries.values()), "used_bytes is wrong"
        assert 0 <= self.used_bytes <= self.budget_bytes, "the budget is exceeded"
        queued = set(self._heap)
        for key, entry in self._entries.items():
            assert (entry.worth, entry.turn, key) in queued, f"{key!r} would never be evicted"
        assert len(self._heap) <= 2 * len(self._entries) + 64, "outdated entries pile up"

    def _make_room(self, num_bytes: int) -> tuple[K, ...]:
        victims: list[tuple[float, int, K]] = []
        passed: list[tuple[float, int, K]] = []
        excess = self.used_bytes + num_bytes - self.budget_bytes
        while excess > 0 and self._heap:
            rated = heapq.heappop(self._heap)
            if not self._is_current(rated):
                continue
            if self._is_pinned(rated[2]):
                passed.append(rated)
                continue
            victims.append(rated)
            excess -= self._entries[rated[2]].num_bytes
        if excess > 0:
            for rated in (*victims, *passed):
                heapq.heappush(self._heap, rated)
            raise StoreFull(num_bytes, self.pinned_bytes, self.budget_bytes)
        for worth, _, victim in victims:
            self._inflation = worth
            self.used_bytes -= self._entries.pop(victim).num_bytes
        for _, _, key in passed:
            self._rate(key)
        return tuple(victim for _, _, victim in victims)

    def _rate(self, key: K) -> None:
        entry = self._entries[key]
        self._turn += 1
        entry.worth = self._inflation + entry.uses * entry.cost_s / max(1, entry.num_bytes)
        entry.turn = self._turn
        heapq.heappush(self._heap, (entry.worth, entry.turn, key))
        self._tidy()

    def _is_current(self, rated: tuple[float, int, K]) -> bool:
        entry = self._entries.get(rated[2])
        return entry is not None and entry.turn == rated[1]

    def _tidy(self) -> None:
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [rated for rated in self._heap if self._is_current(rated)]
            heapq.heapify(self._heap)
