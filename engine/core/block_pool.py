"""BlockPool: who holds which block of the KV cache, and which prefix a block's content is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

NULL_BLOCK = 0  # padding rows of a runner write here; no sequence ever gets it


class BlockPool:
    """Reference counts and a free list over the blocks 1 .. num_blocks - 1.

    Invariants:
      - a block is in the free list if and only if its ref_count is 0; the null block is in neither
      - a free block keeps its content, and stays findable, until it is handed out again
      - at most one block holds a given content
    The free list hands out blocks without content first, then the least recently freed.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._content: list[Hashable | None] = [None] * num_blocks
        self._block_of: dict[Hashable, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._block_of)

    def ref_count(self, block: int) -> int:
        return self._ref_counts[block]

    def is_cached(self, block: int) -> bool:
        return self._content[block] is not None

    def allocate(self) -> int:
        """Hand out a free block with one reference; its content is forgotten. Raises: KeyError if none is free."""
        block, _ = self._free.popitem(last=False)
        content = self._content[block]
        if content is not None:
            del self._block_of[content]
            self._content[block] = None
        self._ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that is held, or free with its content still there."""
        if self._ref_counts[block] == 0:
            assert self._content[block] is not None, f"block {block} is free and holds nothing"
            del self._free[block]
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last one frees the block."""
        count = self._ref_counts[block] - 1
        assert count >= 0, f"block {block} is released more often than it was taken"
        self._ref_counts[block] = count
        if count == 0:
            self._free[block] = None
            if self._content[block] is None:
                self._free.move_to_end(block, last=False)

    def label(self, block: int, content: Hashable) -> None:
        """From now on `find(content)` answers this block, and only that. It must be held, and `content` new."""
        assert self._ref_counts[block] > 0, f"block {block} is free"
        assert content not in self._block_of, f"block {block} would be a second one"
        former = self._content[block]
        if former is not None:
            del self._block_of[former]
        self._content[block] = content
        self._block_of[content] = block

    def find(self, content: Hashable) -> int | None:
        return self._block_of.get(content)

    def check_invariants(self) -> None:
        assert self._ref_counts[NULL_BLOCK] == 0
        assert NULL_BLOCK not in self._free
        assert self._content[NULL_BLOCK] is None
        for block in range(1, self.num_blocks):
            assert (self._ref_counts[block] == 0) == (block in self._free), f"block {block}"
        held = sum(count > 0 for count in self._ref_counts)
        assert held + len(self._free) == self.num_blocks - 1
        labelled = {content: block for block, content in enumerate(self._content) if content is not None}
        assert labelled == self._block_of
