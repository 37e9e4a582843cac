"""Round-to-nearest: how the weight of a 16-bit layer becomes codes and scales without looking at any text.

One rule per kind, for quantizing at load and for making checkpoints alike. Each run of inputs gets the scale that its
largest value needs; a code is the nearest value that the kind can write.

    int8    scale = max |w| / 127, per output channel             code = round(w / scale)
    int4    scale = e / -8 or e / -9, per group, where e is the weight of largest size with its sign: the one of the
            two with the smaller sum of squared errors            code = round(w / scale), cut to -8 .. 7
    nf4     scale = max |w|, per block of 64                      code of the nearest of the sixteen values
    fp8     scale = max |w| / 448, per output channel             w / scale as float8_e4m3fn

Source: a scale with the sign of the extreme, which then gets the code -8 that has no partner, is llama.cpp's Q4_0.
Of normal weights in groups of 128 it leaves a relative error of 0.103, with e / -9 (which cuts the extreme off) tried
too 0.099; max |w| / 7.5 leaves 0.111, and zero points 0.101 at the cost of storing them. NF4 is QLoRA's (arXiv
2305.14314).
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.config import Quantization
from engine.errors import ConfigError
from engine.quant.weight import FP8_MAX, NF4_VALUES, Activations, Kind, QuantizedWeight, pack_nibbles

DEFAULT_GROUP_SIZES = {"int4": 128, "nf4": 64}
_TILE_ELEMENTS = 1 << 20  # rounded at once: what the work needs beside the weight is a few times this


# What a setting of the engine means.
_METHODS: dict[Quantization, tuple[Kind, Activations | None]] = {
    "int8": ("int8", None),
    "int8-dynamic": ("int8", "int8"),
    "int4": ("int4", None),
    "nf4": ("nf4", None),
    "fp8": ("fp8", "fp8"),
}
MIN_GROUP_SIZE = 32  # with fewer weights to a scale, scales cost as much as 4-bit codes save


def can_round(method: Quantization, in_features: int) -> bool:
    """Whether a layer of so many inputs can be rounded at load: in 4 bits, groups of 32 or more must divide them."""
    kind, _ = _METHODS[method]
    return kind in ("int8", "fp8") or in_features % MIN_GROUP_SIZE == 0


def round_weight(weight: Tensor, method: Quantization) -> QuantizedWeight:
    """As `quantize`, for a setting of the engine."""
    kind, activations = _METHODS[method]
    return quantize(weight, kind, activations=activations)


def bytes_per_weight(method: Quantization) -> float:
    """About: codes, and the scales of a 4-bit layer."""
    kind, _ = _METHODS[method]
    return 0.5 + 4 / DEFAULT_GROUP_SIZES[kind] if kind in DEFAULT_GROUP_SIZES else 1.0


def group_size_for(kind: Kind, in_features: int, group_size: int | None = None) -> int:
    """Inputs that share a scale: those asked for, else the kind's own, halved until it divides `in_features`.

    int8 and fp8 have one scale per output channel. Raises: ConfigError if `group_size` does not divide.
    """
    if group_size is not None:
        if group_size < 1 or in_features % group_size:
            raise ConfigError(
                f"group_size={group_size} does not divide the {in_features} inputs of a layer; take a divisor of it"
            )
        return group_size
    size = DEFAULT_GROUP_SIZES.get(kind, in_features)
    while in_features % size:
        size //= 2
    return size


def quantize(
    weight: Tensor,
    kind: Kind,
    group_size: int | None = None,
    activations: Activations | None = None,
    *,
    scale_dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """The nearest `QuantizedWeight` to a weight, by the rules above.

    `scale_dtype`: what the scales will be stored in; they are rounded to it before codes are chosen.
    Shapes: weight [out, in], any float dtype. Raises: ConfigError (group size; an odd number of inputs in 4 bits).
    """
    out_features, in_features = weight.shape
    group = group_size_for(kind, in_features, group_size)
    if kind in ("int4", "nf4") and in_features % 2:
        raise ConfigError(f"a layer with {in_features} inputs cannot be stored in {kind}: two codes share a byte")
    step = max(1, _TILE_ELEMENTS // in_features)
    parts = []
    for begin in range(0, out_features, step):
        tile = weight[begin : begin + step].float()
        parts.append(_round_tile(tile.view(tile.shape[0], -1, group), kind, scale_dtype))
    codes, scales = zip(*parts, strict=True)
    return QuantizedWeight(
        kind=kind,
        codes=torch.cat(codes),
        scales=torch.cat(scales),
        activations=activations,
    )


def _round_tile(groups: Tensor, kind: Kind, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Shapes: groups float32 [rows, groups, group]. Returns: codes as stored, scales [rows, groups]."""
    if kind == "int4":
        return _round_int4(groups, scale_dtype)
    largest = groups.abs().amax(dim=-1)
    scales = _usable(largest / {"int8": 127.0, "nf4": 1.0, "fp8": FP8_MAX}[kind], scale_dtype)
    values = groups / scales[:, :, None]
    rows = groups.shape[0]
    if kind == "int8":
        codes = torch.round(values).clamp(-127, 127).to(torch.int8).view(rows, -1)
    elif kind == "fp8":
        codes = values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(rows, -1)
    else:
        table = torch.tensor(NF4_VALUES, device=groups.device)
        codes = pack_nibbles(torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8).view(rows, -1))
    return codes, scales


def _round_int4(groups: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    extremes = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))[:, :, 0]
    signs = torch.where(extremes < 0, 1.0, -1.0)
    scales, other = (signs * _usable(extremes.abs() / steps, scale_dtype) for steps in (8.0, 9.0))
    codes, errors = _int4_codes(groups, scales)
    other_codes, other_errors = _int4_codes(groups, other)
    better = other_errors < errors
    codes = torch.where(better[:, :, None], other_codes, codes)
    return pack_nibbles(codes.view(groups.shape[0], -1)), torch.where(better, other, scales)


def _int4_codes(groups: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest codes, as stored, and the sum of their squared errors."""
    values = torch.round(groups / scales[:, :, None]).clamp(-8, 7)
    return (values + 8).to(torch.uint8), (values * scales[:, :, None] - groups).square().sum(dim=-1)


def _usable(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As they will be stored; those of all-zero groups, and those too small for the dtype, as its least number.

    float16 is narrow: 127 steps of its least normal number are 0.008, more than the weights of some rows.
    """
    least = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return scales.to(dtype).float().clamp(min=least)
