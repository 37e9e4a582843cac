"""Runs of decoder layers in one call of the compiled CPU kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.image_spec import LinearSite
from engine.kv.native_attention import NativeAttention
from engine.lora.native_lora import NativeLora
from engine.model.decoder import swap_decoder
from engine.model.llama_layer import LayerParts
from engine.model.packed import Packer, can_pack
from engine.model.trial import Bench
from engine.model.watch import Use
from engine.native.library import NativeLibrary, check
from engine.native.structs import Decoder, DecoderLayer


@dataclass(slots=True)
class _Compiled:
    """A layer as the kernel reads it, and what must live as long."""

    layer: DecoderLayer
    shape: tuple[int, int]  # query heads, intermediate
    keep: list[Any] = field(default_factory=list)


class NativeDecoder(nn.Module):
    """A run of layers. Shapes: hidden_states [1, T, hidden]; position_embeddings cos and sin [1, T, rotary dims]."""

    def __init__(
        self, library: NativeLibrary, compiled: list[_Compiled], lora: NativeLora | None, hidden_states: Tensor
    ) -> None:
        """`hidden_states`: an example, for its width and dtype."""
        super().__init__()
        self._library = library
        self._lora = lora
        self._dtype = hidden_states.dtype
        self._compiled = compiled
        self._layers = (DecoderLayer * len(compiled))(*(c.layer for c in compiled))
        self._decoder = Decoder(
            layers=ctypes.addressof(self._layers),
            num_layers=len(compiled),
            hidden=hidden_states.shape[-1],
            intermediate=compiled[0].shape[1],
            num_heads=compiled[0].shape[0],
            is_bf16=self._dtype is torch.bfloat16,
        )

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_backend: NativeAttention,
        **__: Any,
    ) -> Tensor:
        hidden = hidden_states.contiguous()
        cos, sin = (x.to(self._dtype).contiguous() for x in position_embeddings)
        output = torch.empty_like(hidden)
        rows = attention_backend.rows(self._decoder.num_heads)
        self._decoder.rotary_dims = cos.shape[-1]
        address, count = None, 0
        if self._lora is not None:
            self._lora.rows.check_rows(rows.num_rows)
            address, count = self._lora.rows.address, self._lora.rows.count
        status = self._library.decoder(
            ctypes.byref(self._decoder),
            hidden.data_ptr(),
            output.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            ctypes.byref(attention_backend.cache),
            ctypes.byref(rows),
            address,
            count,
        )
        check(status, f"{rows.num_rows} rows of the decoder")
        return output

    def extra_repr(self) -> str:
        return f"layers={len(self._compiled)}"


@dataclass(frozen=True, slots=True)
class _Maker:
    library: NativeLibrary
    lora: NativeLora | None

    def compile(self, parts: LayerParts, *, with_lora: bool) -> _Compiled | None:
        return _compile(parts, self.library, self.lora if with_lora else None)

    def join(self, members: list[_Compiled], hidden: Tensor, *, with_lora: bool) -> nn.Module:
        return NativeDecoder(self.library, members, self.lora if with_lora else None, hidden)


def compile_decoder(
    model: nn.Module,
    sites: tuple[LinearSite, ...],
    library: NativeLibrary,
    lora: NativeLora | None,
    bench: Bench,
    uses: Mapping[str, Use] | None = None,
) -> set[int]:
    """Swap the layers that the kernel can compute. Returns: the indices of the sites they hold."""
    return swap_decoder(model, sites, bench, _Maker(library, lora), uses)


def _compile(parts: LayerParts, library: NativeLibrary, lora: NativeLora | None) -> _Compiled | None:
    """The layer for the kernel, or None if it cannot compute it."""
    linears, call = parts.linears, parts.call
    q_width, hidden, intermediate = linears["q"].out_features, linears["q"].in_features, linears["gate"].out_features
    if hidden % 2 or q_width % 2 or intermediate % 2:
        return None
    if not all(can_pack(linear, parts.dtype) for linear in linears.values()):
        return None
    if not _share_eps(parts, "input_norm", "post_norm") or not _share_eps(parts, "q_norm", "k_norm"):
        return None
    layer = DecoderLayer(index=call.index, window=call.sliding_window or 0, scaling=call.scaling)
    one = _Compiled(layer, (parts.num_heads, intermediate))
    packer = Packer(library)
    for key, linear in linears.items():
        table = None if lora is None else lora.table_address(parts.sites[key])
        member, keep = packer.pack(linear, table)
        setattr(layer, key, member)
        one.keep += keep
    for key, norm in parts.norms.items():
        setattr(layer, key, norm.weight.data_ptr())
        one.keep.append(norm.weight)
        setattr(layer, "head_norm_eps" if key in ("q_norm", "k_norm") else "norm_eps", norm.eps)
    return one


def _share_eps(parts: LayerParts, *keys: str) -> bool:
    """Of such norms the kernel knows one eps."""
    return len({parts.norms[key].eps for key in keys if key in parts.norms}) <= 1
