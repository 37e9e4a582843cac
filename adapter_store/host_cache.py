"""The host tier: which images are held, by bytes, least recently used first to go, never one that is held on to.

Pure: no I/O, no clock. The caller owns the blobs; this only says which keys to drop.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from adapter_store.errors import StoreFull

K = TypeVar("K", bound=Hashable)


class HostCache(Generic[K]):
    """Keys with their sizes in bytes, in the order of their last use.

    `is_pinned` answers, at the moment it matters, whether a key may not be dropped: the catalog's leases are the one
    truth, no second count is kept here.
    """

    def __init__(self, budget_bytes: int, is_pinned: Callable[[K], bool]) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._is_pinned = is_pinned
        self._sizes: OrderedDict[K, int] = OrderedDict()

    def __contains__(self, key: K) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def keys(self) -> tuple[K, ...]:
        """All keys, the least recently used first."""
        return tuple(self._sizes)

    def size_of(self, key: K) -> int:
        """The bytes of a held key."""
        return self._sizes[key]

    @property
    def pinned_bytes(self) -> int:
        """Bytes that cannot be freed now."""
        return sum(size for key, size in self._sizes.items() if self._is_pinned(key))

    def add(self, key: K, num_bytes: int) -> tuple[K, ...]:
        """Takes `key` in and returns the keys that had to go for it, which the caller drops.

        Raises: StoreFull, having changed nothing, when pinned keys leave no room.
        """
        if key in self._sizes:
            raise ValueError(f"{key!r} is held already")
        victims: list[K] = []
        freed = 0
        for candidate, size in self._sizes.items():
            if self.used_bytes - freed + num_bytes <= self.budget_bytes:
                break
            if not self._is_pinned(candidate):
                victims.append(candidate)
                freed += size
        if self.used_bytes - freed + num_bytes > self.budget_bytes:
            raise StoreFull(num_bytes, self.pinned_bytes, self.budget_bytes)
        for victim in victims:
            self.drop(victim)
        self._sizes[key] = num_bytes
        self.used_bytes += num_bytes
        return tuple(victims)

    def touch(self, key: K) -> None:
        """Marks `key` as used now."""
        self._sizes.move_to_end(key)

    def drop(self, key: K) -> None:
        """Forgets a held key."""
        self.used_bytes -= self._sizes.pop(key)

    def check_invariants(self) -> None:
        """Raises: AssertionError when the sums do not add up."""
        assert self.used_bytes == sum(self._sizes.values()), "used_bytes differs from the sum of the sizes"
        assert 0 <= self.used_bytes <= self.budget_bytes, "the budget is exceeded"
