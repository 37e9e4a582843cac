"""Runs of decoder layers on a GPU: projections of one input as one matrix product, all else in Triton kernels.

A layer is nine launches, and two more for the LoRA of each of its four products:

    norm -> qkv (+ LoRA) -> rotate, write keys and values -> attention -> o (+ LoRA)
    add, norm -> gate and up (+ LoRA) -> silu and multiply -> down (+ LoRA)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.image_spec import LinearSite
from engine.kv.backend import LayerCall
from engine.kv.triton_attention import TritonAttention
from engine.lora.triton_lora import TritonLora
from engine.model.decoder import swap_decoder
from engine.model.llama_layer import LayerParts, Norm
from engine.model.trial import Bench
from engine.model.triton_quant import QuantProduct, can_run, join
from engine.model.watch import Use
from engine.quant.linear import QuantLinear
from engine.triton_kernels.elementwise import rms_norm, rope_and_cache, silu_mul
from engine.triton_kernels.lora import LoraGroup


@dataclass(frozen=True, slots=True)
class _Dense:
    """y = x W^T + bias."""

    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Product:
    """Linear layers of one input, side by side: y = x W^T + bias, plus LoRA."""

    parts: tuple[Callable[[Tensor], Tensor], ...]  # neighbours that one product cannot hold are several
    group: LoraGroup | None

    def __call__(self, x: Tensor, lora: TritonLora | None) -> Tensor:
        """Shapes: [T, in] -> [T, sum of out]."""
        y = self.parts[0](x) if len(self.parts) == 1 else torch.cat([part(x) for part in self.parts], dim=1)
        if lora is not None and self.group is not None:
            lora.add(y, x, self.group)
        return y


@dataclass(frozen=True, slots=True)
class _Layer:
    call: LayerCall
    num_heads: int
    qkv: _Product
    o: _Product
    gate_up: _Product
    down: _Product
    input_norm: Norm
    post_norm: Norm
    head_norms: tuple[Tensor, float] | None  # weights [2, D] of q and k, eps

    @property
    def shape(self) -> tuple[int, ...]:
        return ()  # layers of any width follow each other


class TritonDecoder(nn.Module):
    """A run of layers. Shapes: hidden_states [1, T, H]; position_embeddings cos and sin [1, T, D]."""

    def __init__(self, layers: list[_Layer], lora: TritonLora | None) -> None:
        super().__init__()
        self._layers = layers
        self._lora = lora

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_backend: TritonAttention,
        **__: Any,
    ) -> Tensor:
        stream = hidden_states[0].clone()  # the layers add to it in place
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        change: Tensor | None = None  # what the layer before adds to the stream, not added yet
        for layer in self._layers:
            normed = _norm(layer.input_norm, stream, change)
            mixed = self._attention(layer, normed, cos, sin, attention_backend)
            normed = _norm(layer.post_norm, stream, mixed)
            change = layer.down(silu_mul(layer.gate_up(normed, self._lora)), self._lora)
        return (stream if change is None else stream + change)[None]

    def _attention(self, layer: _Layer, normed: Tensor, cos: Tensor, sin: Tensor, backend: TritonAttention) -> Tensor:
        qkv = layer.qkv(normed, self._lora)
        storage, slots = backend.storage, backend.slot_mapping
        q = rope_and_cache(
            qkv, layer.num_heads, cos, sin, storage.data, layer.call.index, slots, layer.head_norms, storage.scales
        )
        return layer.o(backend.attend(q, layer.call).flatten(1), self._lora)

    def extra_repr(self) -> str:
        return f"layers={len(self._layers)}"


@dataclass(frozen=True, slots=True)
class _Maker:
    head_dim: int
    lora: TritonLora | None

    def compile(self, parts: LayerParts, *, with_lora: bool) -> _Layer | None:
        return _fuse(parts, self.head_dim, self.lora if with_lora else None)

    def join(self, members: list[_Layer], hidden: Tensor, *, with_lora: bool) -> nn.Module:
        return TritonDecoder(members, self.lora if with_lora else None)


def fuse_decoder(
    model: nn.Module,
    sites: tuple[LinearSite, ...],
    lora: TritonLora | None,
    bench: Bench,
    uses: Mapping[str, Use] | None = None,
) -> set[int]:
    """Swap the layers that can be computed so. Returns: the indices of the sites they hold."""
    return swap_decoder(model, sites, bench, _Maker(bench.own.storage.shape.head_dim, lora), uses)


def _fuse(parts: LayerParts, head_dim: int, lora: TritonLora | None) -> _Layer | None:
    q_norm, k_norm = parts.norms.get("q_norm"), parts.norms.get("k_norm")
    if parts.rotary_dims != head_dim or (q_norm is None) is not (k_norm is None):
        return None
    head_norms = None
    if q_norm is not None and k_norm is not None:
        if q_norm.weight.shape != (head_dim,) or k_norm.eps != q_norm.eps:
            return None  # OLMo normalises all heads together
        head_norms = torch.stack([q_norm.weight, k_norm.weight]).detach(), q_norm.eps
    return _Layer(
        call=parts.call,
        num_heads=parts.num_heads,
        qkv=_join(parts, ("q", "k", "v"), lora),
        o=_join(parts, ("o",), lora),
        gate_up=_join(parts, ("gate", "up"), lora),
        down=_join(parts, ("down",), lora),
        input_norm=parts.norms["input_norm"],
        post_norm=parts.norms["post_norm"],
        head_norms=head_norms,
    )


def _join(parts: LayerParts, keys: tuple[str, ...], lora: TritonLora | None) -> _Product:
    linears = [parts.linears[key] for key in keys]
    group = None
    if lora is not None:
        widths = [linear.out_features for linear in linears]
        group = lora.group([parts.sites[key] for key in keys], widths, linears[0].in_features)
    whole = _part_of(linears, parts.dtype)
    found = [whole] if whole is not None else [_part_of([linear], parts.dtype) or linear for linear in linears]
    return _Product(tuple(found), group)


def _part_of(linears: Sequence[nn.Linear | QuantLinear], dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """One product for all; None: there is none."""
    dense = [linear for linear in linears if isinstance(linear, nn.Linear)]
    bias = None
    if any(linear.bias is not None for linear in linears):
        device = next(linear.bias.device for linear in linears if linear.bias is not None)
        bias = torch.cat([torch.zeros(linear.out_features, dtype=dtype, device=device) if linear.bias is None
                          else linear.bias for linear in linears])  # fmt: skip
    if len(dense) == len(linears):
        weight = dense[0].weight if len(dense) == 1 else torch.cat([linear.weight for linear in dense])
        return _Dense(weight.detach(), bias)
    weights = [linear.quantized for linear in linears if isinstance(linear, QuantLinear)]
    if dense or not all(can_run(weight) for weight in weights):
        return None
    joined = join(weights)
    return None if joined is None else QuantProduct(joined, bias, dtype)


def _norm(norm: Norm, stream: Tensor, change: Tensor | None) -> Tensor:
    if change is None:
        return rms_norm(stream, norm.weight, norm.eps)
    return rms_norm(change, norm.weight, norm.eps, residual=stream)
