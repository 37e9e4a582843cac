"""PlanDraft: a plan while it is put together; Flight: a plan while the device has it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

from engine.core.adapter_slots import AdapterOp
from engine.core.plan import (
    NO_LORA,
    BlockCopy,
    LoraSegment,
    RowOutput,
    SequenceSlice,
    SequenceStart,
    StepPlan,
    TokenRef,
)
from engine.core.sequence import Sequence
from engine.pooling import NextToken, Numbers


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan in flight, the sequences of its slices in their order, and the blocks it keeps from being freed."""

    plan: StepPlan
    sequences: tuple[Sequence, ...]
    held_blocks: tuple[int, ...]  # sources of its block copies


class PlanDraft:
    """Collects the slices of one step; no sequence changes until `build`.

    Invariant: the rows of all slices together never exceed `max_rows`.
    """

    def __init__(self, plan_id: int, max_rows: int) -> None:
        self.plan_id = plan_id
        self.rows_left = max_rows
        self.block_copies: list[BlockCopy] = []
        self.adapter_ops: list[AdapterOp] = []
        self._starts: list[SequenceStart] = []
        self._entries: list[tuple[int, Sequence, int, tuple[int, ...]]] = []  # (LoRA slot, sequence, rows, guesses)

    @property
    def has_rows(self) -> bool:
        return bool(self._entries)

    def has_start_of(self, seq: Sequence) -> bool:
        return any(start.seq_id == seq.seq_id for start in self._starts)

    @property
    def num_slices(self) -> int:
        return len(self._entries)

    def add(self, seq: Sequence, num_rows: int) -> None:
        """A slice of the next `num_rows` tokens of `seq`."""
        assert 0 < num_rows <= self.rows_left, f"{num_rows} rows, {self.rows_left} left"
        self._entries.append((seq.lora_slot, seq, num_rows, ()))
        self.rows_left -= num_rows
        if not seq.is_started:
            self._starts.append(seq.start())
            seq.is_started = True

    def add_guesses(self, index: int, guesses: tuple[int, ...]) -> None:
        """Guesses behind the slice that was the `index`th to be added."""
        assert len(guesses) <= self.rows_left, f"{len(guesses)} guesses, {self.rows_left} rows left"
        lora_slot, seq, num_rows, _ = self._entries[index]
        self._entries[index] = (lora_slot, seq, num_rows, guesses)
        self.rows_left -= len(guesses)

    def build(self, ends: Iterable[int]) -> Flight:
        """The plan; its sequences count as computed that far from here on."""
        self._entries.sort(key=itemgetter(0))  # stable: neighbours share an adapter, the rest keeps its order
        slices: list[SequenceSlice] = []
        row = 0
        for lora_slot, seq, num_rows, guesses in self._entries:
            slices.append(self._slice(seq, num_rows, guesses, row, lora_slot))
            row += num_rows + len(guesses)
        plan = StepPlan(
            plan_id=self.plan_id,
            slices=tuple(slices),
            lora_segments=lora_segments(slices),
            starts=tuple(self._starts),
            ends=tuple(ends),
            adapter_ops=tuple(self.adapter_ops),
            block_copies=tuple(self.block_copies),
        )
        sequences = tuple(seq for _, seq, _, _ in self._entries)
        return Flight(plan, sequences, tuple(copy.src for copy in self.block_copies))

    def _slice(self, seq: Sequence, num_rows: int, guesses: tuple[int, ...], row: int, lora_slot: int) -> SequenceSlice:
        position = seq.num_computed_tokens
        num_tokens = seq.num_tokens
        is_last = position + num_rows == num_tokens
        numbers = seq.request.numbers
        samples = is_last and numbers is None
        if seq.table is None:
            seq.table = tuple(seq.block_table)
        inputs = seq.next_inputs(num_rows) + guesses
        seq.num_computed_tokens = position + len(inputs)
        seq.num_in_flight += 1
        if samples:
            seq.num_pending += 1 + len(guesses)
            seq.last_sample = TokenRef(self.plan_id, row + num_rows - 1)
        output = RowOutput.SAMPLE if samples else RowOutput.NONE
        if numbers is not None:
            output = _output_of(numbers, is_last=is_last)
        output_position = num_tokens - len(seq.prompt)
        return SequenceSlice(
            seq.seq_id,
            row,
            inputs,
            position,
            seq.table,
            lora_slot,
            output,
            output_position,
            len(guesses),
            seq.rope_tokens,
        )


def _output_of(numbers: Numbers, *, is_last: bool) -> RowOutput:
    if is_last:
        return RowOutput.LOGITS if isinstance(numbers, NextToken) else RowOutput.POOLED
    return RowOutput.PART if numbers.needs_all_rows else RowOutput.NONE


def lora_segments(slices: list[SequenceSlice]) -> tuple[LoraSegment, ...]:
    """Runs of rows with the same adapter; the base model's rows are in none."""
    segments: list[LoraSegment] = []
    start = end = 0
    slot = NO_LORA
    for piece in slices:
        if piece.lora_slot != slot:
            if slot != NO_LORA:
                segments.append(LoraSegment(start, end, slot))
            slot, start = piece.lora_slot, piece.row_start
        end = piece.row_end
    if slot != NO_LORA:
        segments.append(LoraSegment(start, end, slot))
    return tuple(segments)
