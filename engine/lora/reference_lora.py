"""What LoRA means, in plain float64: the oracle for every faster way of computing it.

    y[t] = base[t] + scaling[s] * B[s] (A[s] x[t])        for each row t of a segment with slot s
    y[t] = base[t]                                        for rows of no segment

Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685; the order is PEFT's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.core.plan import LoraSegment
from engine.lora.storage import SiteWeights


def lora_linear(base: Tensor, x: Tensor, segments: tuple[LoraSegment, ...], slots: Mapping[int, SiteWeights]) -> Tensor:
    """Shapes: base [T, out], x [T, in] -> float64 [T, out]. A slot without weights for the site adds nothing."""
    y = base.to(torch.float64, copy=True)
    for segment in segments:
        if segment.slot in slots:
            w = slots[segment.slot]
            for t in range(segment.row_start, segment.row_end):
                y[t] += w.scaling * (w.a.double() @ x[t].double()) @ w.b.double()
    return y


def lora_embedding(
    base: Tensor,
    ids: Tensor,
    segments: tuple[LoraSegment, ...],
    slots: Mapping[int, SiteWeights],
    embed_scale: float = 1.0,
) -> Tensor:
    """Shapes: base [T, out], ids [T] -> float64 [T, out]."""
    y = base.to(torch.float64, copy=True)
    for segment in segments:
        if segment.slot in slots:
            w = slots[segment.slot]
            for t in range(segment.row_start, segment.row_end):
                y[t] += embed_scale * w.scaling * w.a[ids[t]].double() @ w.b.double()
    return y
