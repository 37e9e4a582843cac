"""Keys and values in eight bits, a scale for each row: what one token has in one KV head.

    x[d] = scale * value(code[d])       scale = max |x| / 127 (int8), max |x| / 448 (fp8, e4m3)

int8 rounds x / scale to the nearest whole number, ties to even; fp8 to the nearest e4m3. Scales are float32, so every
kernel makes the same codes of the same row, and a row that float32 can hold has no code of its own lost in a scale of
16 bits. A row depends on nothing but itself: chunking, batches and history cannot change what the cache holds.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KVQuantization = Literal["int8", "fp8"]

CODE_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST_CODES = {"int8": 127.0, "fp8": 448.0}
MIN_SCALE = 2.0**-126  # smallest normal float32: a row of zeros is divided by it


def quantize_rows(x: Tensor, quantization: KVQuantization) -> tuple[Tensor, Tensor]:
    """A row with a NaN or an infinity gets a scale of NaN: all of it stays visible as broken.

    Shapes: x [..., D]; returns codes [..., D], scales [...] float32.
    """
    x = x.float()
    largest = x.abs().amax(dim=-1)  # NaN if there is one
    is_finite = largest.isfinite()
    scales = torch.where(is_finite, (largest / LARGEST_CODES[quantization]).clamp(min=MIN_SCALE), torch.nan)
    codes = torch.where(is_finite[..., None], x / scales[..., None], 0.0)
    if quantization == "int8":
        codes = codes.round()
    return codes.to(CODE_DTYPES[quantization]), scales


def dequantize_rows(codes: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Shapes: codes [..., D], scales [...]; returns [..., D] float32, in `out` if given."""
    out = codes.float() if out is None else out.copy_(codes)
    return out.mul_(scales[..., None])
