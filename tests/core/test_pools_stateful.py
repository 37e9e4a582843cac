"""BlockPool, PrefixCache and AdapterSlots against models that are too simple to be wrong."""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.core.adapter_room import ByteRoom, PageRoom
from engine.core.adapter_slots import AdapterSlots, AdapterState
from engine.core.block_pool import BlockPool
from engine.core.plan import AdapterEvict, AdapterLoad
from engine.core.prefix_cache import PrefixCache
from engine.core.sequence import Namespace
from engine.errors import AdapterError

BLOCK_SIZE = 2
SETTINGS = settings(max_examples=50, stateful_step_count=30, deadline=None, derandomize=True)


class BlockPoolMachine(RuleBasedStateMachine):
    """The model: a list of references, and for each block the content that was given to it last."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=5)
        self.references: list[int] = []
        self.content: dict[int, str] = {}

    @precondition(lambda self: self.pool.num_free)
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block not in self.references
        assert block != 0
        self.content.pop(block, None)
        self.references.append(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.references))
        self.pool.share(block)
        self.references.append(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.references))
        self.pool.release(block)
        self.references.remove(block)

    @precondition(lambda self: self.references)
    @rule(data=st.data(), content=st.sampled_from("ab"))
    def label(self, data: st.DataObject, content: str) -> None:
        if content not in self.content.values():
            block = data.draw(st.sampled_from(self.references))
            self.pool.label(block, content)
            self.content[block] = content

    @rule(content=st.sampled_from("ab"))
    def find_and_share(self, content: str) -> None:
        block = self.pool.find(content)
        assert block == next((b for b, c in self.content.items() if c == content), None)
        if block is not None:
            self.pool.share(block)
            self.references.append(block)

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_invariants()
        assert self.pool.num_free == 4 - len(set(self.references))
        assert all(self.pool.ref_count(block) == self.references.count(block) for block in range(5))


class PrefixCacheMachine(RuleBasedStateMachine):
    """The model: what each block was written with. Sequences take, write, publish and give back like a scheduler's."""

    namespaces = (("base", "", None), ("base", "", "ada"), ("base", "salt", None))

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(num_blocks=6)
        self.cache = PrefixCache(self.pool, BLOCK_SIZE)
        self.written: dict[int, tuple[Namespace, tuple[int, ...]]] = {}  # block -> whole prefix up to its end
        self.tables: list[list[int]] = []

    @rule(
        namespace=st.sampled_from(namespaces),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7).map(tuple),
        publishes=st.booleans(),
    )
    def run_a_sequence(self, namespace: Namespace, tokens: tuple[int, ...], publishes: bool) -> None:
        match = self.cache.match(namespace, tokens)
        assert len(match.blocks) * BLOCK_SIZE < len(tokens), "no token is left to compute"
        for index, block in enumerate(match.blocks):
            assert self.written[block] == (namespace, tokens[: (index + 1) * BLOCK_SIZE])
        num_full = len(tokens) // BLOCK_SIZE
        num_new = num_full - len(match.blocks)
        if num_new + sum(self.pool.ref_count(block) == 0 for block in match.blocks) > self.pool.num_free:
            return
        for block in match.blocks:
            self.pool.share(block)
        table = [*match.blocks, *(self.pool.allocate() for _ in range(num_new))]
        node = match.node
        for index in range(len(match.blocks), num_full):
            end = (index + 1) * BLOCK_SIZE
            self.written[table[index]] = (namespace, tokens[:end])
            if publishes:
                node = self.cache.publish(node, tokens[end - BLOCK_SIZE : end], table[index])
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        for block in reversed(table):
            self.pool.release(block)

    @invariant()
    def parts_agree(self) -> None:
        self.pool.check_invariants()
        self.cache.check_invariants()


class AdapterSlotsMachine(RuleBasedStateMachine):
    """The model: what the plans' operations have put where, executed in order."""

    sizes = {"ada": 1, "bob": 2, "cyd": 3, "dan": 9}  # noqa: RUF012  the last is larger than the budget

    def __init__(self) -> None:
        super().__init__()
        self.slots = AdapterSlots(2, ByteRoom(4))
        self.bound: dict[int, str] = {}
        self.pins: list[str] = []
        self.last_load: AdapterLoad | None = None
        for key, num_bytes in self.sizes.items():
            self.slots.add(key, num_bytes)

    @rule(key=st.sampled_from(list(sizes)))
    def load(self, key: str) -> None:
        if self.slots.state(key) is not AdapterState.HOST:
            return
        before = dict(self.bound)
        ops = self.slots.load(key)
        for op in ops:
            if isinstance(op, AdapterEvict):
                assert op.adapter not in self.pins
                assert self.bound.pop(op.lora_slot) == op.adapter
            else:
                assert op.lora_slot not in self.bound
                self.bound[op.lora_slot] = op.adapter
                self.last_load = op
        free_bytes = 4 - sum(self.sizes[k] for k in before.values())
        can_go = [k for k in before.values() if k not in self.pins and self.slots.state(k) is not AdapterState.COPYING]
        if not ops:
            makes_room = self.sizes[key] <= free_bytes + sum(self.sizes[k] for k in can_go)
            assert not (makes_room and (can_go or len(before) < 2)), "there was room"

    @rule(key=st.sampled_from(list(sizes)))
    def copied(self, key: str) -> None:
        was = self.slots.state(key)
        self.slots.copied(key)
        assert self.slots.state(key) is (AdapterState.RESIDENT if was is AdapterState.COPYING else was)

    @precondition(lambda self: self.bound)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.bound.values())))
        self.slots.pin(key)
        self.pins.append(key)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.pins))
        self.slots.unpin(key)
        self.pins.remove(key)

    @precondition(lambda self: self.last_load and self.last_load.adapter not in self.pins)
    @rule()
    def abandon_the_last_load(self) -> None:
        op = self.last_load
        assert op is not None
        if self.bound.get(op.lora_slot) == op.adapter:
            assert self.slots.undo(op) == AdapterEvict(op.adapter, op.lora_slot)
            del self.bound[op.lora_slot]
        self.last_load = None

    @invariant()
    def places_agree(self) -> None:
        self.slots.check_invariants()
        assert 0 not in self.bound
        assert all(self.slots.slot(key) == slot for slot, key in self.bound.items())
        assert all(self.slots.num_pins(key) == self.pins.count(key) for key in self.sizes)


class SharedPagesMachine(RuleBasedStateMachine):
    """One pool for sequences' blocks and adapters' pages. The model: who was given which block."""

    runs = {"ada": (1,), "bob": (1, 1), "cyd": (2, 1), "dan": (3,)}  # noqa: RUF012
    num_blocks, ceiling, floor = 7, 5, 2

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(1 + self.num_blocks)
        self.slots = AdapterSlots(3, PageRoom(self.pool, self.ceiling, self.floor))
        self.blocks: list[int] = []  # of sequences
        self.pages: dict[str, tuple[int, ...]] = {}
        self.pinned: set[str] = set()
        for key, runs in self.runs.items():
            self.slots.add(key, 1, runs)

    def _apply(self, ops: tuple[AdapterLoad | AdapterEvict, ...]) -> None:
        for op in ops:
            if isinstance(op, AdapterEvict):
                assert op.adapter not in self.pinned
                del self.pages[op.adapter]
                continue
            taken = {page for pages in self.pages.values() for page in pages}.union(self.blocks)
            assert not taken & set(op.pages)
            pages = iter(op.pages)
            for length in self.runs[op.adapter]:
                run = [next(pages) for _ in range(length)]
                assert run == list(range(run[0], run[0] + length))
            assert next(pages, None) is None
            self.pages[op.adapter] = op.pages
            self.slots.copied(op.adapter)

    def _num_held(self) -> int:
        return sum(len(pages) for pages in self.pages.values())

    @precondition(lambda self: self.pool.num_available)
    @rule()
    def a_sequence_takes_a_block(self) -> None:
        block = self.pool.allocate()
        assert block not in self.blocks
        assert not any(block in pages for pages in self.pages.values())
        self.blocks.append(block)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def a_sequence_gives_one_back(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.blocks))
        self.blocks.remove(block)
        self.pool.release(block)

    @rule(key=st.sampled_from(list(runs)), may_evict=st.booleans())
    def load(self, key: str, may_evict: bool) -> None:
        if key in self.pages:
            return
        ops = self.slots.load(key, may_evict=may_evict)
        self._apply(ops)
        can_go = [k for k in self.pages if k not in self.pinned] if may_evict else []
        if not ops and sum(self.runs[key]) == len(self.runs[key]):  # single pages: counting tells
            most = self._num_held() - sum(len(self.pages[k]) for k in can_go)
            fits = most + sum(self.runs[key]) <= min(self.ceiling, self.num_blocks - len(self.blocks))
            assert not (fits and (can_go or len(self.pages) < 3)), "there was room"

    @rule(num_pages=st.integers(1, 4))
    def sequences_want_pages(self, num_pages: int) -> None:
        before = self.pool.num_available
        ops = self.slots.yield_pages(num_pages)
        self._apply(ops)
        assert self.pool.num_available >= before + (num_pages if ops else 0)
        assert not ops or self._num_held() >= self.floor

    @rule(key=st.sampled_from(list(runs)))
    def pin_or_unpin(self, key: str) -> None:
        if key in self.pinned:
            self.slots.stop_keeping(key)
            self.pinned.discard(key)
        elif key in self.pages:
            with contextlib.suppress(AdapterError):
                self.slots.keep(key)
                self.pinned.add(key)

    @invariant()
    def budgets_hold(self) -> None:
        self.pool.check_invariants()
        self.slots.check_invariants()
        held = self._num_held()
        assert held <= self.ceiling
        assert len(self.blocks) <= self.num_blocks - max(held, self.floor)
        assert self.pool.num_available == self.num_blocks - len(self.blocks) - max(held, self.floor)
        assert set(self.slots.kept()) == self.pinned
        for key in self.runs:
            if key not in self.pinned:
                assert self.slots.could_fit(key), "pins leave no room for it"


TestBlockPool = BlockPoolMachine.TestCase
TestPrefixCache = PrefixCacheMachine.TestCase
TestAdapterSlots = AdapterSlotsMachine.TestCase
TestSharedPages = SharedPagesMachine.TestCase
TestBlockPool.settings = SETTINGS
TestPrefixCache.settings = SETTINGS
TestAdapterSlots.settings = SETTINGS
TestSharedPages.settings = SETTINGS
