"""The property of test_text_is_invariant catches the classic mistakes: each is planted here, and must be found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from engine.core import draft
from engine.core.adapter_room import PageRoom
from engine.core.adapter_slots import AdapterSlots, AdapterState
from engine.core.block_pool import BlockPool
from engine.core.draft import PlanDraft
from engine.core.intake import Intake
from engine.core.kv_blocks import KVBlocks, Placement
from engine.core.plan import AdapterEvict, BlockCopy, RowOutput, SequenceSlice, SequenceStart, TokenRef
from engine.core.prefix_cache import PrefixCache, PrefixMatch
from engine.core.roster import Roster
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from tests.core.play import MAX_WORKLOADS, first_failure
from tests.support.strategies import random_workload, with_numbers

Patch = pytest.MonkeyPatch


def unchained_prefix_key(patch: Patch) -> None:
    """A block is found by its own tokens, whatever came before."""

    def match(self: PrefixCache, namespace: tuple[str, ...], tokens: tuple[int, ...]) -> PrefixMatch:
        blocks = []
        for start in range(0, (len(tokens) - 1) // self._block_size * self._block_size, self._block_size):
            block = self._pool.find((namespace, tokens[start : start + self._block_size]))
            if block is None:
                break
            blocks.append(block)
        return PrefixMatch(tuple(blocks), 1)

    original = PrefixCache.publish

    def publish(self: KVBlocks, seq: Sequence) -> None:
        size = self._block_size
        while self._caching and (seq.num_published_blocks + 1) * size <= seq.num_committed_tokens:
            index = seq.num_published_blocks
            tokens = seq.tokens_between(index * size, (index + 1) * size)
            if not self.pool.is_cached(seq.block_table[index]):
                original(self.cache, seq.namespace, tokens, seq.block_table[index])
            seq.num_published_blocks += 1

    patch.setattr(PrefixCache, "match", match)
    patch.setattr(KVBlocks, "publish", publish)


def whole_prompt_matched(patch: Patch) -> None:
    """The last full block is taken from the cache too, and no token is left to compute."""
    original = PrefixCache.match
    patch.setattr(PrefixCache, "match", lambda self, namespace, tokens: original(self, namespace, (*tokens, 0)))


def adapter_missing_from_the_namespace(patch: Patch) -> None:
    original = Sequence.rewind

    def rewind(self: Sequence) -> None:
        self.namespace = (*self.namespace[:2], None)
        original(self)

    patch.setattr(Sequence, "rewind", rewind)


def blocks_freed_while_a_plan_in_flight_names_them(patch: Patch) -> None:
    original = Roster.settle

    def settle(self: Roster, seq: Sequence) -> None:
        num_in_flight, seq.num_in_flight = seq.num_in_flight, 0
        original(self, seq)
        seq.num_in_flight = num_in_flight

    patch.setattr(Roster, "settle", settle)


def reference_lost_when_a_block_is_shared(patch: Patch) -> None:
    original = BlockPool.share

    def share(self: BlockPool, block: int) -> None:
        if self.ref_count(block) != 1:
            original(self, block)

    patch.setattr(BlockPool, "share", share)


def shared_block_written_without_a_copy(patch: Patch) -> None:
    original = KVBlocks.take

    def take(self: KVBlocks, seq: Sequence, placement: Placement) -> BlockCopy | None:
        copy = original(self, seq, placement)
        if copy is not None:
            seq.block_table[len(placement.shared)] = copy.src
            self.pool.release(copy.dst)
        return None

    patch.setattr(KVBlocks, "take", take)


def copy_forgotten(patch: Patch) -> None:
    original = KVBlocks.take

    def take(self: KVBlocks, seq: Sequence, placement: Placement) -> BlockCopy | None:
        copy = original(self, seq, placement)
        if copy is not None:
            self.pool.release(copy.src)
        return None

    patch.setattr(KVBlocks, "take", take)


def published_before_commit(patch: Patch) -> None:
    original = KVBlocks.take

    def take(self: KVBlocks, seq: Sequence, placement: Placement) -> BlockCopy | None:
        copy = original(self, seq, placement)
        committed, seq.num_committed_tokens = seq.num_committed_tokens, seq.num_known_tokens
        self.publish(seq)
        seq.num_committed_tokens = committed
        return copy

    patch.setattr(KVBlocks, "take", take)
    patch.setattr(KVBlocks, "check_invariants", lambda *args: None)  # the text alone must tell


def stale_content_of_a_block_handed_out_again(patch: Patch) -> None:
    def allocate(self: BlockPool) -> int:
        block, _ = (self._empty or self._cached).popitem(last=False)
        self._ref_counts[block], self._kinds[block] = 1, 0
        return block

    patch.setattr(BlockPool, "allocate", allocate)
    patch.setattr(KVBlocks, "check_invariants", lambda *args: None)  # the text alone must tell


def pinned_slot_given_to_another_adapter(patch: Patch) -> None:
    patch.setattr(AdapterSlots, "_evictable", lambda self: iter(list(self._placed.values())))

    def evict(self: AdapterSlots, key: str) -> AdapterEvict:
        return AdapterEvict(key, self._displace(self._adapters[key]))

    patch.setattr(AdapterSlots, "evict", evict)


def wrong_row_referenced(patch: Patch) -> None:
    original = PlanDraft._slice

    def piece_of(
        self: PlanDraft, seq: Sequence, rows: int, guesses: tuple[int, ...], row: int, lora_slot: int
    ) -> object:
        piece = original(self, seq, rows, guesses, row, lora_slot)
        if seq.last_sample is not None:
            seq.last_sample = TokenRef(self.plan_id, row)
        return piece

    patch.setattr(PlanDraft, "_slice", piece_of)


def outputs_forgotten_when_a_sequence_joins_again(patch: Patch) -> None:
    original = Sequence.start

    def start(self: Sequence) -> SequenceStart:
        return dataclasses.replace(original(self), output_token_ids=())

    patch.setattr(Sequence, "start", start)


def abandoned_load_taken_for_done(patch: Patch) -> None:
    original = AdapterSlots.undo

    def undo(self: AdapterSlots, op: object) -> object:
        used_bytes, used, placed = self.used_bytes, self.room.used, dict(self._placed)
        homes = {slot: adapter.pages for slot, adapter in placed.items()}
        evict = original(self, op)  # type: ignore[arg-type]
        for slot, adapter in placed.items():
            if slot not in self._placed:
                self._free_slots.remove(slot)
                self._placed[slot], adapter.slot, adapter.state = adapter, slot, type(adapter.state).RESIDENT
                self.used_bytes, self.room.used = used_bytes, used
                adapter.pages = homes[slot]
        return evict

    patch.setattr(AdapterSlots, "undo", undo)


def wrong_guesses_taken_for_computed(patch: Patch) -> None:
    original = Intake.take_in

    def take_in(self: Intake, seq: Sequence, piece: SequenceSlice, *came: Any) -> None:
        original(self, seq, piece, *came)
        if piece.num_guesses and seq.num_computed_tokens:
            seq.num_computed_tokens = seq.num_committed_tokens = min(piece.position + piece.num_rows, seq.num_tokens)

    patch.setattr(Intake, "take_in", take_in)


def guesses_made_while_a_sample_is_in_flight(patch: Patch) -> None:
    patch.setattr(Sequence, "num_to_compute", property(lambda self: max(0, self.num_tokens - self.num_computed_tokens)))


def adapter_evicted_that_a_caller_has_pinned(patch: Patch) -> None:
    def keep(self: AdapterSlots, key: str) -> None:
        if self._adapters[key].slot is not None:
            self._adapters[key].is_kept = True

    def stop_keeping(self: AdapterSlots, key: str) -> None:
        self._adapters[key].is_kept = False

    patch.setattr(AdapterSlots, "keep", keep)
    patch.setattr(AdapterSlots, "stop_keeping", stop_keeping)
    patch.setattr(AdapterSlots, "check_invariants", lambda self: None)


def page_of_a_resident_adapter_given_to_sequences(patch: Patch) -> None:
    original = PageRoom.take

    def take(self: PageRoom, size: int, runs: tuple[int, ...]) -> tuple[int, ...]:
        pages = original(self, size, runs)
        for page in pages[:1]:
            self._pool.release(page)
        return pages

    patch.setattr(PageRoom, "take", take)
    patch.setattr(PageRoom, "give_back", lambda self, size, pages: self._note(-size))
    patch.setattr(Scheduler, "check_invariants", lambda self: None)  # the text alone must tell


def pages_taken_before_the_plan_that_reads_them_retires(patch: Patch) -> None:
    """Sequences' blocks, for an adapter."""
    original = AdapterSlots.load

    def load(self: AdapterSlots, key: str, **how: object) -> object:
        if isinstance(self.room, PageRoom):
            pool = self.room._pool
            held = [block for block in range(1, pool.num_blocks) if pool.ref_count(block) == 1]
            own = set(self.pages())
            for block in [block for block in held if block not in own][:1]:
                pool.release(block)
        return original(self, key, **how)  # type: ignore[arg-type]

    patch.setattr(AdapterSlots, "load", load)
    patch.setattr(Scheduler, "check_invariants", lambda self: None)


def adapter_used_before_its_copy_is_done(patch: Patch) -> None:
    def state(self: AdapterSlots, key: str) -> AdapterState:
        return AdapterState.RESIDENT if self._adapters[key].slot is not None else AdapterState.HOST

    patch.setattr(AdapterSlots, "state", state)


def floor_ignored_by_sequences(patch: Patch) -> None:
    patch.setattr(BlockPool, "num_available", property(lambda self: self.num_free))
    patch.setattr(Scheduler, "check_invariants", lambda self: None)


def floor_ignored_when_sequences_take_pages(patch: Patch) -> None:
    patch.setattr(PageRoom, "num_to_spare", lambda self: self.used)
    patch.setattr(PageRoom, "_note", lambda self, change: setattr(self, "used", self.used + change))
    patch.setattr(Scheduler, "check_invariants", lambda self: None)


def ceiling_ignored(patch: Patch) -> None:
    def fits(self: PageRoom, size: int, runs: tuple[int, ...], pages: object, freed: int, headroom: int) -> bool:
        return size <= self._pool.num_free + freed and (
            max(runs, default=1) == 1 or self._pool.has_runs(runs, pages)  # type: ignore[arg-type]
        )

    patch.setattr(PageRoom, "fits", fits)
    patch.setattr(Scheduler, "check_invariants", lambda self: None)


def runs_torn_apart(patch: Patch) -> None:
    patch.setattr(
        BlockPool, "allocate_runs", lambda self, runs: tuple(self.allocate() for length in runs for _ in range(length))
    )


FAULTS: list[Callable[[Patch], None]] = [
    unchained_prefix_key,
    whole_prompt_matched,
    adapter_missing_from_the_namespace,
    blocks_freed_while_a_plan_in_flight_names_them,
    reference_lost_when_a_block_is_shared,
    shared_block_written_without_a_copy,
    copy_forgotten,
    published_before_commit,
    stale_content_of_a_block_handed_out_again,
    pinned_slot_given_to_another_adapter,
    wrong_row_referenced,
    outputs_forgotten_when_a_sequence_joins_again,
    abandoned_load_taken_for_done,
    wrong_guesses_taken_for_computed,
    guesses_made_while_a_sample_is_in_flight,
    adapter_evicted_that_a_caller_has_pinned,
    page_of_a_resident_adapter_given_to_sequences,
    pages_taken_before_the_plan_that_reads_them_retires,
    adapter_used_before_its_copy_is_done,
    floor_ignored_by_sequences,
    floor_ignored_when_sequences_take_pages,
    ceiling_ignored,
    runs_torn_apart,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert first_failure(random_workload) is not None, f"{fault.__name__} went unnoticed in {MAX_WORKLOADS} workloads"


def prefix_spared_that_a_vector_needs(patch: Patch) -> None:
    patch.setattr(KVBlocks, "_may_share", lambda self, seq: True)


def rows_before_the_last_left_out_of_a_vector(patch: Patch) -> None:
    patch.setattr(draft, "_output_of", lambda numbers, *, is_last: RowOutput.POOLED if is_last else RowOutput.NONE)


@pytest.mark.parametrize(
    "fault", [prefix_spared_that_a_vector_needs, rows_before_the_last_left_out_of_a_vector], ids=lambda f: f.__name__
)
def test_planted_fault_of_vectors_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert first_failure(lambda seed: with_numbers(random_workload(seed))) is not None
