"""The values of an adapter, rounded to what an image holds. numpy only.

bfloat16 is no numpy type: it is carried as its bits, in uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_CODE = 127
_SMALLEST_SCALE = np.finfo(np.float32).tiny  # a smaller one has lost digits, and what it scales is next to nothing


def quantize_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Each row to the nearest of 127 equal steps on either side of zero, the last of which is its largest value.

    Returns: codes, and what a step is: rows = codes * scales[:, None], nearly.
    Shapes: rows [R, n] -> codes [R, n], in the memory order of `rows`; scales [R].
    Raises: ValueError if a value is not finite.
    """
    largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
    if not np.isfinite(largest).all():
        raise ValueError("NaN or infinity")
    scales = largest / np.float32(MAX_CODE)
    scales[scales < _SMALLEST_SCALE] = 0
    steps = np.divide(rows, np.where(scales > 0, scales, np.float32(np.inf))[:, None])
    return np.rint(steps, out=steps).astype(np.int8), scales


def convert(values: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """Converts between the element types, rounding to the nearest, ties to even; bfloat16 is carried as uint16 bits."""
    if source == target:
        return values
    if source == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if target == "float32":
        return values.astype(np.float32, copy=False)
    if target == "float16":
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which the caller refuses
            return values.astype(np.float16)
    return _bfloat16_bits(values.astype(np.float32, copy=False))


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint32] = bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    # The carry could turn a NaN into a finite number or an infinity; keep it a NaN.
    return np.where(is_nan, np.uint16(0x7FC0), upper)
