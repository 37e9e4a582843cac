"""Attention by the Triton kernels: decode rows with their keys in splits, prefill rows in tiles."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kv.backend import AttentionInputs, LayerCall, cut_tiles
from engine.kv.storage import KVStorage
from engine.to_device import upload
from engine.triton_kernels.attention import paged_attention, rows_of_tile
from engine.triton_kernels.elementwise import write_kv


class TritonAttention:
    """AttentionBackend over a cache in float32, float16, bfloat16, int8 or fp8 that a kernel can reach."""

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self._inputs: AttentionInputs | None = None
        self._decode_tiles: Tensor | None = None  # [S, 4]
        self._prefill_tiles: dict[int, Tensor] = {}  # by rows of a tile, made when a layer first needs it
        self._is_fixed = False
        self._prefills: list[int] = []  # sequences with several rows
        self._max_context = 0

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs, self._is_fixed = inputs, False
        self._prefill_tiles = {}
        starts, contexts = inputs.query_starts, inputs.context_lengths
        decodes = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] == 1]
        self._prefills = [s for s in range(len(contexts)) if starts[s + 1] - starts[s] > 1]
        self._decode_tiles = self._tiles(inputs, decodes, 1) if decodes else None
        self._max_context = max(contexts)

    def plan_fixed(self, inputs: AttentionInputs, tiles: Tensor) -> None:
        """A step of decode rows alone, whose tensors stay where they are and change what they say: a CUDA graph.

        Of `inputs` only the tensors are read. A tile [sequence, row, 1, position] whose rows are 0 stands for a row
        that nobody wants: its output is zero.
        """
        self._inputs, self._is_fixed = inputs, True
        self._decode_tiles, self._prefills = tiles, []
        self._max_context = inputs.block_tables.shape[1] * self.storage.shape.block_size

    @property
    def slot_mapping(self) -> Tensor:
        assert self._inputs is not None, "slot_mapping before plan"
        return self._inputs.slot_mapping

    def run(self, q: Tensor, k: Tensor, v: Tensor, layer: LayerCall) -> Tensor:
        k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (k, v))
        write_kv(k, v, self.storage.data, layer.index, self.slot_mapping, self.storage.scales)
        return self.attend(q, layer)

    def attend(self, q: Tensor, layer: LayerCall) -> Tensor:
        """Over what the cache holds, this step's keys and values included. Shapes: [T, Hq, D] -> [T, Hq, D]."""
        inputs = self._inputs
        assert inputs is not None, "attend before plan"
        queries = q.to(self.storage.shape.dtype)
        queries = queries if queries.stride(2) == 1 else queries.contiguous()
        new = torch.zeros if self._is_fixed else torch.empty
        out = new(q.shape, dtype=queries.dtype, device=q.device)
        rows = rows_of_tile(q.shape[1] // self.storage.shape.num_kv_heads)
        parts = [(self._decode_tiles, 1)] if self._decode_tiles is not None else []
        if self._prefills:
            parts.append((self._prefill(inputs, rows), rows))
        for tiles, tile_rows in parts:
            paged_attention(
                queries,
                self.storage.data,
                layer.index,
                inputs.block_tables,
                tiles,
                out,
                tile_rows=tile_rows,
                max_context=self._max_context,
                scaling=layer.scaling,
                scales=self.storage.scales,
                window=layer.sliding_window,
                softcap=layer.softcap,
                sinks=layer.sinks,
            )
        return out.to(q.dtype)

    def _prefill(self, inputs: AttentionInputs, rows: int) -> Tensor:
        tiles = self._prefill_tiles.get(rows)
        if tiles is None:
            tiles = self._prefill_tiles[rows] = self._tiles(inputs, self._prefills, rows)
        return tiles

    def _tiles(self, inputs: AttentionInputs, sequences: list[int], max_rows: int) -> Tensor:
        numbers = [number for tile in cut_tiles(inputs, sequences, max_rows) for number in tile]
        return upload(numbers, self.storage.data.device, torch.int32).view(-1, 4)
