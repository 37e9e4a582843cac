"""What holds of the rows of every plan, whoever executes it."""

from __future__ import annotations

from engine.core.limits import SchedulerConfig
from engine.core.plan import NO_LORA, LoraSegment, StepPlan


def check_rows(plan: StepPlan, config: SchedulerConfig) -> None:
    """Raises: AssertionError."""
    row = 0
    for piece in plan.slices:
        assert piece.row_start == row, f"row {row} is in no slice"
        assert piece.num_rows, f"the slice of sequence {piece.seq_id} has no rows"
        row = piece.row_end
    assert row <= config.max_num_batched_tokens, f"{row} rows"
    ids = [piece.seq_id for piece in plan.slices]
    assert len(set(ids)) == len(ids) <= config.max_num_seqs, f"slices of {ids}"
    expected: list[LoraSegment] = []
    for piece in plan.slices:
        if expected and piece.lora_slot == expected[-1].slot and expected[-1].row_end == piece.row_start:
            expected[-1] = LoraSegment(expected[-1].row_start, piece.row_end, piece.lora_slot)
        elif piece.lora_slot != NO_LORA:
            expected.append(LoraSegment(piece.row_start, piece.row_end, piece.lora_slot))
    assert plan.lora_segments == tuple(expected), f"segments should be {expected}"
    assert len({segment.slot for segment in expected}) == len(expected), "an adapter's rows are not neighbours"
