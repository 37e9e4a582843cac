"""Rows of activations rounded to int8 or float8_e4m3fn, each by a scale of its own."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.triton_kernels.launch import power_of_2

_STEPS = {"int8": 127.0, "fp8": 448.0}  # the largest number a row is scaled to


@triton.jit
def _round_rows(x, codes, row_scales, x_row, columns, steps, BLOCK: tl.constexpr, TO_FP8: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < columns
    value = tl.load(x + row * x_row + c, mask=mask, other=0.0).to(tl.float32)
    # `tl.max` passes over a NaN, and int8 has no code for one.
    largest = tl.max(tl.where(value == value, tl.abs(value), float("inf")), axis=0)
    scale = tl.div_rn(tl.maximum(largest, 1e-12), steps + tl.zeros_like(largest))
    scale = tl.where(largest < float("inf"), scale, float("nan"))
    value = tl.div_rn(value, scale + tl.zeros_like(value))
    value = tl.where(value == value, value, 0.0)
    # 1.5 * 2^23: what is added to it is rounded to a whole number, ties to even.
    if TO_FP8:
        # Three bits of mantissa; below 2^-6 numbers are 2^-9 apart.
        exponent = (tl.maximum(tl.abs(value), 0.015625).to(tl.int32, bitcast=True) >> 23) - 3
        step = (exponent << 23).to(tl.float32, bitcast=True)
        per_step = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        value = ((value * per_step + 12582912.0) - 12582912.0) * step
    else:
        value = (value + 12582912.0) - 12582912.0
    tl.store(codes + row * columns + c, value.to(codes.dtype.element_ty), mask=mask)
    tl.store(row_scales + row, scale)


def round_rows(x: Tensor, kind: Literal["int8", "fp8"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x = codes * row_scales, nearly: codes are whole numbers up to 127, or those of float8_e4m3fn, written as `dtype`.

    A row with a NaN or an infinity has a scale of NaN.
    Shapes: x [T, in], rows contiguous; codes [T, in]; row_scales [T] float32.
    """
    assert x.stride(1) == 1
    rows, columns = x.shape
    codes = torch.empty((rows, columns), dtype=dtype, device=x.device)
    row_scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return codes, row_scales
    block = power_of_2(columns)
    _round_rows[(rows,)](
        x, codes, row_scales, x.stride(0), columns, _STEPS[kind],
        BLOCK=block, TO_FP8=kind == "fp8", num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return codes, row_scales
