"""A plan becomes tensors: the one place that turns slices into rows, slots and block tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from engine.core.plan import NO_LORA, LoraSegment, RowOutput, SequenceSlice, StepPlan, TokenRef
from engine.kv.backend import AttentionInputs
from engine.to_device import to_device, upload


class SampledRow(NamedTuple):
    """A row whose logits choose a token: the token at `output_position` of its sequence."""

    row: int
    seq_id: int
    output_position: int
    lora_slot: int
    guess: int | None = None  # the row's own token, if that is a guess


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What one forward reads. Rows are in the plan's order."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    sampled_rows: torch.Tensor  # [N] int64: rows whose logits are wanted
    samples: tuple[SampledRow, ...]  # N, in the same order, but for those of `scored`
    attention: AttentionInputs
    segments: tuple[LoraSegment, ...]  # of the T rows
    sampled_segments: tuple[LoraSegment, ...]  # of the N sampled rows
    scored: tuple[int, ...] = ()  # which of the N rows choose no token: their logits themselves are wanted
    pools: bool = False  # hidden states of all rows are wanted
    lengths: torch.Tensor | None = None  # [T] int64: tokens of the text by which a row is rotated, where that counts


class InputBuilder:
    """Turns plans into tensors. The block tables of one step are good until the next is built.

    `resolve` gives the sampled token of an earlier plan as a tensor [] on the device: no waiting for the host.
    """

    def __init__(
        self,
        block_size: int,
        device: torch.device,
        resolve: Callable[[TokenRef], torch.Tensor],
        *,
        with_lengths: bool = False,
    ) -> None:
        self._block_size, self._device, self._resolve = block_size, device, resolve
        self._with_lengths = with_lengths
        self._tables = _BlockTables()

    def build(self, plan: StepPlan) -> StepInputs:
        """Tensors of a plan that has slices.

        Raises: ValueError if the plan's slices do not follow each other or a block table is too short.
        """
        rows = _Rows(self._block_size)
        for piece in plan.slices:
            rows.add(piece)
        wanted, device = tuple(rows.samples), self._device
        sampled = [sample.row for sample in wanted]
        scored = tuple(rows.scored)
        samples = wanted if not scored else tuple(one for i, one in enumerate(wanted) if i not in rows.scored)
        # One copy to the device for all that is new in every step.
        packed = upload([*rows.token_ids, *rows.positions, *rows.slots, *sampled], device)
        num_rows = len(rows.token_ids)
        ids, positions, slots, sampled_rows = packed.split_with_sizes([num_rows, num_rows, num_rows, len(sampled)])
        if rows.late:
            late = upload([row for row, _ in rows.late], device)
            ids[late] = torch.stack([self._resolve(ref) for _, ref in rows.late])
        return StepInputs(
            input_ids=ids,
            positions=positions,
            sampled_rows=sampled_rows,
            samples=samples,
            attention=AttentionInputs(
                slot_mapping=slots,
                block_tables=to_device(self._tables.matrix(rows.tables), device),
                query_starts=tuple(rows.starts),
                context_lengths=tuple(rows.contexts),
            ),
            segments=plan.lora_segments,
            sampled_segments=_sampled_segments(wanted),
            scored=scored,
            pools=rows.pools,
            lengths=_lengths(plan, device) if self._with_lengths else None,
        )


def _lengths(plan: StepPlan, device: torch.device) -> torch.Tensor:
    rows = [max(piece.rope_tokens, piece.position + i + 1) for piece in plan.slices for i in range(piece.num_rows)]
    return upload(rows, device)


class _BlockTables:
    """The block tables of a step as one matrix. Most are those of the step before: only the others are written."""

    def __init__(self) -> None:
        self._matrix = np.zeros((0, 0), dtype=np.int64)
        self._written: list[tuple[int, ...] | None] = []  # by row

    def matrix(self, tables: list[tuple[int, ...]]) -> torch.Tensor:
        """[S, longest], padded with block 0: a view that the next call changes."""
        num_rows, width = len(tables), max(map(len, tables))
        if num_rows > self._matrix.shape[0] or width > self._matrix.shape[1]:
            sizes = (max(num_rows, self._matrix.shape[0]), max(2 * width, self._matrix.shape[1]))
            self._matrix, self._written = np.zeros(sizes, dtype=np.int64), [None] * sizes[0]
        for row, table in enumerate(tables):
            if self._written[row] is not table:  # a sequence keeps its tuple until it gets another block
                self._matrix[row, : len(table)] = table
                self._matrix[row, len(table) :] = 0
                self._written[row] = table
        return torch.from_numpy(self._matrix[:num_rows, :width])


class _Rows:
    """The rows of the slices added so far, on the host. One pass: this is done for every sequence in every step."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self.token_ids: list[int] = []  # 0 where not known yet
        self.late: list[tuple[int, TokenRef]] = []  # rows that refer to samples in flight
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.samples: list[SampledRow] = []
        self.scored: list[int] = []  # which of them choose no token
        self.pools = False
        self.starts = [0]  # one more than slices
        self.contexts: list[int] = []
        self.tables: list[tuple[int, ...]] = []

    def add(self, piece: SequenceSlice) -> None:
        """Raises: ValueError if slices do not follow each other or a block table is too short."""
        seq_id, start, tokens, position, table, lora_slot, output, output_position, num_guesses, _ = piece
        num_rows, size = len(tokens), self._block_size
        end, row_end = position + num_rows, start + num_rows
        if start != self.starts[-1] or not num_rows or len(table) * size < end:
            self._refuse(piece)
        for row, token in enumerate(tokens, start):
            if isinstance(token, TokenRef):
                self.late.append((row, token))
                token = 0
            self.token_ids.append(token)
        if num_rows == 1:  # nearly always
            self.positions.append(position)
            self.slots.append(table[position // size] * size + position % size)
        else:
            self.positions += range(position, end)
            self.slots += [table[p // size] * size + p % size for p in range(position, end)]
        if output is RowOutput.SAMPLE:
            first = row_end - 1 - num_guesses
            for i in range(1 + num_guesses):
                guess = self.token_ids[first + i] if i else None
                self.samples.append(SampledRow(first + i, seq_id, output_position + i, lora_slot, guess))
        elif output is RowOutput.LOGITS:
            self.scored.append(len(self.samples))
            self.samples.append(SampledRow(row_end - 1, seq_id, output_position, lora_slot))
        elif output is not RowOutput.NONE:
            self.pools = True
        self.starts.append(row_end)
        self.contexts.append(end)
        self.tables.append(table)

    def _refuse(self, piece: SequenceSlice) -> NoReturn:
        row, end = self.starts[-1], piece.position + piece.num_rows
        if piece.row_start != row or not piece.token_ids:
            raise ValueError(
                f"slice of sequence {piece.seq_id} has rows {piece.row_start}..{piece.row_end - 1}, expected {row}.."
            )
        covered = len(piece.block_table) * self._block_size
        raise ValueError(f"block table of sequence {piece.seq_id} covers {covered} positions, its slice reaches {end}")


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
