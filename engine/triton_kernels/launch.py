"""What every launch decides the same way."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton import knobs

MIN_DOT = 16  # tensor cores multiply tiles of at least so many rows, columns and terms


def power_of_2(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and at least `least`."""
    return max(least, int(triton.next_power_of_2(n)))


def upcast(dtype: torch.dtype) -> bool:
    """Whether operands of a product must be widened: Triton's interpreter multiplies raw bfloat16 wrongly."""
    return bool(knobs.runtime.interpret) and dtype is torch.bfloat16


def strides_of_scales(scales: Tensor | None, layer: int) -> tuple[int, int, int]:
    """Of a page, to a layer, and from keys to values, in [B, L, 2, Hk, P] whose heads lie side by side."""
    if scales is None:
        return 0, 0, 0
    assert scales.stride()[3:] == (scales.shape[4], 1)
    return scales.stride(0), layer * scales.stride(1), scales.stride(2)
