"""Random quantized weights of any kind, and layers of a model exchanged for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight, pack_nibbles


def random_codes(kind: str, out_features: int, in_features: int) -> Tensor:
    if kind in ("int4", "nf4"):
        return pack_nibbles(torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8))
    if kind == "int8":
        return torch.randint(-128, 128, (out_features, in_features), dtype=torch.int8)
    return (torch.randn(out_features, in_features) * 60).clamp(-448, 448).to(torch.float8_e4m3fn)


def random_weight(
    kind: Any,
    out_features: int,
    in_features: int,
    group_size: int | None = None,
    *,
    zeros: bool = False,
    order: bool = False,
    activations: Any = None,
) -> QuantizedWeight:
    """Values of about 1 / sqrt(in), as a trained layer has them. `group_size` None: one group."""
    shape = (out_features, in_features // (group_size or in_features))
    largest = {"int4": 8, "int8": 128, "nf4": 1, "fp8": 120}[kind]
    return QuantizedWeight(
        kind=kind,
        codes=random_codes(kind, out_features, in_features),
        scales=(0.5 + torch.rand(shape)) / (largest * in_features**0.5),
        zeros=torch.randint(-9, 10, shape, dtype=torch.int16) if zeros else None,
        order=torch.randperm(in_features) if order else None,
        activations=activations,
    )


def quantize_layers(model: nn.Module, make: Callable[[str, nn.Linear], QuantizedWeight | None]) -> int:
    """Exchange each nn.Linear for which `make(name, linear)` gives a weight. Returns: how many."""
    num_exchanged = 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (weight := make(name, module)) is not None:
            parent_name, _, child = name.rpartition(".")
            bias = None if module.bias is None else module.bias.detach()
            setattr(model.get_submodule(parent_name), child, QuantLinear(weight, bias))
            num_exchanged += 1
    return num_exchanged
