"""A plan becomes tensors: the one place that turns slices into rows, slots and block tables."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.core.plan import NO_LORA, LoraSegment, RowOutput, SequenceSlice, StepPlan, TokenRef
from engine.kv.backend import AttentionInputs


class SampledRow(NamedTuple):
    """A row whose logits choose a token: the token at `output_position` of its sequence."""

    row: int
    seq_id: int
    output_position: int
    lora_slot: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one forward reads. Rows are in the plan's order."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sampled_rows: torch.Tensor  # [N] int64: rows whose logits are wanted
    samples: tuple[SampledRow, ...]  # N, in the same order
    attention: AttentionInputs
    segments: tuple[LoraSegment, ...]  # of the T rows
    sampled_segments: tuple[LoraSegment, ...]  # of the N sampled rows


def build_inputs(
    plan: StepPlan,
    block_size: int,
    device: torch.device,
    resolve: Callable[[TokenRef], torch.Tensor],
) -> StepInputs:
    """Tensors of a plan that has slices.

    `resolve` gives the sampled token of an earlier plan as a tensor [] on the device: no waiting for the host.
    Raises: ValueError if the plan's slices do not follow each other or a block table is too short.
    """
    rows = _Rows(block_size)
    for piece in plan.slices:
        rows.add(piece)
    ids = _to_device(rows.token_ids, device)
    if rows.late:
        ids[_to_device([row for row, _ in rows.late], device)] = torch.stack([resolve(ref) for _, ref in rows.late])
    width = max(map(len, rows.tables))
    samples = tuple(rows.samples)
    return StepInputs(
        input_ids=ids,
        positions=_to_device(rows.positions, device),
        sampled_rows=_to_device([sample.row for sample in samples], device),
        samples=samples,
        attention=AttentionInputs(
            slot_mapping=_to_device(rows.slots, device),
            block_tables=_to_device(_padded(rows.tables, width), device).view(len(rows.tables), width),
            cu_seqlens=_to_device(rows.starts, device, torch.int32),
            context_lens=_to_device(rows.contexts, device, torch.int32),
            query_starts=tuple(rows.starts),
            context_lengths=tuple(rows.contexts),
        ),
        segments=plan.lora_segments,
        sampled_segments=_sampled_segments(samples),
    )


class _Rows:
    """The rows of the slices added so far, on the host. One pass: this is done for every sequence in every step."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.token_ids: list[int] = []  # 0 where not known yet
        self.late: list[tuple[int, TokenRef]] = []  # rows that refer to samples in flight
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.samples: list[SampledRow] = []
        self.starts = [0]  # one more than slices
        self.contexts: list[int] = []
        self.tables: list[tuple[int, ...]] = []

    def add(self, piece: SequenceSlice) -> None:
        """Raises: ValueError if slices do not follow each other or a block table is too short."""
        seq_id, start, tokens, position, table, lora_slot, output, output_position, num_guesses = piece
        end, row_end, size = position + len(tokens), start + len(tokens), self._block_size
        self._check(piece, end)
        for row, token in enumerate(tokens, start):
            if isinstance(token, TokenRef):
                self.late.append((row, token))
                token = 0
            self.token_ids.append(token)
        for p in range(position, end):
            self.positions.append(p)
            self.slots.append(table[p // size] * size + p % size)
        if output is RowOutput.SAMPLE:
            for i in range(1 + num_guesses):
                self.samples.append(SampledRow(row_end - 1 - num_guesses + i, seq_id, output_position + i, lora_slot))
        self.starts.append(row_end)
        self.contexts.append(end)
        self.tables.append(table)

    def _check(self, piece: SequenceSlice, end: int) -> None:
        row = self.starts[-1]
        if piece.row_start != row or not piece.token_ids:
            raise ValueError(
                f"slice of sequence {piece.seq_id} has rows {piece.row_start}..{piece.row_end - 1}, expected {row}.."
            )
        covered = len(piece.block_table) * self._block_size
        if covered < end:
            raise ValueError(
                f"block table of sequence {piece.seq_id} covers {covered} positions, its slice reaches {end}"
            )


def _sampled_segments(samples: tuple[SampledRow, ...]) -> tuple[LoraSegment, ...]:
    """Which sampled rows (numbered from 0) use which LoRA slot; neighbours of one slot merged."""
    segments: list[LoraSegment] = []
    for i, s in enumerate(samples):
        if s.lora_slot == NO_LORA:
            continue
        if segments and segments[-1].slot == s.lora_slot and segments[-1].row_end == i:
            segments[-1] = LoraSegment(segments[-1].row_start, i + 1, s.lora_slot)
        else:
            segments.append(LoraSegment(i, i + 1, s.lora_slot))
    return tuple(segments)


def _padded(tables: list[tuple[int, ...]], width: int) -> list[int]:
    zeros = [0] * width
    flat: list[int] = []
    for table in tables:
        flat += table
        flat += zeros[len(table) :]
    return flat


def _to_device(values: Iterable[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    # torch reads a list number by number, some with a dozen calls each; an array is read as it is.
    numbers = array("q" if dtype is torch.int64 else "i", values)
    host = torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)
    # Pinned memory lets the copy overlap with the device's work instead of waiting for it.
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
