"""PrefixCache: finds blocks whose KV is that of a given prefix."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from engine.core.block_pool import BlockPool
from engine.core.sequence import Namespace


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """Blocks that hold the first tokens of a sequence, in order; `node` names the prefix they make up."""

    blocks: tuple[int, ...]
    node: int | Namespace


class PrefixCache:
    """Full blocks by (node of the prefix before them, their tokens). A node is a number given once, at publication.

    KV depends on all tokens before it, so the key is chained; it is compared exactly, never by a digest alone.
    The first block of a sequence has its namespace (base revision, tenant's salt, adapter key) for a parent.
    Invariants:
      - a hit means equal tokens and an equal namespace, from the first token on
      - a node is never used for two prefixes: a block handed out again gets a new one, and what hung on the old one
        is not found any more
      - at least one token of a match's tokens is left to compute: a sample needs a row
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._node_of: list[int] = [0] * pool.num_blocks
        self._num_nodes = 0
        self._adapter_of: list[str | None] = [None] * pool.num_blocks  # whose content it was when last published
        self._blocks_of: dict[str, set[int]] = {}  # the same by adapter

    def match(self, namespace: Namespace, tokens: Tokens[int]) -> PrefixMatch:
        """The longest cached prefix, less than all of `tokens`. Takes no reference: valid until the pool changes."""
        size = self._block_size
        blocks: list[int] = []
        node: int | Namespace = namespace
        for start in range(0, (len(tokens) - 1) // size * size, size):
            block = self._pool.find((node, tuple(tokens[start : start + size])))
            if block is None:
                break
            blocks.append(block)
            node = self._node_of[block]
        return PrefixMatch(tuple(blocks), node)

    def find(self, parent: int | Namespace, tokens: tuple[int, ...]) -> int | None:
        """The block with these tokens behind that prefix."""
        return self._pool.find((parent, tokens))

    def node_of(self, block: int) -> int:
        """Of the prefix that ends with a published block."""
        return self._node_of[block]

    def publish(self, parent: int | Namespace, tokens: tuple[int, ...], block: int, adapter: str | None = None) -> int:
        """Make a held block findable, whose KV has been computed; if another one holds the same, that one stays.

        Returns: the node of the prefix that ends with this block.
        """
        assert len(tokens) == self._block_size, f"block {block} is not full: {len(tokens)} of {self._block_size} tokens"
        key = (parent, tokens)
        holder = self._pool.find(key)
        if holder is not None:
            return self._node_of[holder]
        # A block that is cached already hangs on a prefix that was evicted and came back under another node: what it
        # holds is the same, so it keeps its node, and what hangs on it is found again.
        if not self._pool.is_cached(block):
            self._num_nodes += 1
            self._node_of[block] = self._num_nodes
        self._pool.label(block, key)
        former = self._adapter_of[block]
        if former != adapter:
            if former is not None:
                self._blocks_of[former].discard(block)
            if adapter is not None:
                self._blocks_of.setdefault(adapter, set()).add(block)
            self._adapter_of[block] = adapter
        return self._node_of[block]

    def forget_adapter(self, adapter: str) -> None:
        """No sequence has it or is to be expected: its blocks are handed out before all others with content."""
        # Those that hang on others go first, so that what is left can be found for as long as it is there.
        for block in sorted(self._blocks_of.pop(adapter, ()), key=self._node_of.__getitem__):
            self._adapter_of[block] = None
            if self._pool.is_cached(block):
                self._pool.hand_out_early(block)

    def check_invariants(self) -> None:
        labelled = [node for block, node in enumerate(self._node_of) if self._pool.is_cached(block)]
        assert len(set(labelled)) == len(labelled) == self._pool.num_cached
        assert all(0 < node <= self._num_nodes for node in labelled)
        listed = {block: adapter for adapter, blocks in self._blocks_of.items() for block in blocks}
        assert listed == {block: a for block, a in enumerate(self._adapter_of) if a is not None}
