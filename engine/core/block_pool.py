"""BlockPool: who holds which block of the KV cache, and which prefix a block's content is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Protocol

NULL_BLOCK = 0
"""Padding rows of a runner write here, and no sequence ever gets it. In a block table it stands for a block that lies
behind the window of every layer."""

_HELD, _EMPTY, _CACHED = 0, 1, 2  # what a block is, to those who look for neighbours
_AS_EMPTY = bytes((_HELD, _EMPTY, _EMPTY)) + bytes(253)


class Watch(Protocol):
    """Wants to know of blocks that change hands or content."""

    def note(self, block: int) -> None: ...


class BlockPool:
    """Reference counts and a free list over the blocks 1 .. num_blocks - 1.

    Invariants:
      - a block is in the free list if and only if its ref_count is 0; the null block is in neither
      - a free block keeps its content, and stays findable, until it is handed out again
      - at most one block holds a given content
      - num_reserved <= num_free: so many free blocks are kept for adapters
    The free list hands out blocks without content first, then those whose content is of no use any more, then the
    least recently freed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_reserved = 0
        self._ref_counts = [0] * num_blocks
        self._empty: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # free, without content
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, with content
        self._kinds = bytearray([_HELD, *[_EMPTY] * (num_blocks - 1)])
        self._content: list[Hashable | None] = [None] * num_blocks
        self._block_of: dict[Hashable, int] = {}
        self.watches: list[Watch] = []

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    @property
    def num_available(self) -> int:
        """Free blocks that sequences may take."""
        return len(self._empty) + len(self._cached) - self.num_reserved

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def is_cached(self, block: int) -> bool:
        return self._content[block] is not None

    def allocate(self) -> int:
        """Hand out a free block with one reference; its content is forgotten. Raises: KeyError if none is free."""
        free = self._empty or self._cached
        block, _ = free.popitem(last=False)
        self._hand_out(block)
        return block

    def allocate_runs(self, runs: tuple[int, ...]) -> tuple[int, ...]:
        """Hand out runs of neighbouring blocks, of these lengths, longest first. Raises: KeyError if there are none."""
        starts = _find_runs(self._kinds, runs)
        if starts is None:
            raise KeyError(f"there are no free runs of {runs} blocks")
        blocks = [start + i for start, length in zip(starts, runs, strict=False) for i in range(length)]
        for block in blocks:
            (self._cached if self.is_cached(block) else self._empty).pop(block)
            self._hand_out(block)
        return (*blocks, *(self.allocate() for length in runs[len(starts) :]))

    def has_runs(self, runs: tuple[int, ...], also_free: Iterable[int]) -> bool:
        """Whether `allocate_runs` would succeed if some held blocks were free too."""
        kinds = bytearray(self._kinds)
        for block in also_free:
            kinds[block] = _EMPTY
        return _find_runs(kinds, runs) is not None

    def could_have_runs(self, runs: tuple[int, ...], held: Iterable[int]) -> bool:
        """Whether `allocate_runs` would succeed if nothing but these blocks were held."""
        kinds = bytearray([_HELD, *[_EMPTY] * (self.num_blocks - 1)])
        for block in held:
            kinds[block] = _HELD
        return _find_runs(kinds, runs) is not None

    def share(self, block: int) -> None:
        """One more reference to a block that is held, or free with its content still there."""
        if self._ref_counts[block] == 0:
            assert self._content[block] is not None, f"block {block} is free and holds nothing"
            del self._cached[block]
            self._kinds[block] = _HELD
            self._note(block)
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        count = self._ref_counts[block] - 1
        assert count >= 0, f"block {block} is released more often than it was taken"
        self._ref_counts[block] = count
        if count == 0:
            if self._content[block] is None:
                self._empty[block] = None
                self._empty.move_to_end(block, last=False)
                self._kinds[block] = _EMPTY
            else:
                self._cached[block] = None
                self._kinds[block] = _CACHED
                self._note(block)

    def keep_longer(self, block: int) -> None:
        """A free block's content was of use just now, though nobody took it."""
        if block in self._cached:
            self._cached.move_to_end(block)

    def hand_out_early(self, block: int) -> None:
        """A free block's content is of no use any more; it stays findable until the block is handed out."""
        if block in self._cached:
            self._cached.move_to_end(block, last=False)

    def label(self, block: int, content: Hashable) -> None:
        """From now on `find(content)` answers this block, and only that. It must be held, and `content` new."""
        assert self._ref_counts[block] > 0, f"block {block} is free"
        assert content not in self._block_of, f"block {block} would be a second one"
        former = self._content[block]
        if former is not None:
            del self._block_of[former]
        self._content[block] = content
        self._block_of[content] = block
        self._note(block)

    def find(self, content: Hashable) -> int | None:
        return self._block_of.get(content)

    def _note(self, block: int) -> None:
        for watch in self.watches:
            watch.note(block)

    def _hand_out(self, block: int) -> None:
        content = self._content[block]
        if content is not None:
            del self._block_of[content]
            self._content[block] = None
            self._note(block)
        self._ref_counts[block] = 1
        self._kinds[block] = _HELD

    def check_invariants(self) -> None:
        assert self._ref_counts[NULL_BLOCK] == 0
        assert self._content[NULL_BLOCK] is None
        assert 0 <= self.num_reserved <= self.num_free
        for block in range(self.num_blocks):
            is_free = block != NULL_BLOCK and self._ref_counts[block] == 0
            assert (block in self._empty) == (is_free and not self.is_cached(block)), f"block {block}"
            assert (block in self._cached) == (is_free and self.is_cached(block)), f"block {block}"
            assert self._kinds[block] == (is_free and (_CACHED if self.is_cached(block) else _EMPTY)), f"block {block}"
        labelled = {content: block for block, content in enumerate(self._content) if content is not None}
        assert labelled == self._block_of


def _find_runs(kinds: bytearray, runs: tuple[int, ...]) -> list[int] | None:
    """First blocks of the runs longer than one, without content where that can be had. None: there is no such place.

    `runs` descend. Single blocks are only counted.
    """
    kinds = bytearray(kinds)
    starts: list[int] = []
    for length in runs:
        if length == 1:
            break
        start = kinds.find(bytes((_EMPTY,)) * length)
        if start < 0:
            start = kinds.translate(_AS_EMPTY).find(bytes((_EMPTY,)) * length)
        if start < 0:
            return None
        kinds[start : start + length] = bytes(length)
        starts.append(start)
    num_free = len(kinds) - kinds.count(_HELD)
    return starts if len(runs) - len(starts) <= num_free else None
