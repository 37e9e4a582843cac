"""Attention in plain torch operations, fast on the CPU: decode rows in batches, prefill by SDPA per sequence.

SDPA on the CPU with one query row costs about a millisecond a layer for 16 sequences, nearly all of it overhead. So
sequences with one row are gathered side by side, padded to the longest of their bucket, and multiplied as a batch.
Buckets double in length: padding is at most half of what is read. A bucket is cut into parts that stay in the cache,
and gathered into memory that is kept: a fresh buffer of megabytes costs more in page faults than the copy itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.kv.backend import AttentionInputs, LayerCall
from engine.kv.reference_attention import attend
from engine.kv.storage import KVStorage

_PART_BYTES = {"cpu": 4 << 20}  # of gathered keys; values come to the same
_PART_BYTES_ELSEWHERE = 128 << 20  # where launches cost more than misses
_MAX_SCORES = 1 << 24  # float32 scores held at once where SDPA cannot be used: 64 MiB


@dataclass(frozen=True, slots=True)
class _DecodeBucket:
    """Sequences with one row each and similar context, of which only the blocks a window reaches are read."""

    rows: torch.Tensor  # [n] rows of the batch
    block_tables: torch.Tensor  # [n, m]
    hidden: torch.Tensor  # [n, 1, m * P] bool: positions that are not the row's to see
    hidden_at: tuple[torch.Tensor, ...]  # the same as indices into [n, m * P]


@dataclass(frozen=True, slots=True)
class _Prefill:
    """One sequence with several rows."""

    start: int  # first row
    end: int
    block_table: torch.Tensor  # [m]: only the blocks a window reaches
    length: int  # positions read: first .. first + length - 1
    positions: torch.Tensor  # [end - start], relative to the first position read
    visible: torch.Tensor | None  # [end - start, length] bool; None: plain causal over the rows alone


@dataclass(frozen=True, slots=True)
class _Plan:
    """What one window size makes of a step."""

    decodes: tuple[_DecodeBucket, ...]
    prefills: tuple[_Prefill, ...]


class TorchAttention:
    """AttentionBackend for any device that torch knows. Accumulates in float32."""

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self._inputs: AttentionInputs | None = None
        self._plans: dict[int | None, _Plan] = {}
        self._scratch: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        part_bytes = _PART_BYTES.get(storage.data.device.type, _PART_BYTES_ELSEWHERE)
        self._max_part_blocks = max(1, part_bytes // (4 * storage.shape.row_elements))

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs
        self._plans = {}  # one per window size, made when the first layer with it runs

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None, "run before plan"
        self.storage.write(layer.index, k, v, inputs.slot_mapping)
        plan = self._plans.get(layer.sliding_window)
        if plan is None:
            plan = self._plans[layer.sliding_window] = self._make_plan(inputs, layer.sliding_window)
        out = torch.empty_like(q)
        for bucket in plan.decodes:
            out[bucket.rows] = self._decode(q[bucket.rows], bucket, layer).to(q.dtype)
        for prefill in plan.prefills:
            rows = slice(prefill.start, prefill.end)
            if prefill.visible is None and self.storage.shape.quantization is None:
                keys, values = k[rows], v[rows]
            else:  # of a quantized cache always: what is said must not depend on how a prompt is cut
                keys, values = self.storage.gather(layer.index, prefill.block_table)
                keys, values = keys[: prefill.length], values[: prefill.length]
            out[rows] = _prefill(q[rows], keys, values, prefill, layer).to(q.dtype)
        return out

    def _make_plan(self, inputs: AttentionInputs, window: int | None) -> _Plan:
        buckets: dict[int, list[int]] = {}
        prefills = []
        for s, context in enumerate(inputs.context_lengths):
            start, end = inputs.query_starts[s], inputs.query_starts[s + 1]
            first_block = self._first_block(context - (end - start), window)
            if end - start == 1:
                num_blocks = -(-context // self.storage.shape.block_size) - first_block
                buckets.setdefault((num_blocks - 1).bit_length(), []).append(s)
            else:
                prefills.append(self._make_prefill(inputs, s, first_block, window))
        decodes = []
        for log_blocks, members in buckets.items():
            size = max(1, self._max_part_blocks >> log_blocks)  # sequences in a part
            parts = (members[i : i + size] for i in range(0, len(members), size))
            decodes += [self._make_bucket(inputs, part, window) for part in parts]
        return _Plan(tuple(decodes), tuple(prefills))

    def _first_block(self, position: int, window: int | None) -> int:
        """The first block that a row at `position` (or later) can see."""
        return 0 if window is None else max(0, position - window + 1) // self.storage.shape.block_size

    def _make_bucket(self, inputs: AttentionInputs, members: list[int], window: int | None) -> _DecodeBucket:
        block_size = self.storage.shape.block_size
        device = inputs.block_tables.device
        contexts = [inputs.context_lengths[s] for s in members]
        firsts = [self._first_block(context - 1, window) for context in contexts]
        width = max(-(-c // block_size) - f for c, f in zip(contexts, firsts, strict=True))
        first = torch.tensor(firsts, device=device)
        columns = first[:, None] + torch.arange(width, device=device)  # [n, m] index into the block table
        # Padding of a bucket may point past the table: any block will do, it is hidden.
        tables = inputs.block_tables[torch.tensor(members, device=device)]
        block_tables = tables.gather(1, columns.clamp(max=tables.shape[1] - 1))
        positions = first[:, None] * block_size + torch.arange(width * block_size, device=device)
        last = torch.tensor(contexts, device=device)[:, None] - 1
        visible = positions <= last
        if window is not None:
            visible &= positions > last - window
        hidden = ~visible
        rows = torch.tensor([inputs.query_starts[s] for s in members], device=device)
        return _DecodeBucket(rows, block_tables, hidden[:, None], hidden.nonzero(as_tuple=True))

    def _make_prefill(self, inputs: AttentionInputs, s: int, first_block: int, window: int | None) -> _Prefill:
        start, end = inputs.query_starts[s], inputs.query_starts[s + 1]
        context = inputs.context_lengths[s]
        block_size = self.storage.shape.block_size
        device = inputs.block_tables.device
        alone = context == end - start and (window is None or window >= context)
        first = 0 if alone else first_block * block_size
        length = context - first
        table = inputs.block_tables[s, first_block : -(-context // block_size)]
        positions = torch.arange(length - (end - start), length, device=device)
        if alone:
            return _Prefill(start, end, table, length, positions, None)
        columns = torch.arange(length, device=device)
        visible = columns[None, :] <= positions[:, None]
        if window is not None:
            visible &= columns[None, :] > positions[:, None] - window
        return _Prefill(start, end, table, length, positions, visible)

    def _decode(self, q: torch.Tensor, bucket: _DecodeBucket, layer: LayerCall) -> torch.Tensor:
        """Shapes: q [n, Hq, D]; returns [n, Hq, D] float32."""
        keys, values = self._gather_float(layer.index, bucket.block_tables)  # [n, c, Hk, D]
        # What lies in a block behind a sequence's last token may be another's leavings, and 0 * NaN is NaN.
        values[bucket.hidden_at] = 0.0
        num_kv_heads, head_dim = keys.shape[2], keys.shape[3]
        grouped = q.float().mul(layer.scaling).view(q.shape[0], num_kv_heads, -1, head_dim)  # [n, Hk, G, D]
        out = torch.empty_like(grouped)
        # One batched product per KV head: the strides of `keys` allow it without a copy, all heads at once would not.
        for head in range(num_kv_heads):
            scores = torch.bmm(grouped[:, head], keys[:, :, head].transpose(1, 2))  # [n, G, c]
            if layer.softcap is not None:
                scores = scores.div_(layer.softcap).tanh_().mul_(layer.softcap)
            scores = scores.masked_fill_(bucket.hidden, float("-inf"))
            weights = _softmax(scores, _heads(layer.sinks, head, grouped.shape[2]))
            out[:, head] = torch.bmm(weights, values[:, :, head])
        return out.view(q.shape)

    def _gather_float(self, layer: int, block_tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in float32, in memory that the next call overwrites. Shapes: [n, m] -> [n, m * P, Hk, D]."""
        storage, num_blocks = self.storage, block_tables.numel()
        shape = (*block_tables.shape[:-1], -1, storage.shape.num_kv_heads, storage.shape.head_dim)
        items, dtype = storage.section_items, storage.section_dtype
        out = self._buffer("k", dtype, num_blocks, items), self._buffer("v", dtype, num_blocks, items)
        keys, values = storage.gather_sections(layer, block_tables, out)
        if dtype == torch.float32:
            return keys.view(shape), values.view(shape)
        elements = storage.shape.row_elements
        wide = (self._buffer(name, torch.float32, num_blocks, elements) for name in ("k", "v"))
        keys, values = (storage.widen(part, out) for part, out in zip((keys, values), wide, strict=True))
        return keys.view(shape), values.view(shape)

    def _buffer(self, name: str, dtype: torch.dtype, num_blocks: int, items: int) -> torch.Tensor:
        """Scratch memory [num_blocks, items] that grows to the largest part and stays."""
        buffer = self._scratch.get((name, dtype))
        if buffer is None or buffer.shape[0] < num_blocks:
            shape = (max(num_blocks, self._max_part_blocks), items)
            buffer = self._scratch[name, dtype] = torch.empty(shape, dtype=dtype, device=self.storage.data.device)
        return buffer[:num_blocks]


def _heads(sinks: torch.Tensor | None, kv_head: int, groups: int) -> torch.Tensor | None:
    return None if sinks is None else sinks[kv_head * groups : (kv_head + 1) * groups].float()


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last axis, with one more logit per head that takes its share. Shapes: [n, G, c], sinks [G]."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    share = sinks[None, :, None].expand(scores.shape[0], -1, 1)
    return torch.softmax(torch.cat([scores, share], dim=-1), dim=-1)[..., :-1]


def _prefill(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, prefill: _Prefill, layer: LayerCall
) -> torch.Tensor:
    """Shapes: q [t, Hq, D]; keys, values [c, Hk, D]; returns [t, Hq, D]."""
    if layer.softcap is None and layer.sinks is None:
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None].to(q.dtype),
            values.transpose(0, 1)[None].to(q.dtype),
            attn_mask=prefill.visible,
            is_causal=prefill.visible is None,
            scale=layer.scaling,
            enable_gqa=q.shape[1] != keys.shape[1],
        )
        return out[0].transpose(0, 1)
    # SDPA knows neither caps nor sinks: plain arithmetic, a few rows at a time so that the scores stay small.
    rows = max(1, _MAX_SCORES // (q.shape[1] * keys.shape[0]))
    parts = zip(q.split(rows), prefill.positions.split(rows), strict=True)
    return torch.cat([attend(part, keys, values, positions, layer) for part, positions in parts])
