"""A plan becomes tensors: the one place that turns slices into rows, slots and block tables."""

from __future__ import annotations

from collections.abc import Callable
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
    slices = plan.slices
    _check_rows(slices, block_size)
    input_ids, late = _host_tokens(slices)
    positions = [p for s in slices for p in range(s.position, s.position + s.num_rows)]
    tables = [s.block_table for s in slices]
    slot_mapping = [
        s.block_table[p // block_size] * block_size + p % block_size
        for s in slices
        for p in range(s.position, s.position + s.num_rows)
    ]
    ids = _to_device(input_ids, device)
    if late:
        ids[_to_device([row for row, _ in late], device)] = torch.stack([resolve(ref) for _, ref in late])
    samples = tuple(
        SampledRow(s.row_end - 1 - s.num_guesses + i, s.seq_id, s.output_position + i, s.lora_slot)
        for s in slices
        if s.output is RowOutput.SAMPLE
        for i in range(1 + s.num_guesses)
    )
    query_starts = (*(s.row_start for s in slices), plan.num_rows)
    contexts = tuple(s.position + s.num_rows for s in slices)
    width = max(len(t) for t in tables)
    return StepInputs(
        input_ids=ids,
        positions=_to_device(positions, device),
        sampled_rows=_to_device([sample.row for sample in samples], device),
        samples=samples,
        attention=AttentionInputs(
            slot_mapping=_to_device(slot_mapping, device),
            block_tables=_to_device([[*t, *([0] * (width - len(t)))] for t in tables], device),
            cu_seqlens=_to_device(query_starts, device, torch.int32),
            context_lens=_to_device(contexts, device, torch.int32),
            query_starts=query_starts,
            context_lengths=contexts,
        ),
        segments=plan.lora_segments,
        sampled_segments=_sampled_segments(samples),
    )


def _check_rows(slices: tuple[SequenceSlice, ...], block_size: int) -> None:
    row = 0
    for s in slices:
        if s.row_start != row or not s.token_ids:
            raise ValueError(f"slice of sequence {s.seq_id} has rows {s.row_start}..{s.row_end - 1}, expected {row}..")
        if len(s.block_table) * block_size < s.position + s.num_rows:
            raise ValueError(
                f"block table of sequence {s.seq_id} covers {len(s.block_table) * block_size} positions, "
                f"its slice reaches {s.position + s.num_rows}"
            )
        row = s.row_end


def _host_tokens(slices: tuple[SequenceSlice, ...]) -> tuple[list[int], list[tuple[int, TokenRef]]]:
    """Token ids by row (0 where not known yet), and the rows that refer to samples in flight."""
    ids: list[int] = []
    late: list[tuple[int, TokenRef]] = []
    for s in slices:
        for token in s.token_ids:
            if isinstance(token, TokenRef):
                late.append((len(ids), token))
                ids.append(0)
            else:
                ids.append(token)
    return ids, late


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


def _to_device(values: object, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    host = torch.tensor(values, dtype=dtype)
    # Pinned memory lets the copy overlap with the device's work instead of waiting for it.
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)
