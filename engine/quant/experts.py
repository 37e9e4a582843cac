"""A mixture's experts with quantized weights, in the place of transformers' module that has 3-D parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Those of one expert. Shapes: gate and up [intermediate, hidden], down [hidden, intermediate]."""

    gate: QuantizedWeight
    up: QuantizedWeight
    down: QuantizedWeight


class QuantExpert(nn.Module):
    """y = down(act(gate(x)) * up(x))."""

    def __init__(self, weights: ExpertWeights, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj = QuantLinear(weights.gate)
        self.up_proj = QuantLinear(weights.up)
        self.down_proj = QuantLinear(weights.down)
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self._activation(self.gate_proj(x)) * self.up_proj(x))
        return y


class QuantExperts(nn.Module):
    """Called as transformers calls its own: each row goes through the experts its router chose, and they are summed.

    Shapes: hidden_states [T, hidden]; top_k_index and top_k_weights [T, choices]; returns [T, hidden]. An index that
    is no expert's adds nothing.
    """

    def __init__(self, weights: Sequence[ExpertWeights], activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(QuantExpert(expert, activation) for expert in weights)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():  # ascending, as transformers sums them
            if index < len(self.experts):
                rows, choices = torch.where(top_k_index == index)
                y = self.experts[index](hidden_states[rows]) * top_k_weights[rows, choices, None]
                result.index_add_(0, rows, y.to(result.dtype))
        return result
