"""What every format becomes when it is read: a matrix of codes, with scales for runs of its inputs.

    w[n, k] = scales[n, g] * (value(codes[n, k]) - zeros[n, g])        g: the run of inputs that column k is in

Kernels make their own layouts of it (`engine.native`, `engine.triton_kernels`), a layer that has none computes with
`dequantize`. Nothing is rounded on the way: scales are float32, whatever they were stored in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["int4", "int8", "nf4", "fp8"]
Activations = Literal["int8", "fp8"]

FP8_MAX = 448.0  # of float8_e4m3fn
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv 2305.14314, appendix E)."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QuantizedWeight:
    """The weight of a linear layer, [out, in].

    kind    codes                                                       value(code)
    int4    uint8 [out, in / 2], column 2j in the low half of byte j    code - 8: -8 .. 7
    nf4     the same                                                    NF4_VALUES[code]
    int8    int8 [out, in]                                              code
    fp8     float8_e4m3fn [out, in]                                     code

    `order`: column k of the codes belongs to input order[k] (GPTQ's act-order, made contiguous by runs); None: input k.
    `activations`: inputs are rounded too, each row (token) by a scale of its own (its largest value: 127, or 448 in
    fp8); None: they stay as they are.
    """

    kind: Kind
    codes: Tensor
    scales: Tensor  # float32 [out, groups]; groups divides in
    zeros: Tensor | None = None  # int16 [out, groups], in units of codes; None: 0
    order: Tensor | None = None  # int64 [in], a permutation
    activations: Activations | None = None

    @property
    def out_features(self) -> int:
        return int(self.codes.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * (2 if self.kind in ("int4", "nf4") else 1)

    @property
    def group_size(self) -> int:
        """Columns of codes that share a scale."""
        return self.in_features // int(self.scales.shape[1])

    @property
    def num_bytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.order)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def has_nan(self) -> bool:
        """Whether a code is no number. Only fp8 has such, and kernels that widen its bits would read 480."""
        return self.kind == "fp8" and bool(((self.codes.view(torch.uint8) & 127) == 127).any())

    def dequantize(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows begin .. end - 1 of the weight. Returns: float32 [end - begin, in], columns in the order of inputs."""
        rows = slice(begin, end)
        values = self._values(self.codes[rows])
        groups = values.view(values.shape[0], -1, self.group_size)
        if self.zeros is not None:
            groups = groups - self.zeros[rows].float()[:, :, None]
        weight = (groups * self.scales[rows][:, :, None]).view(values.shape)
        if self.order is None:
            return weight
        unordered = torch.empty_like(weight)
        unordered[:, self.order] = weight
        return unordered

    def to(self, device: torch.device) -> QuantizedWeight:
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            zeros=None if self.zeros is None else self.zeros.to(device),
            order=None if self.order is None else self.order.to(device),
        )

    def _values(self, codes: Tensor) -> Tensor:
        if self.kind in ("int8", "fp8"):
            return codes.float()
        nibbles = unpack_nibbles(codes)
        if self.kind == "int4":
            return nibbles.float() - 8
        return torch.tensor(NF4_VALUES, device=codes.device)[nibbles.long()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0 .. 15 two to a byte, the even column in the low half. Shapes: uint8 [out, in] -> uint8 [out, in / 2]."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`. Shapes: uint8 [out, in / 2] -> uint8 [out, in]."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).view(packed.shape[0], -1)
