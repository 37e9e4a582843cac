"""Codes of 4 and 8 bits out of the words that files hold them in, and into the order of `QuantizedWeight`.

The words are little-endian, as safetensors are and every machine we run on: a word's first byte holds its lowest bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.quant.formats.fields import refuse_module

_MIN_RUN = 8  # inputs that share a scale; with fewer the scales would be larger than the codes


def bytes_of(words: Tensor) -> Tensor:
    """Shapes: any integers [.., n] -> uint8 [.., n * item size], the same memory if it is contiguous."""
    return words.contiguous().view(torch.uint8)


def signed(codes: Tensor) -> Tensor:
    """0 .. 255 to -128 .. 127 by taking 128 away. Shapes: uint8 -> int8, new memory."""
    return (codes ^ 0x80).view(torch.int8)


def zeros_or_none(zeros: Tensor) -> Tensor | None:
    """Zero points in int16; None if there is none but 0."""
    return zeros.to(torch.int16).contiguous() if bool(zeros.any()) else None


def permute_columns(codes: Tensor, order: Tensor, *, nibbles: bool) -> Tensor:
    """Column k of the result is column order[k]. Shapes: codes of `QuantizedWeight` -> the same."""
    if not nibbles:
        return _gather(codes, order)
    even, odd = order[0::2], order[1::2]
    low = (_gather(codes, even // 2) >> _shift(even)) & 15
    return low | ((_gather(codes, odd // 2) >> _shift(odd)) << 4)


def _gather(codes: Tensor, columns: Tensor) -> Tensor:
    """codes[:, columns], in a third of the time."""
    return codes.gather(1, columns.expand(codes.shape[0], -1))


def _shift(columns: Tensor) -> Tensor:
    """Where a column is in its byte: 0 or 4 bits up."""
    return (columns % 2 * 4).to(torch.uint8)


def spread_blocks(scales: Tensor, block_rows: int, out_features: int) -> Tensor:
    """A scale per block of rows to a scale per row. Shapes: [ceil(out / block_rows), g] -> [out, g], contiguous."""
    if block_rows == 1:
        return scales.contiguous()
    return scales.repeat_interleave(block_rows, dim=0)[:out_features].contiguous()


def sorted_groups(name: str, group_of: Tensor, num_groups: int) -> tuple[Tensor, Tensor | None]:
    """The order that puts inputs of one group beside each other, and which group each run of columns is then in.

    A run is the largest size that divides every group: a group, unless the last one is shorter.
    Shapes: integers [in] -> int64 [runs], and int64 [in], or None where columns are in order as they are.
    Raises: ModelNotSupported naming the tensor.
    """
    if int(group_of.min()) < 0 or int(group_of.max()) >= num_groups:
        refuse_module(name, f"it names groups beyond the {num_groups} that there are scales for")
    groups, order = torch.sort(group_of.long(), stable=True)
    run = math.gcd(*torch.unique_consecutive(groups, return_counts=True)[1].tolist())
    if run < _MIN_RUN:
        refuse_module(name, f"groups of sizes that have only the divisor {run} in common; served: {_MIN_RUN} or more")
    in_order = bool((order[1:] > order[:-1]).all())
    return groups[::run], None if in_order else order
