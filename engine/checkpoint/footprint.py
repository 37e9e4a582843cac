"""What a model's quantized layers weigh."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from engine.quant.embedding import QuantEmbedding
from engine.quant.linear import QuantLinear

_MB = 1e6


@dataclass(frozen=True, slots=True)
class Footprint:
    """Of the layers that are quantized; as they were read, before kernels lay them out anew."""

    num_layers: dict[str, int]  # by kind of codes
    num_bytes: int
    num_bytes_16bit: int  # of the same layers

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} in {kind}" for kind, count in self.num_layers.items())
        return (
            f"{sum(self.num_layers.values())} layers are quantized ({kinds}): {self.num_bytes / _MB:.1f} MB instead of "
            f"{self.num_bytes_16bit / _MB:.1f} MB"
        )


def measure(model: nn.Module) -> Footprint | None:
    """None: no layer is quantized."""
    weights = [m.quantized for m in model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    if not weights:
        return None
    return Footprint(
        num_layers=dict(Counter(weight.kind for weight in weights)),
        num_bytes=sum(weight.num_bytes for weight in weights),
        num_bytes_16bit=sum(2 * weight.in_features * weight.out_features for weight in weights),
    )
