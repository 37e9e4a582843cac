"""Input embeddings in int8: a scale per token of the vocabulary, and rows are looked up before they are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.quant.weight import QuantizedWeight


class QuantEmbedding(nn.Module):
    """y = scales[ids] * codes[ids], times `embed_scale` where the model has one (Gemma: the root of the width).

    Shapes: ids [..] -> y [.., embedding_dim], in `dtype`.
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, embed_scale: Tensor | float | None = None) -> None:
        """`weight` is in int8 with one scale per row."""
        super().__init__()
        self.quantized = weight
        self.num_embeddings, self.embedding_dim = weight.out_features, weight.in_features
        self.dtype = dtype
        if embed_scale is not None:  # only then: LoRA layers ask whether there is one
            self.embed_scale = embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        codes = functional.embedding(ids, self.quantized.codes).float()
        rows = (codes * functional.embedding(ids, self.quantized.scales)).to(self.dtype)
        scale = getattr(self, "embed_scale", None)
        return rows if scale is None else rows * torch.as_tensor(scale, device=rows.device).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.quantized.kind}"
