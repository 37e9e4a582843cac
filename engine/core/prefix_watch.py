"""PrefixWatch: the cached prefix of a sequence that waits, kept up to date at the cost of what has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.core.block_pool import BlockPool
from engine.core.sequence import Namespace, Sequence

if TYPE_CHECKING:
    from engine.core.prefix_cache import PrefixCache, PrefixMatch


class PrefixWatch:
    """What `PrefixCache.match` would find for a sequence, now.

    The pool tells it which of its blocks have changed hands or content. Those alone are looked at again, and the block
    after the last: so a prompt that waits at the head of the queue is not looked up anew in every step.
    Invariants, after `update`: `blocks` are those of a new match; `num_free` of them have no reference.
    """

    __slots__ = ("_cache", "_changed", "_is_free", "_nodes", "_places", "_pool", "_seq", "_size", "blocks", "num_free")

    def __init__(self, pool: BlockPool, cache: PrefixCache, seq: Sequence, match: PrefixMatch, block_size: int) -> None:
        """`match`: what was found just now."""
        self._pool = pool
        self._cache = cache
        self._seq = seq
        self._size = block_size
        self.blocks: list[int] = []
        self._nodes: list[int] = []
        self._is_free = bytearray()
        self._places: dict[int, int] = {}
        self._changed: set[int] = set()
        self.num_free = 0
        for block in match.blocks:
            self._append(block)

    @property
    def node(self) -> int | Namespace:
        """Of the prefix that the blocks make up."""
        return self._nodes[-1] if self._nodes else self._seq.namespace

    def num_free_from(self, place: int) -> int:
        """Of the blocks from this place on, those without a reference."""
        return self.num_free - sum(self._is_free[:place])

    def note(self, block: int) -> None:
        """The pool has given a block its first reference or taken its last one, or has changed its content."""
        if block in self._places:
            self._changed.add(block)

    def update(self) -> None:
        changed, self._changed = self._changed, set()
        for place in sorted(self._places[block] for block in changed):
            block = self.blocks[place]
            # One that was handed out and has the same tokens again is another node: what hung on it is lost.
            if self._find(place) != block or self._cache.node_of(block) != self._nodes[place]:
                self._cut(place)
                break
            is_free = self._pool.ref_count(block) == 0
            self.num_free += is_free - self._is_free[place]
            self._is_free[place] = is_free
        max_blocks = (self._seq.num_known_tokens - 1) // self._size
        while len(self.blocks) < max_blocks and (next_block := self._find(len(self.blocks))) is not None:
            self._append(next_block)

    def _find(self, place: int) -> int | None:
        """The block that has the tokens of this place, behind the blocks before it."""
        parent = self._nodes[place - 1] if place else self._seq.namespace
        tokens = self._seq.tokens_between(place * self._size, (place + 1) * self._size)
        return self._cache.find(parent, tokens)

    def _append(self, block: int) -> None:
        is_free = self._pool.ref_count(block) == 0
        self._places[block] = len(self.blocks)
        self.blocks.append(block)
        self._nodes.append(self._cache.node_of(block))
        self._is_free.append(is_free)
        self.num_free += is_free

    def _cut(self, place: int) -> None:
        for block in self.blocks[place:]:
            del self._places[block]
        self.num_free -= sum(self._is_free[place:])
        del self.blocks[place:], self._nodes[place:], self._is_free[place:]
