"""KVBlocks: what sequences do with blocks: take, grow, share with a sibling, publish, give back."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.block_pool import BlockPool
from engine.core.limits import SchedulerConfig
from engine.core.plan import BlockCopy
from engine.core.prefix_cache import PrefixCache, PrefixMatch
from engine.core.prefix_watch import PrefixWatch
from engine.core.sequence import Sequence

MAX_WATCHES = 8  # of sequences that wait: heads of the queue, which change with the tenant whose turn it is


@dataclass(frozen=True, slots=True)
class Placement:
    """Blocks for all known tokens of a sequence that is about to run."""

    shared: tuple[int, ...]  # full blocks whose KV is there
    num_new: int
    num_revived: int  # of the shared ones, those that are free
    num_computed_tokens: int
    num_cached_tokens: int  # of them, those found in the prefix cache
    node: int | None  # of the prefix cache, if the shared blocks were found there
    copy_src: int | None  # a sibling's block of which the first new block needs the beginning


class KVBlocks:
    """Block tables over one BlockPool.

    Invariants:
      - a block that a sequence is going to write (from its first token that is not computed on) is its own: one
        reference, not published
      - blocks are published in order, only when their KV has come back, and only full ones
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.cache = PrefixCache(self.pool, config.block_size)
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._watches: dict[int, PrefixWatch] = {}  # by sequence: those that wait at the head of the queue
        self._found: tuple[int, PrefixMatch] = (-1, PrefixMatch((), -1))  # by whom, last
        self.hit_tokens = 0
        self.lookup_tokens = 0

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def place(self, seq: Sequence, source: Sequence | None) -> Placement:
        """How `seq` could run: with the longest prefix that is there, from the cache or from its sibling `source`.

        Changes nothing, and holds until a block is taken.
        """
        match, num_revived = self._match(seq)
        cached_tokens = len(match.blocks) * self._block_size
        shared, computed, node = match.blocks, cached_tokens, match.node if match.blocks else None
        copy_src = None
        if source is not None:
            forked = min(len(seq.prompt), seq.num_known_tokens - 1)
            if forked > cached_tokens:
                num_full, rest = divmod(forked, self._block_size)
                shared, computed, node = tuple(source.block_table[:num_full]), forked, None
                copy_src = source.block_table[num_full] if rest else None
                cached_tokens = num_revived = 0  # they are its sibling's
        num_new = self.num_blocks_for(seq.num_known_tokens) - len(shared)
        return Placement(
            shared, num_new, num_revived, computed, cached_tokens, node if isinstance(node, int) else None, copy_src
        )

    def _match(self, seq: Sequence) -> tuple[PrefixMatch, int]:
        """The longest cached prefix, and how many of its blocks are free."""
        if not self._caching:
            return PrefixMatch((), seq.namespace), 0
        watch = self._watches.get(seq.seq_id)
        if watch is not None:
            watch.update()
            return PrefixMatch(tuple(watch.blocks), watch.node), watch.num_free
        match = self.cache.match(seq.namespace, seq.tokens_between(0, seq.num_known_tokens))
        self._found = (seq.seq_id, match)
        return match, sum(self.pool.ref_count(block) == 0 for block in match.blocks)

    def expect(self, seq: Sequence) -> None:
        """`seq` was placed just now and does not fit: from now on its cached prefix is kept up to date."""
        found_for, match = self._found
        if seq.seq_id != found_for or seq.seq_id in self._watches:
            return
        if len(self._watches) >= MAX_WATCHES:
            self._forget(next(iter(self._watches)))
        watch = self._watches[seq.seq_id] = PrefixWatch(self.pool, self.cache, seq, match, self._block_size)
        self.pool.watches.append(watch)

    def _forget(self, seq_id: int) -> None:
        self._found = (-1, PrefixMatch((), -1))
        watch = self._watches.pop(seq_id, None)
        if watch is not None:
            self.pool.watches.remove(watch)

    def num_missing(self, placement: Placement, headroom: int) -> int:
        """Blocks that must become free before it can be taken and leave `headroom` of them."""
        return max(0, placement.num_new + placement.num_revived + headroom - self.pool.num_available)

    def take(self, seq: Sequence, placement: Placement) -> BlockCopy | None:
        """Give `seq` its blocks. Returns: the copy that must happen before it writes; its source has a reference."""
        self._forget(seq.seq_id)
        for block in placement.shared:
            self.pool.share(block)
        if placement.copy_src is not None:
            self.pool.share(placement.copy_src)
        seq.block_table = [*placement.shared, *(self.pool.allocate() for _ in range(placement.num_new))]
        seq.table = None
        seq.num_computed_tokens = seq.num_committed_tokens = placement.num_computed_tokens
        if placement.node is not None:
            seq.cache_parent = placement.node
            seq.num_published_blocks = len(placement.shared)
        self.lookup_tokens += seq.num_known_tokens
        self.hit_tokens += placement.num_cached_tokens
        if placement.copy_src is None:
            return None
        return BlockCopy(placement.copy_src, seq.block_table[len(placement.shared)])

    def grow(self, seq: Sequence) -> bool:
        """A block for the next token of a running sequence. Returns: False if none is free."""
        if seq.num_computed_tokens < len(seq.block_table) * self._block_size:
            return True
        if self.pool.num_available <= 0:
            return False
        seq.block_table.append(self.pool.allocate())
        seq.table = None
        return True

    def grow_for_guesses(self, seq: Sequence, max_tokens: int, headroom: int) -> int:
        """How many guesses beyond the next token there is room for, with blocks that leave `headroom` free."""
        wanted = seq.num_computed_tokens + 1 + max_tokens
        while len(seq.block_table) * self._block_size < wanted and self.pool.num_available > headroom:
            seq.block_table.append(self.pool.allocate())
            seq.table = None
        return min(max_tokens, len(seq.block_table) * self._block_size - seq.num_computed_tokens - 1)

    def publish(self, seq: Sequence) -> None:
        """Make the full blocks findable whose KV has been computed and whose tokens are known."""
        if not self._caching:
            return
        size = self._block_size
        while (seq.num_published_blocks + 1) * size <= seq.num_committed_tokens:
            index = seq.num_published_blocks
            tokens = seq.tokens_between(index * size, (index + 1) * size)
            seq.cache_parent = self.cache.publish(seq.cache_parent, tokens, seq.block_table[index], seq.request.adapter)
            seq.num_published_blocks += 1

    def give_back(self, seq: Sequence) -> None:
        """Release all blocks of `seq`, the last first, so that a prefix outlives what hangs on it."""
        self._forget(seq.seq_id)
        for block in reversed(seq.block_table):
            self.pool.release(block)
        seq.block_table = []
        seq.table = None
        seq.rewind()

    def release(self, blocks: tuple[int, ...]) -> None:
        """References that a plan in flight held."""
        for block in blocks:
            self.pool.release(block)

    def check_invariants(self, holders: list[Sequence], extra_references: list[int], adapter_pages: list[int]) -> None:
        """`holders`: all sequences with blocks; `extra_references`: blocks held by plans in flight."""
        self.pool.check_invariants()
        self.cache.check_invariants()
        counts = [0] * self.pool.num_blocks
        for seq in holders:
            for block in seq.block_table:
                counts[block] += 1
            for block in seq.block_table[seq.num_computed_tokens // self._block_size :]:
                assert not self.pool.is_cached(block), f"block {block} of {seq} is published and not written yet"
                assert self.pool.ref_count(block) - extra_references.count(block) == 1, f"block {block} of {seq}"
        for block in extra_references:
            counts[block] += 1
        for page in adapter_pages:
            assert counts[page] == 0, f"page {page} of an adapter is in use by a sequence"
            assert not self.pool.is_cached(page), f"page {page} of an adapter passes for a prefix"
            counts[page] += 1
        assert counts == [self.pool.ref_count(block) for block in range(self.pool.num_blocks)], "references leaked"
