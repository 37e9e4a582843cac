"""y = x W^T + bias with a quantized W, which is read once and becomes numbers inside the product.

The weight is the left operand, in registers, and the rows of x the right one: codes go from memory to tensor cores
without a detour. Whole numbers stay whole (both 16-bit types hold them), and scales multiply sums of a part of the
columns in float32, so a weight is not rounded again. Two kernels:

    few rows     each program has some outputs and all columns, a slice of them on each of its warps
    many rows    tiles of outputs and rows; where they are too few for the device the columns are split between
                 programs, whose sums are added up in a fixed order

A row's result depends on the class of the number of rows (`_tile_of`), never on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.triton_kernels.launch import upcast
from engine.triton_kernels.quant_layout import PackedWeight

FEW_ROWS = 16
_SLICES = 4
_WIDE_OUT = 8192  # outputs above which programs of few rows take more of them
_PROGRAMS = 264  # two for each multiprocessor of a Hopper GPU; no property of the device, so that sums are the same
_MOST_SPLITS = 8


@triton.jit
def _numbers(
    raw, part, offset, table,
    KIND: tl.constexpr, MAGIC: tl.constexpr, HAS_ZEROS: tl.constexpr, SHAPE: tl.constexpr, dtype: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Codes of one part as numbers of `dtype`, less their zeros (`offset`), unless MAGIC leaves that to the caller.

    MAGIC: a code in the lowest bits of the mantissa of 128 (bfloat16) or 1024 (float16) is that number and the code.
    int8: the codes themselves, for rows that are int8 too.
    """
    if dtype == tl.int8:
        return raw
    if KIND == "int4" or KIND == "nf4":
        pairs = (raw >> (4 * part)) & 0x000F000F
        if MAGIC:
            pairs = pairs | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
            low = (pairs & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
            high = (pairs >> 16).to(tl.int16).to(dtype, bitcast=True)
        elif KIND == "int4":
            low, high = (pairs & 0xF).to(tl.float32) - 8.0, (pairs >> 16).to(tl.float32) - 8.0
        else:
            low, high = tl.load(table + (pairs & 0xF)), tl.load(table + (pairs >> 16))
        numbers = tl.reshape(tl.join(low, high), SHAPE)
    elif KIND == "int8":
        numbers = raw.to(tl.float32)
    else:  # sign, exponent and mantissa where a float32 has them; its exponent counts from 2^120 further down
        bits = (raw.to(tl.int32) << 20) & -0x78100000
        numbers = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    if UPCAST:
        numbers = numbers.to(tl.float32)
    if HAS_ZEROS and not MAGIC:
        numbers = numbers.to(tl.float32) - offset
    return numbers if UPCAST else numbers.to(dtype)


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows(
    x, codes, scales, zeros, table, bias, row_scales, y,
    x_row, y_row, num_rows, num_columns, out_features, num_blocks, group_size,
    KIND: tl.constexpr, MAGIC: tl.constexpr, MAGIC_OFFSET: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_SCALES: tl.constexpr, ONE_GROUP: tl.constexpr, UPCAST: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLICES: tl.constexpr, BLOCK_K: tl.constexpr,
    PART_K: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dtype: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    is_out, is_row = n < out_features, m < num_rows
    word, column = tl.arange(0, WIDTH), tl.arange(0, PART_K)
    sum_type: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    shape: tl.constexpr = [SLICES, BLOCK_N, PART_K]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], sum_type)
    for first in tl.range(0, num_blocks, SLICES, num_stages=STAGES):
        block = first + tl.arange(0, SLICES)
        lies = (block[:, None, None] * out_features + n[None, :, None]).to(tl.int64) * WIDTH + word[None, None, :]
        raw = tl.load(codes + lies, mask=is_out[None, :, None] & (EVEN | (block < num_blocks)[:, None, None]), other=0)
        for part in tl.static_range(BLOCK_K // PART_K):
            start = block * BLOCK_K + part * PART_K
            of_group = (start // group_size)[:, None] * out_features + n[None, :]
            is_live = is_out[None, :] & (EVEN | (start < num_columns)[:, None])
            offset = tl.zeros([SLICES, BLOCK_N], tl.float32)
            if HAS_ZEROS:
                offset = tl.load(zeros + of_group, mask=is_live, other=0).to(tl.float32)
            k = start[:, None] + column[None, :]
            rows = tl.load(
                x + m[None, None, :].to(tl.int64) * x_row + k[:, :, None],
                mask=is_row[None, None, :] & (EVEN | (k < num_columns)[:, :, None]), other=0.0,
            )  # fmt: skip
            rows = rows.to(dtype)
            numbers = _numbers(
                raw, part, offset[:, :, None], table, KIND, MAGIC, HAS_ZEROS, shape, x.dtype.element_ty, UPCAST
            )
            if ONE_GROUP:
                acc = tl.dot(numbers, rows, acc, input_precision="ieee", out_dtype=sum_type)
            else:
                sums = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
                if MAGIC:  # the tensor cores, idle with so few rows, take away what all codes have too much
                    excess = (-MAGIC_OFFSET - offset).to(dtype)[:, :, None] + tl.zeros(shape, dtype)
                    sums = tl.dot(excess, rows, sums, input_precision="ieee")
                sums = tl.dot(numbers, rows, sums, input_precision="ieee")
                scale = tl.load(scales + of_group, mask=is_live, other=0.0).to(tl.float32)
                acc += sums * scale[:, :, None]
    result = tl.sum(acc, axis=0).to(tl.float32)
    if ONE_GROUP:
        result *= tl.load(scales + n, mask=is_out, other=0.0).to(tl.float32)[:, None]
    if HAS_ROW_SCALES:
        result *= tl.load(row_scales + m, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_out, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + m[None, :].to(tl.int64) * y_row + n[:, None], result.to(y.dtype.element_ty),
        mask=is_row[None, :] & is_out[:, None],
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _many_rows(
    x, codes, scales, zeros, table, row_sums, target, bias, row_scales,
    x_row, target_row, target_split, num_rows, num_columns, out_features, num_blocks, group_size, split_blocks,
    KIND: tl.constexpr, MAGIC: tl.constexpr, MAGIC_OFFSET: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ROW_SCALES: tl.constexpr, ONE_GROUP: tl.constexpr, UPCAST: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PART_K: tl.constexpr,
    FOLD: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """FOLD parts of one group are summed before they are scaled. `target` is y, or the sums of splits."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    dtype: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    is_out, is_row = n < out_features, m < num_rows
    word, column = tl.arange(0, WIDTH), tl.arange(0, PART_K)
    row = x + m[None, :].to(tl.int64) * x_row
    sum_type: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    shape: tl.constexpr = [BLOCK_N, PART_K]
    acc = tl.zeros([BLOCK_N, BLOCK_M], sum_type)
    last = tl.minimum(split * split_blocks + split_blocks, num_blocks)
    for block in tl.range(split * split_blocks, last, num_stages=STAGES):
        lies = (block * out_features + n).to(tl.int64)[:, None] * WIDTH + word[None, :]
        raw = tl.load(codes + lies, mask=is_out[:, None], other=0)
        for fold in tl.static_range(BLOCK_K // PART_K // FOLD):
            start = block * BLOCK_K + fold * FOLD * PART_K
            of_group = (start // group_size) * out_features + n
            is_live = is_out & (EVEN | (start + tl.zeros_like(n) < num_columns))
            offset = tl.zeros([BLOCK_N], tl.float32)
            if HAS_ZEROS:
                offset = tl.load(zeros + of_group, mask=is_live, other=0).to(tl.float32)
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if MAGIC:
                at = (block * (BLOCK_K // PART_K // FOLD) + fold) * num_rows
                total = tl.load(row_sums + at + m, mask=is_row, other=0.0)
                sums = (-MAGIC_OFFSET - offset)[:, None] * total[None, :]
            for i in tl.static_range(FOLD):
                k = start + i * PART_K + column
                rows = tl.load(row + k[:, None], mask=is_row[None, :] & (EVEN | (k < num_columns)[:, None]), other=0.0)
                rows = rows.to(dtype)
                numbers = _numbers(
                    raw, fold * FOLD + i, offset[:, None], table, KIND, MAGIC, HAS_ZEROS, shape, x.dtype.element_ty,
                    UPCAST,
                )  # fmt: skip
                if ONE_GROUP:
                    acc = tl.dot(numbers, rows, acc, input_precision="ieee", out_dtype=sum_type)
                else:
                    sums = tl.dot(numbers, rows, sums, input_precision="ieee")
            if not ONE_GROUP:
                scale = tl.load(scales + of_group, mask=is_live, other=0.0).to(tl.float32)
                acc += sums * scale[:, None]
    result = acc.to(tl.float32)
    if ONE_GROUP:
        result *= tl.load(scales + n, mask=is_out, other=0.0).to(tl.float32)[:, None]
    if HAS_ROW_SCALES:
        result *= tl.load(row_scales + m, mask=is_row, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=is_out, other=0.0).to(tl.float32)[:, None]
    where = target + split.to(tl.int64) * target_split + m[None, :].to(tl.int64) * target_row + n[:, None]
    tl.store(where, result.to(target.dtype.element_ty), mask=is_row[None, :] & is_out[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _sum_columns(x, row_sums, x_row, num_rows, num_columns, num_runs, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """row_sums[run, row]: the sum of RUN columns of a row."""
    row = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    k = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    values = tl.load(x + row * x_row + k, mask=k < num_columns, other=0.0)
    tl.store(row_sums + run * num_rows + row, tl.sum(values.to(tl.float32), axis=1), mask=run < num_runs)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_splits(
    partial, y, bias, row_scales, y_row, num_rows, out_features,
    NUM_SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ROW_SCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_out = n < out_features
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(NUM_SPLITS):
        total += tl.load(partial + (split * num_rows + row) * out_features + n, mask=is_out, other=0.0)
    if HAS_ROW_SCALES:
        total *= tl.load(row_scales + row)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=is_out, other=0.0).to(tl.float32)
    tl.store(y + row * y_row + n, total.to(y.dtype.element_ty), mask=is_out)


class _Tile(NamedTuple):
    block_m: int
    block_n: int
    num_splits: int
    num_warps: int


def _tile_of(num_rows: int, out_features: int, num_blocks: int, dtype: torch.dtype) -> _Tile:
    """Of many rows. Between two bounds of rows it is the same."""
    bound = next((rows for rows in (32, 64, 128, 256, 512) if num_rows <= rows), None)
    block_m = 32 if dtype is torch.float32 else min(bound or 128, 128)
    block_n = 128 if block_m == 128 else 64
    num_tiles = triton.cdiv(out_features, block_n) * (1 if bound is None else bound // block_m)
    splits = 1 if bound is None else max(1, min(_PROGRAMS // num_tiles, _MOST_SPLITS, num_blocks // 2))
    splits = triton.cdiv(num_blocks, triton.cdiv(num_blocks, splits))  # none without a block
    return _Tile(block_m, block_n, splits, 8 if block_n == 128 else 4)


def quant_linear(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, row_scales: Tensor | None = None, *,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """y = row_scales * (x W^T) + bias, in `dtype` (x's own if it is None); sums in float32.

    x may be int8 where `weight.takes_int8`: sums are whole numbers then.
    Shapes: x [T, in], rows contiguous; bias [out]; row_scales [T] float32; y [T, out] contiguous.
    """
    assert x.shape[1] == weight.in_features
    x = weight.arrange(x)
    assert x.stride(1) == 1
    y = torch.empty((x.shape[0], weight.out_features), dtype=dtype or x.dtype, device=x.device)
    if x.shape[0] > FEW_ROWS:
        _launch_many(x, weight, bias, row_scales, y)
    elif x.shape[0]:
        _launch_few(x, weight, bias, row_scales, y)
    return y


def _shared(x: Tensor, weight: PackedWeight, bias: Tensor | None, row_scales: Tensor | None) -> dict[str, object]:
    magic = weight.kind == "int4" and x.dtype is not torch.float32
    assert x.dtype is not torch.int8 or weight.takes_int8
    return {
        "KIND": weight.kind,
        "MAGIC": magic,
        "MAGIC_OFFSET": (128 if x.dtype is torch.bfloat16 else 1024) + 8 if magic else 0,
        "HAS_ZEROS": weight.zeros is not None,
        "HAS_BIAS": bias is not None,
        "HAS_ROW_SCALES": row_scales is not None,
        "ONE_GROUP": weight.scales.shape[0] == 1 and not magic,
        "UPCAST": upcast(x.dtype),
        "BLOCK_K": weight.block_columns,
        "PART_K": weight.part_columns,
        "WIDTH": weight.codes.shape[2],
    }


def _launch_few(x: Tensor, weight: PackedWeight, bias: Tensor | None, row_scales: Tensor | None, y: Tensor) -> None:
    num_rows, out_features = y.shape
    block_n = 16 if out_features <= _WIDE_OUT else 32
    _few_rows[(triton.cdiv(out_features, block_n), 1)](
        x, weight.codes, weight.scales, _or(weight.zeros, x), _table(x, weight), _or(bias, x),
        _or(row_scales, x), y, x.stride(0), y.stride(0), num_rows, weight.num_columns, out_features,
        weight.codes.shape[0], weight.group_size,
        EVEN=weight.num_columns % (_SLICES * weight.block_columns) == 0,
        BLOCK_M=8 if num_rows <= 8 else FEW_ROWS, BLOCK_N=block_n, SLICES=_SLICES, num_warps=4,
        STAGES=2 if x.dtype is torch.float32 else 3, **_shared(x, weight, bias, row_scales),
    )  # fmt: skip


def _launch_many(x: Tensor, weight: PackedWeight, bias: Tensor | None, row_scales: Tensor | None, y: Tensor) -> None:
    num_rows, out_features = y.shape
    num_blocks = weight.codes.shape[0]
    tile = _tile_of(num_rows, out_features, num_blocks, x.dtype)
    shared = _shared(x, weight, bias, row_scales)
    num_parts = weight.block_columns // weight.part_columns
    fold = next(n for n in (4, 2, 1) if num_parts % n == 0 and weight.group_size % (n * weight.part_columns) == 0)
    sums = x
    if shared["MAGIC"]:
        run, num_runs = fold * weight.part_columns, num_blocks * num_parts // fold
        sums = torch.empty((num_runs, num_rows), dtype=torch.float32, device=x.device)
        _sum_columns[(num_rows, triton.cdiv(num_runs, 16))](
            x, sums, x.stride(0), num_rows, weight.num_columns, num_runs, RUN=run, BLOCK=16, num_warps=4
        )
    target, is_split = y, tile.num_splits > 1
    if is_split:
        target = torch.empty((tile.num_splits, num_rows, out_features), dtype=torch.float32, device=x.device)
        shared |= {"HAS_BIAS": False, "HAS_ROW_SCALES": False}
    _many_rows[(triton.cdiv(num_rows, tile.block_m), triton.cdiv(out_features, tile.block_n), tile.num_splits)](
        x, weight.codes, weight.scales, _or(weight.zeros, x), _table(x, weight), sums, target, _or(bias, x),
        _or(row_scales, x), x.stride(0), target.stride(-2), target.stride(0), num_rows, weight.num_columns,
        out_features, num_blocks, weight.group_size, triton.cdiv(num_blocks, tile.num_splits),
        EVEN=weight.num_columns % weight.block_columns == 0,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, FOLD=fold, STAGES=2, num_warps=tile.num_warps, **shared,
    )  # fmt: skip
    if is_split:
        _sum_splits[(num_rows, triton.cdiv(out_features, 1024))](
            target, y, _or(bias, x), _or(row_scales, x), y.stride(0), num_rows, out_features,
            NUM_SPLITS=tile.num_splits, HAS_BIAS=bias is not None, HAS_ROW_SCALES=row_scales is not None, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip


def _or(tensor: Tensor | None, some: Tensor) -> Tensor:
    """A kernel that is told not to read it is given some tensor all the same."""
    return some if tensor is None else tensor


def _table(x: Tensor, weight: PackedWeight) -> Tensor:
    # In 16 bits, also for its own sake: the compiler copies wider look-ups ahead, through memory that programs lack.
    return x if weight.table is None else weight.table.to(x.dtype)
