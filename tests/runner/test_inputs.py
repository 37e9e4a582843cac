"""Plans become tensors."""

from __future__ import annotations

import pytest
import torch

from engine.core.plan import LoraSegment, RowOutput, SequenceSlice, StepPlan, TokenRef
from engine.runner.inputs import InputBuilder, StepInputs

CPU = torch.device("cpu")


def make_slice(row: int, tokens: tuple, position: int, table: tuple[int, ...], slot: int = 0, **kw) -> SequenceSlice:
    defaults = {"seq_id": row, "output": RowOutput.SAMPLE, "output_position": 0}
    return SequenceSlice(
        row_start=row, token_ids=tokens, position=position, block_table=table, lora_slot=slot, **(defaults | kw)
    )


def build(*slices: SequenceSlice, segments: tuple[LoraSegment, ...] = ()) -> StepInputs:
    plan = StepPlan(plan_id=7, slices=slices, lora_segments=segments)
    return InputBuilder(4, CPU, lambda ref: torch.tensor(100 * ref.plan_id + ref.row)).build(plan)


def test_rows_are_laid_out_in_the_plan_s_order() -> None:
    inputs = build(
        make_slice(0, (5, 6, 7), 3, (9, 2), output=RowOutput.NONE),
        make_slice(3, (8,), 8, (4, 1, 6)),
        make_slice(4, (1, 2), 0, (3,)),
    )
    assert inputs.input_ids.tolist() == [5, 6, 7, 8, 1, 2]
    assert inputs.positions.tolist() == [3, 4, 5, 8, 0, 1]
    attention = inputs.attention
    assert attention.slot_mapping.tolist() == [9 * 4 + 3, 2 * 4 + 0, 2 * 4 + 1, 6 * 4 + 0, 3 * 4 + 0, 3 * 4 + 1]
    assert attention.block_tables.tolist() == [[9, 2, 0], [4, 1, 6], [3, 0, 0]]
    assert attention.query_starts == (0, 3, 4, 6)
    assert attention.context_lengths == (6, 9, 2)
    assert inputs.sampled_rows.tolist() == [3, 5]
    assert [s.seq_id for s in inputs.samples] == [3, 4]


def test_a_token_in_flight_is_taken_from_the_plan_that_samples_it() -> None:
    inputs = build(make_slice(0, (5, TokenRef(6, 2)), 3, (9, 2)), make_slice(2, (TokenRef(5, 0),), 0, (1,)))
    assert inputs.input_ids.tolist() == [5, 602, 500]


def test_guesses_have_rows_of_their_own_whose_samples_follow_each_other() -> None:
    inputs = build(
        make_slice(0, (5,), 3, (9,)),
        make_slice(1, (6, 7, 8, 9), 2, (4, 2), slot=3, num_guesses=2),  # two known tokens, two guesses
        segments=(LoraSegment(1, 5, 3),),
    )
    assert inputs.sampled_rows.tolist() == [0, 2, 3, 4]
    first = inputs.samples[1].output_position
    assert [s.output_position for s in inputs.samples[1:]] == [first, first + 1, first + 2]
    assert inputs.sampled_segments == (LoraSegment(1, 4, 3),)


def test_sampled_rows_have_lora_segments_of_their_own() -> None:
    inputs = build(
        make_slice(0, (1,), 0, (0,), slot=2),
        make_slice(1, (1, 1), 0, (1,), slot=2),
        make_slice(3, (1,), 0, (2,), slot=1, output=RowOutput.NONE),
        make_slice(4, (1,), 0, (3,)),
        make_slice(5, (1,), 0, (4,), slot=3),
        segments=(LoraSegment(0, 3, 2), LoraSegment(3, 4, 1), LoraSegment(5, 6, 3)),
    )
    assert inputs.segments == (LoraSegment(0, 3, 2), LoraSegment(3, 4, 1), LoraSegment(5, 6, 3))
    assert inputs.sampled_segments == (LoraSegment(0, 2, 2), LoraSegment(3, 4, 3))


def test_a_step_may_sample_nothing() -> None:
    inputs = build(make_slice(0, (1, 2), 0, (0,), output=RowOutput.NONE))
    assert inputs.sampled_rows.shape == (0,)
    assert inputs.sampled_segments == ()


def test_a_table_that_does_not_cover_its_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="covers 4 positions, its slice reaches 5"):
        build(make_slice(0, (1, 2), 3, (0,)))


def test_slices_must_follow_each_other() -> None:
    with pytest.raises(ValueError, match=r"rows 2\.\.2, expected 1"):
        build(make_slice(0, (1,), 0, (0,)), make_slice(2, (1,), 0, (1,)))


def test_block_tables_of_one_step_after_another_are_each_their_own() -> None:
    """Rows that stay are not written again; those of other sequences, longer or shorter, are."""
    builder = InputBuilder(4, CPU, lambda ref: torch.tensor(0))
    long, short = (5, 6, 7, 8, 9), (3,)
    for tables in ([short], [short, long], [long, short], [short], [long, (1, 2), short], [(1, 2), long, long]):
        slices = tuple(make_slice(row, (0,), len(table) * 4 - 1, table) for row, table in enumerate(tables))
        found = builder.build(StepPlan(plan_id=1, slices=slices)).attention.block_tables
        width = max(map(len, tables))
        assert found.tolist() == [[*table, *[0] * (width - len(table))] for table in tables]
