"""LoRA layers: they hold any base layer and add, for each segment of rows, the adapter bound to the segment's slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch, add_expanded, add_lora


class _LoraLayer(nn.Module):
    """What both kinds share. Attributes it has not itself (weight, bias, in_features, ...) are the base layer's."""

    base: nn.Module

    def __init__(self, base: nn.Module, site: LinearSite, batch: LoraBatch) -> None:
        super().__init__()
        self.base = base
        self.site = site
        self._batch = batch
        self._weights = batch.site_weights(site.index)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        return f"site={self.site.index}, name={self.site.name!r}"


class LoraLinear(_LoraLayer):
    """y = base(x), and for each segment of rows y += scaling * (x a^T) b, in place.

    The base may be nn.Linear, transformers' Conv1D, a quantized linear: anything that maps [.., in] to [.., out].
    `sampled`: the layer is given the sampled rows only, so it goes by the batch's sampled segments; None: a linear
    site outside the decoder layers (lm_head) is, all others are not.

    Shapes: x [1, T, in_features] or [T, in_features]; y alike, with out_features.
    Raises: ValueError if the number of rows does not fit the batch's segments.
    """

    def __init__(self, base: nn.Module, site: LinearSite, batch: LoraBatch, *, sampled: bool | None = None) -> None:
        super().__init__(base, site, batch)
        self.sampled = site.layer is None if sampled is None else sampled
        self._addition = None if batch.kernels is None else batch.kernels.addition(site, sampled=self.sampled)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        # First the kernel: where a step is recorded, it stands for all adapters that will ever be bound.
        if self._addition is not None and self._addition.add(y, x):
            return y
        rows = self._batch.sampled_rows if self.sampled else self._batch.rows
        weights = self._weights
        if not rows.active or not weights:
            return y
        x = x.reshape(-1, x.shape[-1])  # [T, in]
        sizes, slots = rows.cuts(x.shape[0])
        outs = y.view(-1, y.shape[-1]).split_with_sizes(sizes)
        for slot, out, rows_in in zip(slots, outs, x.split_with_sizes(sizes), strict=True):
            bound = weights.get(slot)
            if bound is not None:
                add_lora(out, rows_in, bound)
        return y


class LoraEmbedding(_LoraLayer):
    """y = base(ids), and for each segment of rows y += scaling * embed_scale * a[ids] b, in place.

    `embed_scale` is the base layer's, if it has one (Gemma's embeddings are scaled by the square root of the width):
    as in PEFT it multiplies the adapter's part too.

    Shapes: ids [1, T] or [T]; y [1, T, out_features] or [T, out_features].
    """

    def __init__(self, base: nn.Module, site: LinearSite, batch: LoraBatch) -> None:
        super().__init__(base, site, batch)
        batch.compute_in_python(site.index)
        self._embed_scale: float | None = None

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        rows = self._batch.rows
        weights = self._weights
        if not rows.active or not weights:
            return y
        ids = ids.reshape(-1)  # [T]
        sizes, slots = rows.cuts(ids.shape[0])
        outs = y.view(-1, y.shape[-1]).split_with_sizes(sizes)
        for slot, out, ids_in in zip(slots, outs, ids.split_with_sizes(sizes), strict=True):
            bound = weights.get(slot)
            if bound is not None:
                low = functional.embedding(ids_in, bound.a).to(bound.dtype)
                add_expanded(out, low, bound, bound.scaling * self._scale(y.dtype))
        return y

    def _scale(self, dtype: torch.dtype) -> float:
        """The base's embed_scale, rounded to `dtype`, in which PEFT has the adapter; read from the device once."""
        if self._embed_scale is None:
            self._embed_scale = float(torch.as_tensor(getattr(self.base, "embed_scale", 1.0)).to(dtype))
        return self._embed_scale
