"""A linear layer over a quantized weight, in plain torch: every device can do it, and kernels are held against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.quant.weight import FP8_MAX, QuantizedWeight

_TILE_BYTES = 4 << 20  # of weights that are dequantized at once


class QuantLinear(nn.Module):
    """y = x W^T + bias with a `QuantizedWeight`. The weight is no parameter: transformers neither loads nor moves it.

    Shapes: x [.., in] -> y [.., out], in `output_dtype` (None: x's); products and sums in float32.
    """

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.quantized = weight
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.output_dtype: torch.dtype | None = None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = round_activations(x, self.quantized.activations)
        step = max(1, _TILE_BYTES // (4 * self.in_features))
        tiles = [
            functional.linear(rows, self.quantized.dequantize(begin, begin + step))
            for begin in range(0, self.out_features, step)
        ]
        y = torch.cat(tiles, dim=-1)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(self.output_dtype or x.dtype)

    def __getattr__(self, name: str) -> Any:
        """`weight` is there for models that look at it beside calling the layer: computed anew each time."""
        if name == "weight" and "quantized" in vars(self):
            return self.quantized.dequantize(0, self.out_features)
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        w = self.quantized
        return f"in_features={self.in_features}, out_features={self.out_features}, {w.kind}, group_size={w.group_size}"


def round_activations(x: Tensor, kind: str | None) -> Tensor:
    """x in float32, each row as 127 steps on either side (int8) or as float8_e4m3fn (fp8) of its largest value."""
    x = x.float()
    if kind is None:
        return x
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12)
    if kind == "int8":
        scale = largest / 127
        return torch.round(x / scale).clamp(-127, 127) * scale
    scale = largest / FP8_MAX
    return (x / scale).to(torch.float8_e4m3fn).float() * scale
