"""The first look at a step's logits: are they finite, and how large is the largest of each block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.native.library import SUPPORTED_DTYPES, NativeLibrary
from engine.runner.choice import BLOCK, block_max


@dataclass(frozen=True, slots=True)
class Scan:
    """Shapes: values [S, V], blocks [S, ceil(V / 64)] float32, finite [S] or None if all rows are."""

    values: Tensor
    blocks: Tensor
    finite: Tensor | None


def scan(logits: Tensor, stand_in: Tensor, library: NativeLibrary | None, *, as_float: bool) -> Scan:
    """Rows that are not finite are replaced by `stand_in` [V], so that they go through the same kernels and break
    nothing. `as_float`: the values must be float32 and may be written; otherwise they may have the logits' dtype.
    """
    if library is not None and logits.dtype in SUPPORTED_DTYPES and logits.is_contiguous():
        found = _native(logits, library, as_float)
        if bool(found.finite.all()):  # type: ignore[union-attr]
            return Scan(found.values, found.blocks, None)
    logits = logits.float()
    if logits.device.type == "cpu" and bool(logits.sum(-1).isfinite().all()):
        return Scan(logits, block_max(logits), None)  # a sum is finite only if its terms are
    finite = logits.isfinite().all(-1)
    logits = torch.where(finite[:, None], logits, stand_in)
    return Scan(logits, block_max(logits), finite)


def _native(logits: Tensor, library: NativeLibrary, as_float: bool) -> Scan:
    rows, columns = logits.shape
    is_bf16 = logits.dtype is torch.bfloat16
    copied = as_float and is_bf16
    values = torch.empty((rows, columns), dtype=torch.float32) if copied else logits
    blocks = torch.empty((rows, -(-columns // BLOCK)), dtype=torch.float32)
    finite = torch.empty(rows, dtype=torch.bool)
    library.scan_logits(
        logits.data_ptr(),
        values.data_ptr() if copied else None,
        blocks.data_ptr(),
        finite.data_ptr(),
        rows,
        columns,
        is_bf16,
    )
    return Scan(values, blocks, finite)
