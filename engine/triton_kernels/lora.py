"""LoRA of many adapters in two launches for all layers that read one input: y += scaling * (x A^T) B, after SGMV
(Punica, arXiv 2310.18547).

The rows of a step are cut into chunks: [first row, rows, slot], int32, at most CHUNK_ROWS of one slot; a chunk without
rows is skipped. Tables on the device say where the weights of a site and slot lie, their rank and scaling: adapters
come and go without a new launch plan, each at its true rank. A chunk of one row is multiplied as a vector, a longer one
as a tile; sums are in float32.

Adapters in int8 are codes, exact in every float type: they are multiplied as they are, and what they count in scales
the low-rank vector. It is then kept in numbers of 16 bits, so b's scales enter as b's largest values, 127 steps each:
a step itself may be less than float16 can hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.triton_kernels.launch import MIN_DOT, upcast

CHUNK_ROWS = 32
_SPLIT_FEATURES = 2048  # of the input, per program
_BLOCK_FEATURES = 128  # of the input, per turn
_BLOCK_RANK = 16
_BLOCK_OUT = 128
_NUM_STEPS = tl.constexpr(127)  # of int8 codes, on either side of zero


@dataclass(frozen=True, slots=True)
class LoraTables:
    """Of all sites and slots, on the device. A rank of 0: the slot has no weights for the site."""

    pointers: Tensor  # [sites, slots, 3] int64: addresses of a [R, in], b [R, out], and scales float32 [2, R] or 0
    ranks: Tensor  # [sites, slots] int32
    scalings: Tensor  # [sites, slots] float32
    are_codes: bool  # a and b are int8; else they have the dtype of x

    @staticmethod
    def empty(num_sites: int, num_slots: int, device: torch.device | str, *, are_codes: bool = False) -> LoraTables:
        return LoraTables(
            torch.zeros((num_sites, num_slots, 3), dtype=torch.int64, device=device),
            torch.zeros((num_sites, num_slots), dtype=torch.int32, device=device),
            torch.zeros((num_sites, num_slots), dtype=torch.float32, device=device),
            are_codes,
        )


@dataclass(frozen=True, slots=True)
class LoraGroup:
    """Sites that read the same input and write side by side into one output."""

    sites: Tensor  # [members] int32
    tiles: Tensor  # [N, 4] int32: member, first column in the output, the same in the member, width of the member
    in_features: int
    out_features: int  # of all members together
    widths_aligned: bool  # every member's width is a multiple of 16

    @staticmethod
    def of(sites: list[int], widths: list[int], in_features: int, device: torch.device | str) -> LoraGroup:
        tiles, begin = [], 0
        for member, width in enumerate(widths):
            tiles += [(member, begin + column, column, width) for column in range(0, width, _BLOCK_OUT)]
            begin += width
        return LoraGroup(
            torch.tensor(sites, dtype=torch.int32, device=device),
            torch.tensor(tiles, dtype=torch.int32, device=device),
            in_features,
            begin,
            all(width % 16 == 0 for width in widths),
        )


@triton.jit
def _shrink_row(
    x, a, target, r, rank, start, end, features,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for k in range(start, end, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        where = a + r[:, None] * features + c[None, :]
        if ALIGNED:
            where = tl.multiple_of(where, [1, 16])
        weights = tl.load(where, mask=(r < rank)[:, None] & (c < end)[None, :], other=0.0)
        row = tl.load(x + c, mask=c < end, other=0.0)
        sums += weights.to(tl.float32) * row.to(tl.float32)[None, :]
    tl.store(target + r, tl.sum(sums, axis=1), mask=r < rank)


@triton.jit
def _shrink_rows(
    x, x_row, num_rows, a, target, low_row, r, rank, start, end, features,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for k in range(start, end, BLOCK_K):
        c = k + tl.arange(0, BLOCK_K)
        where = a + r[None, :] * features + c[:, None]
        if ALIGNED:
            where = tl.multiple_of(where, [16, 1])
        weights = tl.load(where, mask=(r < rank)[None, :] & (c < end)[:, None], other=0.0)
        rows = tl.load(x + m[:, None] * x_row + c[None, :], mask=is_row[:, None] & (c < end)[None, :], other=0.0)
        if UPCAST:
            rows = rows.to(tl.float32)
        acc += tl.dot(rows, weights.to(rows.dtype), input_precision="ieee")
    tl.store(target + m[:, None] * low_row + r[None, :], acc, mask=is_row[:, None] & (r < rank)[None, :])


@triton.jit
def _shrink(
    x, x_row, features, chunks, sites, pointers, ranks, low, low_split, low_row, max_rank,
    NUM_SLOTS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """low[split, rows of the chunk, member] = x a^T over one split of the input; of codes, not scaled yet."""
    chunk, member, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_row = tl.load(chunks + chunk * 3).to(tl.int64)
    num_rows = tl.load(chunks + chunk * 3 + 1)
    entry = tl.load(sites + member) * NUM_SLOTS + tl.load(chunks + chunk * 3 + 2)
    rank = tl.load(ranks + entry)
    if (num_rows == 0) | (rank == 0):
        return
    if CODES:
        a = tl.load(pointers + entry * 3).to(tl.pointer_type(tl.int8))
    else:
        a = tl.load(pointers + entry * 3).to(tl.pointer_type(x.dtype.element_ty))
    start, end = split * SPLIT_K, tl.minimum(split * SPLIT_K + SPLIT_K, features)
    target = low + split * low_split + first_row * low_row + member * max_rank
    rows = x + first_row * x_row
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        if num_rows == 1:
            _shrink_row(rows, a, target, r, rank, start, end, features, BLOCK_K, BLOCK_R, ALIGNED)
        else:
            _shrink_rows(
                rows, x_row, num_rows, a, target, low_row, r, rank, start, end, features,
                BLOCK_M, BLOCK_K, BLOCK_R, ALIGNED, UPCAST,
            )  # fmt: skip


@triton.jit
def _rank_scales(scales, r, rank):
    """What sums of a's codes are multiplied by: a step of a, and the largest value of b."""
    of_a = tl.load(scales + r, mask=r < rank, other=0.0)
    return of_a, tl.load(scales + rank + r, mask=r < rank, other=0.0) * _NUM_STEPS


@triton.jit
def _expand_row(
    y, b, scales, source, low_split, rank, scaling, in_y, in_b, width,
    NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr,
    CODES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    sums = tl.zeros([BLOCK_N], tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        lows = tl.zeros([BLOCK_R], tl.float32)
        for split in range(NUM_SPLITS):
            lows += tl.load(source + split * low_split + r, mask=r < rank, other=0.0)
        if CODES:
            of_a, of_b = _rank_scales(scales, r, rank)
            lows = lows * of_a * of_b
        where = b + r[:, None] * width + in_b[None, :]
        if ALIGNED:
            where = tl.multiple_of(where, [1, 16])
        weights = tl.load(where, mask=(r < rank)[:, None] & (in_b < width)[None, :], other=0.0)
        narrow = lows.to(dtype)  # as PEFT rounds it
        sums += tl.sum(narrow.to(tl.float32)[:, None] * weights.to(tl.float32), axis=0)
    base = tl.load(y + in_y, mask=in_b < width, other=0.0)
    tl.store(y + in_y, (base.to(tl.float32) + scaling * sums).to(base.dtype), mask=in_b < width)


@triton.jit
def _expand_rows(
    y, y_row, num_rows, b, scales, source, low_split, low_row, rank, scaling, in_y, in_b, width,
    NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr, CODES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    is_row = m < num_rows
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_rank in range(0, rank, BLOCK_R):
        r = first_rank + tl.arange(0, BLOCK_R)
        mask = is_row[:, None] & (r < rank)[None, :]
        lows = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        for split in range(NUM_SPLITS):
            lows += tl.load(source + split * low_split + m[:, None] * low_row + r[None, :], mask=mask, other=0.0)
        if CODES:
            of_a, of_b = _rank_scales(scales, r, rank)
            lows = lows * of_a[None, :] * of_b[None, :]
        where = b + r[:, None] * width + in_b[None, :]
        if ALIGNED:
            where = tl.multiple_of(where, [1, 16])
        weights = tl.load(where, mask=(r < rank)[:, None] & (in_b < width)[None, :], other=0.0)
        narrow = lows.to(dtype)  # as PEFT rounds it
        if UPCAST:
            narrow = narrow.to(tl.float32)
        acc += tl.dot(narrow, weights.to(narrow.dtype), input_precision="ieee")
    target = y + m[:, None] * y_row + in_y[None, :]
    mask_y = is_row[:, None] & (in_b < width)[None, :]
    base = tl.load(target, mask=mask_y, other=0.0)
    tl.store(target, (base.to(tl.float32) + scaling * acc).to(base.dtype), mask=mask_y)


@triton.jit
def _expand(
    y, y_row, x, chunks, tiles, sites, pointers, ranks, scalings, low, low_split, low_row, max_rank,
    NUM_SLOTS: tl.constexpr, NUM_SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """y[rows of the chunk, columns of the tile] += scaling * (sum of low over its splits) b. x is not read: b has its
    dtype."""
    dtype: tl.constexpr = x.dtype.element_ty
    chunk, tile = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(chunks + chunk * 3).to(tl.int64)
    num_rows = tl.load(chunks + chunk * 3 + 1)
    member = tl.load(tiles + tile * 4)
    entry = tl.load(sites + member) * NUM_SLOTS + tl.load(chunks + chunk * 3 + 2)
    rank = tl.load(ranks + entry)
    if (num_rows == 0) | (rank == 0):
        return
    scaling = tl.load(scalings + entry)
    scales = tl.load(pointers + entry * 3 + 2).to(tl.pointer_type(tl.float32))
    if CODES:
        b = tl.load(pointers + entry * 3 + 1).to(tl.pointer_type(tl.int8))
        scaling /= _NUM_STEPS
    else:
        b = tl.load(pointers + entry * 3 + 1).to(tl.pointer_type(dtype))
    n = tl.arange(0, BLOCK_N)
    in_y, in_b = tl.load(tiles + tile * 4 + 1) + n, tl.load(tiles + tile * 4 + 2) + n
    width = tl.load(tiles + tile * 4 + 3)
    if ALIGNED:
        width = tl.multiple_of(width, 16)
    source = low + first_row * low_row + member * max_rank
    rows = y + first_row * y_row
    if num_rows == 1:
        _expand_row(
            rows, b, scales, source, low_split, rank, scaling, in_y, in_b, width,
            NUM_SPLITS, BLOCK_N, BLOCK_R, ALIGNED, CODES, dtype,
        )  # fmt: skip
    else:
        _expand_rows(
            rows, y_row, num_rows, b, scales, source, low_split, low_row, rank, scaling, in_y, in_b, width,
            NUM_SPLITS, BLOCK_M, BLOCK_N, BLOCK_R, ALIGNED, UPCAST, CODES, dtype,
        )  # fmt: skip


def add_lora(y: Tensor, x: Tensor, chunks: Tensor, group: LoraGroup, tables: LoraTables, max_rank: int) -> None:
    """y += scaling * (x a^T) b for the rows of the chunks, in place.

    `max_rank`: no rank in the tables is larger. Chunks may follow in any order but share no row.
    Shapes: x [T, in], y [T, all members' out], rows contiguous, y in x's dtype or float32; chunks [N, 3].
    """
    assert x.stride(1) == y.stride(1) == 1
    assert x.shape == (y.shape[0], group.in_features)
    assert y.shape[1] == group.out_features
    num_members, num_splits = group.sites.shape[0], triton.cdiv(group.in_features, _SPLIT_FEATURES)
    low = torch.empty((num_splits, x.shape[0], num_members * max_rank), dtype=torch.float32, device=x.device)
    shared = {
        "NUM_SLOTS": tables.ranks.shape[1],
        "BLOCK_M": max(CHUNK_ROWS, MIN_DOT),
        "BLOCK_R": _BLOCK_RANK,
        "UPCAST": upcast(x.dtype),
        "CODES": tables.are_codes,
    }
    _shrink[(chunks.shape[0], num_members, num_splits)](
        x, x.stride(0), group.in_features, chunks, group.sites, tables.pointers, tables.ranks,
        low, low.stride(0), low.stride(1), max_rank,
        SPLIT_K=_SPLIT_FEATURES, BLOCK_K=_BLOCK_FEATURES, ALIGNED=group.in_features % 16 == 0, num_warps=4, **shared,
    )  # fmt: skip
    _expand[(chunks.shape[0], group.tiles.shape[0])](
        y, y.stride(0), x, chunks, group.tiles, group.sites, tables.pointers, tables.ranks, tables.scalings,
        low, low.stride(0), low.stride(1), max_rank,
        NUM_SPLITS=num_splits, BLOCK_N=_BLOCK_OUT, ALIGNED=group.widths_aligned, num_warps=4, **shared,
    )  # fmt: skip
