"""Where resident adapters find room: in memory of their own, or in pages of the KV cache's buffer.

A page is a block of the KV cache. Both kinds of room count in units of their own: bytes, or pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.core.block_pool import BlockPool


class AdapterRoom(Protocol):
    """A budget of resident adapters. `pages` are always those of adapters in it."""

    budget: int
    used: int
    unit: str  # of both

    def size(self, num_bytes: int, runs: tuple[int, ...]) -> int:
        """What an adapter of `num_bytes` costs, which needs runs of so many neighbouring pages."""
        ...

    def fits(self, size: int, runs: tuple[int, ...], pages: Iterable[int], freed: int, headroom: int) -> bool:
        """Whether an adapter would find room once `pages`, or `freed` units, are given back."""
        ...

    def could_fit(self, size: int, runs: tuple[int, ...], pinned: Iterable[int], pinned_size: int) -> bool:
        """Whether it would beside the pinned adapters alone, in `pinned` pages, without any sequence."""
        ...

    def take(self, size: int, runs: tuple[int, ...]) -> tuple[int, ...]:
        """Pages of the runs, one run behind the other. It must fit."""
        ...

    def give_back(self, size: int, pages: tuple[int, ...]) -> None: ...

    def num_to_spare(self) -> int:
        """Units that adapters may lose to sequences."""
        ...


class ByteRoom:
    """Memory apart from the KV cache: only the budget counts."""

    def __init__(self, budget: int, unit: str = "bytes") -> None:
        self.budget = budget
        self.unit = unit
        self.used = 0

    def size(self, num_bytes: int, runs: tuple[int, ...]) -> int:
        return num_bytes

    def fits(self, size: int, runs: tuple[int, ...], pages: Iterable[int], freed: int, headroom: int) -> bool:
        return self.used - freed + size <= self.budget

    def could_fit(self, size: int, runs: tuple[int, ...], pinned: Iterable[int], pinned_size: int) -> bool:
        return pinned_size + size <= self.budget

    def take(self, size: int, runs: tuple[int, ...]) -> tuple[int, ...]:
        self.used += size
        return ()

    def give_back(self, size: int, pages: tuple[int, ...]) -> None:
        self.used -= size

    def num_to_spare(self) -> int:
        return 0


class PageRoom:
    """Pages of the buffer that sequences keep their KV in: what one side does not hold, the other may take.

    Invariants:
      - adapters hold at most `budget` pages, so that one sequence of any length always finds its blocks
      - what they hold less than `min_pages` is reserved in the pool: no sequence gets it
    """

    unit = "pages"

    def __init__(self, pool: BlockPool, max_pages: int, min_pages: int) -> None:
        self.budget = max_pages
        self.min_pages = min_pages
        self.used = 0
        self._pool = pool
        pool.num_reserved = min_pages

    def size(self, num_bytes: int, runs: tuple[int, ...]) -> int:
        return sum(runs)

    def fits(self, size: int, runs: tuple[int, ...], pages: Iterable[int], freed: int, headroom: int) -> bool:
        used = self.used - freed + size
        num_left = self._pool.num_free + freed - size
        if used > self.budget or num_left < 0:
            return False
        for_sequences = num_left - max(0, self.min_pages - used)
        if for_sequences < min(headroom, self._pool.num_available):
            return False
        return max(runs, default=1) == 1 or self._pool.has_runs(runs, pages)

    def could_fit(self, size: int, runs: tuple[int, ...], pinned: Iterable[int], pinned_size: int) -> bool:
        if pinned_size + size > self.budget:
            return False
        return max(runs, default=1) == 1 or self._pool.could_have_runs(runs, pinned)

    def take(self, size: int, runs: tuple[int, ...]) -> tuple[int, ...]:
        pages = self._pool.allocate_runs(runs)
        self._note(size)
        return pages

    def give_back(self, size: int, pages: tuple[int, ...]) -> None:
        for page in reversed(pages):
            self._pool.release(page)
        self._note(-size)

    def num_to_spare(self) -> int:
        return max(0, self.used - self.min_pages)

    def _note(self, change: int) -> None:
        self.used += change
        self._pool.num_reserved = max(0, self.min_pages - self.used)
