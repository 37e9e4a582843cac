"""The same of windows: what may be dropped, when, and what hangs on it. Each mistake is planted, and must be found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from engine.core.block_pool import NULL_BLOCK
from engine.core.kv_blocks import KVBlocks, Placement
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from tests.core.play import MAX_WORKLOADS, first_failure
from tests.support.strategies import window_workload

Patch = pytest.MonkeyPatch


def window_one_token_too_narrow(patch: Patch) -> None:
    patch.setattr(KVBlocks, "_num_unseen", _num_unseen_of(-1))


def blocks_dropped_that_a_row_in_flight_sees(patch: Patch) -> None:
    """What a plan was given to compute passes for computed."""

    def slide(self: KVBlocks, seq: Sequence) -> None:
        num_unseen = min(self._num_unseen(seq.num_computed_tokens + 2), len(seq.block_table) - 1)
        for index in range(seq.num_dropped_blocks, num_unseen):
            self.pool.release(seq.block_table[index])
            seq.block_table[index] = NULL_BLOCK
        seq.num_dropped_blocks = max(seq.num_dropped_blocks, num_unseen)
        seq.table = None

    patch.setattr(KVBlocks, "slide", slide)
    patch.setattr(Scheduler, "check_invariants", lambda self: None)


def blocks_dropped_too_late(patch: Patch) -> None:
    """A text holds a block more than was counted for it."""
    patch.setattr(KVBlocks, "_num_unseen", _num_unseen_of(4))


def sibling_followed_that_has_dropped_what_is_seen(patch: Patch) -> None:
    original = KVBlocks.place

    def place(self: KVBlocks, seq: Sequence, source: Sequence | None) -> Placement:
        if source is None:
            return original(self, seq, source)
        dropped, source.num_dropped_blocks = source.num_dropped_blocks, 0
        try:
            return original(self, seq, source)
        finally:
            source.num_dropped_blocks = dropped

    patch.setattr(KVBlocks, "place", place)


def chain_goes_on_behind_a_block_that_is_gone(patch: Patch) -> None:
    """What follows a dropped block is found by whoever has the same tokens there, whatever came before."""
    original = KVBlocks.publish

    def publish(self: KVBlocks, seq: Sequence) -> None:
        while seq.num_published_blocks < seq.num_dropped_blocks:
            seq.num_published_blocks += 1
        original(self, seq)

    patch.setattr(KVBlocks, "publish", publish)


def _num_unseen_of(more_tokens: int) -> Callable[[KVBlocks, int], int]:
    def num_unseen(self: KVBlocks, position: int) -> int:
        if self._window is None:
            return 0
        return max(0, position - self._window - more_tokens + 1) // self._block_size

    return num_unseen


FAULTS: list[Callable[[Patch], None]] = [
    window_one_token_too_narrow,
    blocks_dropped_that_a_row_in_flight_sees,
    blocks_dropped_too_late,
    sibling_followed_that_has_dropped_what_is_seen,
    chain_goes_on_behind_a_block_that_is_gone,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_planted_fault_with_windows_is_caught(fault: Callable[[Patch], None], monkeypatch: Patch) -> None:
    fault(monkeypatch)
    assert first_failure(window_workload) is not None, f"{fault.__name__} went unnoticed in {MAX_WORKLOADS} workloads"
