"""Attention by the CPU kernel: decode and prefill rows of all sequences in one call per layer."""

from __future__ import annotations

from ctypes import byref

import numpy as np
import torch

from engine.kv.backend import AttentionInputs, LayerCall, cut_tiles
from engine.kv.storage import KVStorage
from engine.native.library import NativeLibrary, check
from engine.native.structs import AttentionLayer, AttentionRows, KVCache

MAX_TILE_QUERIES = 32  # rows x query heads that go through the keys together


class NativeAttention:
    """AttentionBackend over the cache of a float32 or bfloat16 model on the CPU, as it is or in int8."""

    def __init__(self, library: NativeLibrary, storage: KVStorage) -> None:
        assert storage.shape.quantization != "fp8", "the compiled kernels read no fp8"
        self.storage = storage
        self._library = library
        shape = storage.shape
        self.cache = KVCache(
            data=storage.pages.data_ptr(),
            num_layers=shape.num_layers,
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            section_bytes=shape.section_bytes,
            scales_offset=shape.scales_offset,
            is_bf16=shape.dtype is torch.bfloat16,
            is_int8=shape.quantization == "int8",
        )
        self._inputs: AttentionInputs | None = None
        self._tiles: dict[int, np.ndarray] = {}  # by rows of a tile, made when a layer first needs it
        self._rows = AttentionRows()

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._tiles = {}
        self._rows = AttentionRows(
            slot_mapping=inputs.slot_mapping.data_ptr(),
            block_tables=inputs.block_tables.data_ptr(),
            max_blocks=inputs.block_tables.stride(0),
            num_rows=inputs.query_starts[-1],
        )

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None, "run before plan"
        q_in, k, v = (self._readable(x) for x in (q, k, v))
        sinks = None if layer.sinks is None else layer.sinks.float().contiguous()
        out = torch.empty(q.shape, dtype=q_in.dtype)
        rows = self.rows(q.shape[1])
        call = AttentionLayer(
            index=layer.index,
            num_heads=q.shape[1],
            window=layer.sliding_window or 0,
            q_row=q_in.stride(0),
            q_head=q_in.stride(1),
            k_row=k.stride(0),
            k_head=k.stride(1),
            v_row=v.stride(0),
            v_head=v.stride(1),
            sinks=None if sinks is None else sinks.data_ptr(),
            scaling=layer.scaling,
            softcap=layer.softcap or 0.0,
        )
        status = self._library.attention(
            byref(self.cache), byref(rows), byref(call), q_in.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        )
        check(status, f"attention over {max(inputs.context_lengths)} tokens")
        return out.to(q.dtype)

    def rows(self, num_heads: int) -> AttentionRows:
        """The planned step, as the kernels read it for a layer with so many query heads; valid until the next plan."""
        inputs = self._inputs
        assert inputs is not None, "rows before plan"
        tiles = self._tiles_of(inputs, num_heads // self.storage.shape.num_kv_heads)
        self._rows.tiles, self._rows.num_tiles = tiles.ctypes.data, len(tiles)
        return self._rows

    def _readable(self, x: torch.Tensor) -> torch.Tensor:
        """In the model's dtype, the dimensions of a head side by side."""
        x = x.to(self.storage.shape.dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def _tiles_of(self, inputs: AttentionInputs, groups: int) -> np.ndarray:
        """[tiles, 4] int32: sequence, first row, rows, position of the first row."""
        size = max(1, MAX_TILE_QUERIES // groups)
        tiles = self._tiles.get(size)
        if tiles is None:
            tiles = self._tiles[size] = _cut(inputs, size)
        return tiles


def _cut(inputs: AttentionInputs, size: int) -> np.ndarray:
    starts, contexts = inputs.query_starts, inputs.context_lengths
    if starts[-1] == len(contexts):  # a row each, as in nearly every step
        tiles = np.ones((len(contexts), 4), dtype=np.int32)
        tiles[:, 0] = tiles[:, 1] = np.arange(len(contexts))
        tiles[:, 3] = np.array(contexts) - 1
        return tiles
    return np.array(cut_tiles(inputs, range(len(contexts)), size), dtype=np.int32)
