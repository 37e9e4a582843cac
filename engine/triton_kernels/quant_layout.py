"""How the kernels for quantized weights want codes, scales and zeros to lie: repacked once, when a model is loaded.

Codes lie in blocks of columns, and in a block row by row, so that what a program reads is one range of memory.

    4 bits   int32 [blocks, out, J], 8 J columns to a block. Word j has columns 2j and 2j + 1 of each quarter of its
             block: quarter p in bits 4p .. 4p + 3 (even) and 16 + 4p .. 16 + 4p + 3 (odd). One shift and one mask
             then leave two neighbouring columns in the halves of a register, as tensor cores take them.
    8 bits   [blocks, out, C] bytes, C columns to a block

A `part` is what one product of tiles sums over: a quarter of a block of 4 bits, a block of 8. It lies in one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["int4", "int8", "nf4", "fp8"]
_FOUR_BITS = ("int4", "nf4")
_QUARTERS = 4
MOST_ZERO = {"int4": 100, "nf4": 100, "int8": 128, "fp8": 128}
"""Beyond, a code less its zero (of int4: and what its bits stand for besides) is no whole number of bfloat16."""
_ROW_BYTES = 64 << 20  # of codes that are repacked at once


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PackedWeight:
    """A quantized weight [out, in] for `quant_linear`."""

    kind: Kind
    codes: Tensor  # [blocks, out, ..]
    scales: Tensor  # [groups, out], in the narrowest type that holds them
    zeros: Tensor | None  # int16 [groups, out]; None: 0
    columns: Tensor | None  # int64: the input of each column of the codes (in_features: none); None: as they come
    table: Tensor | None  # [16]: the values of codes that are no numbers, best in the type of x
    in_features: int
    num_columns: int  # of the codes, without what fills the last block
    group_size: int  # columns that share a scale, whole parts of them; a single group may end earlier
    block_columns: int
    part_columns: int

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[1])

    @property
    def takes_int8(self) -> bool:
        """Whether rows of int8 can be multiplied with the codes as they are."""
        return self.kind == "int8" and self.zeros is None and self.scales.shape[0] == 1

    def arrange(self, x: Tensor) -> Tensor:
        """The inputs in the order of the codes' columns. Shapes: [T, in] -> [T, num_columns]."""
        if self.columns is None:
            return x
        if self.num_columns != self.in_features:
            x = functional.pad(x, (0, 1))
        return x.index_select(1, self.columns)


def pack_weight(
    kind: Kind,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    order: Tensor | None = None,
    table: Tensor | None = None,
) -> PackedWeight:
    """Repack a weight.

    int4: codes 0 .. 15 stand for -8 .. 7. nf4: codes are places in `table`.
    Shapes: codes [out, in], or [out, in / 2] with two to a byte, the even column in the low half; scales and zeros
    [out, groups]; order [in]: column k of the codes belongs to input order[k]; table [16].
    Raises: ValueError for a zero that the kernels cannot hold.
    """
    per_byte = 2 if kind in _FOUR_BITS else 1
    in_features, groups = codes.shape[1] * per_byte, scales.shape[1]
    group_size = in_features // groups
    if zeros is not None and int(zeros.abs().max()) > MOST_ZERO[kind]:
        raise ValueError(f"a zero of {int(zeros.abs().max())} is more than {MOST_ZERO[kind]}, the most for {kind}")
    columns, least = order, 32
    if groups > 1 and group_size % least:
        inputs = torch.arange(in_features, device=codes.device) if order is None else order
        columns = _fill_groups(inputs, group_size, least, in_features)
        group_size = len(columns) // groups
    block, part = _block_of(kind, in_features if groups == 1 else group_size * groups, groups, group_size)
    return PackedWeight(
        kind=kind,
        codes=_pack_codes(kind, codes, columns if columns is not order else None, groups, block),
        scales=_narrow(scales).t().contiguous(),
        zeros=None if zeros is None else zeros.to(torch.int16).t().contiguous(),
        columns=columns,
        table=table,
        in_features=in_features,
        num_columns=in_features if columns is None else len(columns),
        group_size=group_size if groups > 1 else -(-in_features // block) * block,
        block_columns=block,
        part_columns=part,
    )


def _fill_groups(inputs: Tensor, group_size: int, least: int, none: int) -> Tensor:
    """The columns, with each group filled up by columns that belong to no input to a multiple of `least`."""
    return functional.pad(inputs.view(-1, group_size), (0, -group_size % least), value=none).flatten()


def _block_of(kind: Kind, num_columns: int, groups: int, group_size: int) -> tuple[int, int]:
    """Columns of a block and of a part."""
    if kind in _FOUR_BITS:
        part = 64 if num_columns % 256 == 0 and (groups == 1 or group_size % 64 == 0) else 32
        return _QUARTERS * part, part
    part = next(size for size in (128, 64, 32) if groups == 1 or group_size % size == 0)
    return part, part


def _pack_codes(kind: Kind, codes: Tensor, filled: Tensor | None, groups: int, block: int) -> Tensor:
    """`filled`: as `_fill_groups` gives it."""
    out, step = codes.shape[0], max(1, _ROW_BYTES // (4 * codes.shape[1]))
    parts = [_pack_rows(kind, codes[row : row + step], filled, groups, block) for row in range(0, out, step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _pack_rows(kind: Kind, codes: Tensor, filled: Tensor | None, groups: int, block: int) -> Tensor:
    rows = codes.shape[0]
    if kind in _FOUR_BITS:
        values = torch.stack([codes & 15, codes >> 4], dim=-1).view(rows, -1)
    else:
        values = codes.view(torch.uint8)
    if filled is not None:
        width = len(filled) // groups
        values = functional.pad(values.reshape(rows, groups, -1), (0, width - values.shape[1] // groups)).flatten(1)
    values = functional.pad(values, (0, -values.shape[1] % block))
    blocks = values.view(rows, -1, block).transpose(0, 1)
    if kind not in _FOUR_BITS:
        return blocks.contiguous().view(torch.int8)
    quarters = blocks.reshape(blocks.shape[0], rows, _QUARTERS, -1, 2).int()  # [blocks, out, p, J, even or odd]
    words = torch.zeros_like(quarters[:, :, 0, :, 0])
    for p in range(_QUARTERS):
        words |= (quarters[:, :, p, :, 0] << 4 * p) | (quarters[:, :, p, :, 1] << (16 + 4 * p))
    return words.contiguous()


def _narrow(scales: Tensor) -> Tensor:
    """In the narrowest type that holds them exactly: formats store scales in 16 bits."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales):
            return scales.to(dtype)
    return scales
