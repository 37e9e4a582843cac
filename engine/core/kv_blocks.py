"""KVBlocks: what sequences do with blocks: take, grow, share with a sibling, publish, give back."""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.limits import SchedulerConfig
from engine.core.plan import BlockCopy
from engine.core.prefix_cache import PrefixCache, PrefixMatch
from engine.core.prefix_watch import PrefixWatch
from engine.core.sequence import Sequence

MAX_WATCHES = 8  # of sequences that wait: heads of the queue, which change with the tenant whose turn it is


@dataclass(frozen=True, slots=True)
class Placement:
    """Blocks for all known tokens of a sequence that is about to run, or for as many as a window ever needs."""

    shared: tuple[int, ...]  # full blocks whose KV is there; the null block for each that none of its rows will see
    unseen: tuple[int, ...]  # those blocks, where they were found in the prefix cache
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
      - where every layer has a window, a sequence drops the blocks that no row in flight or to come sees, and never
        holds more than `max_live_blocks`
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.pool = BlockPool(config.num_blocks)
        self.cache = PrefixCache(self.pool, config.block_size)
        self._block_size = config.block_size
        self._caching = config.enable_prefix_caching
        self._window = config.window_tokens
        self._max_live_blocks = config.max_live_blocks
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
        unseen, copy_src = match.blocks[: self._num_unseen(computed)], None
        if source is not None:
            forked = min(len(seq.prompt), seq.num_known_tokens - 1)
            # A sibling that is further on may have dropped what is to be seen from here.
            if forked > cached_tokens and source.num_dropped_blocks <= self._num_unseen(forked):
                num_full, rest = divmod(forked, self._block_size)
                shared, computed, node = tuple(source.block_table[:num_full]), forked, None
                copy_src = source.block_table[num_full] if rest else None
                cached_tokens = num_revived = 0  # they are its sibling's
                unseen = ()
        num_unseen = self._num_unseen(computed)
        shared = (NULL_BLOCK,) * num_unseen + shared[num_unseen:]
        num_new = min(self.num_blocks_for(seq.num_known_tokens), num_unseen + self._max_live_blocks) - len(shared)
        node = node if isinstance(node, int) else None
        return Placement(shared, unseen, num_new, num_revived, computed, cached_tokens, node, copy_src)

    def _num_unseen(self, position: int) -> int:
        """Blocks that lie wholly behind the window of a row at `position`, and so of all rows after it."""
        return 0 if self._window is None else max(0, position - self._window + 1) // self._block_size

    def _match(self, seq: Sequence) -> tuple[PrefixMatch, int]:
        """The longest cached prefix, and how many of its blocks are free and would be taken."""
        if not self._may_share(seq):
            return PrefixMatch((), seq.namespace), 0
        watch = self._watches.get(seq.seq_id)
        if watch is not None:
            watch.update()
            num_unseen = self._num_unseen(len(watch.blocks) * self._block_size)
            return PrefixMatch(tuple(watch.blocks), watch.node), watch.num_free_from(num_unseen)
        match = self.cache.match(seq.namespace, seq.tokens_between(0, seq.num_known_tokens))
        self._found = (seq.seq_id, match)
        num_unseen = self._num_unseen(len(match.blocks) * self._block_size)
        return match, sum(self.pool.ref_count(block) == 0 for block in match.blocks[num_unseen:])

    def _may_share(self, seq: Sequence) -> bool:
        """Whether a cached prefix spares its rows: of a vector that is made of all of them it must not."""
        numbers = seq.request.numbers
        return self._caching and (numbers is None or not numbers.needs_all_rows)

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
        seq.num_dropped_blocks = self._num_unseen(placement.num_computed_tokens)
        for block in placement.shared[seq.num_dropped_blocks :]:
            self.pool.share(block)
        for block in reversed(placement.unseen):  # without them, what hangs on them would not be found again
            self.pool.keep_longer(block)
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

    def extend(self, seq: Sequence) -> int:
        """Blocks for more of its known tokens, as far as there are any and it may hold them.

        Returns: how many rows more there are blocks for.
        """
        if self._window is not None:
            most = min(self.num_blocks_for(seq.num_known_tokens), seq.num_dropped_blocks + self._max_live_blocks)
            while len(seq.block_table) < most and self.pool.num_available > 0:
                seq.block_table.append(self.pool.allocate())
                seq.table = None
        return len(seq.block_table) * self._block_size - seq.num_computed_tokens

    def slide(self, seq: Sequence) -> None:
        """Drop the blocks that no row in flight or to come sees; a prompt under way takes as many new ones."""
        num_unseen = self._num_unseen(seq.num_committed_tokens)
        if num_unseen <= seq.num_dropped_blocks:
            return
        for index in range(seq.num_dropped_blocks, num_unseen):
            self.pool.release(seq.block_table[index])
            seq.block_table[index] = NULL_BLOCK
        seq.num_dropped_blocks = num_unseen
        seq.table = None
        if seq.num_to_compute > 1:
            self.extend(seq)

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
            block = seq.block_table[index]
            if block == NULL_BLOCK:  # it is not its own to publish: a sibling's, that is hoped to have been
                found = self.cache.find(seq.cache_parent, tokens)
                if found is None:
                    return
                seq.cache_parent = self.cache.node_of(found)
            else:
                seq.cache_parent = self.cache.publish(seq.cache_parent, tokens, block, seq.request.adapter)
            seq.num_published_blocks += 1

    def give_back(self, seq: Sequence) -> None:
        """Release all blocks of `seq`, the last first, so that a prefix outlives what hangs on it."""
        self._forget(seq.seq_id)
        for block in reversed(seq.block_table[seq.num_dropped_blocks :]):
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
            live = seq.block_table[seq.num_dropped_blocks :]
            assert set(seq.block_table[: seq.num_dropped_blocks]) <= {NULL_BLOCK}, f"{seq} holds what it has dropped"
            assert NULL_BLOCK not in live, f"{seq} has dropped a block that it can see"
            assert len(live) <= self._max_live_blocks, f"{seq} holds {len(live)} blocks"
            assert seq.num_dropped_blocks <= self._num_unseen(seq.num_committed_tokens), seq
            for block in live:
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
