"""Attention over the paged KV cache, after FlashAttention-2 (arXiv 2307.08691), with keys in splits for decoding
(Flash-Decoding) and the query heads of a KV head side by side as the rows of one product.

The rows of a step are cut into tiles: [sequence, first row, rows, position of the first row], int32; a tile without
rows is skipped. How the keys of a tile are split depends on its own context alone, so a row's result does not depend
on what else is in the batch.

A quantized cache is multiplied by its codes alone, which every element type of a model holds exactly. The scale of a
key goes into its score, that of a value into its weight: as a share of the largest scale beside it, because float16
would lose small ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.triton_kernels.launch import MIN_DOT, power_of_2, strides_of_scales, upcast

TILE_QUERIES = 64  # rows x query heads of a KV head, of a prefill tile
_MOST_SPLITS = 16
_MIN_SPLIT_TOKENS = 256  # below, a split costs more than it brings
_BLOCK_TOKENS = 64  # keys that a program looks at together


@triton.jit
def _bounds(
    position, num_rows, window, split,
    HAS_WINDOW: tl.constexpr, NUM_SPLITS: tl.constexpr, MOST_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First key and the one behind the last of one split of a tile."""
    end = position + num_rows
    start = position * 0
    if HAS_WINDOW:
        start = tl.maximum(position - window + 1, 0)
    if NUM_SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - start, MOST_SPLITS), BLOCK_N) * BLOCK_N
        share = tl.maximum(share, MIN_SPLIT)
        start += split * share
        end = tl.minimum(end, start + share)
    return start, end


@triton.jit
def _attend(
    q, cache, scales, tables, tiles, sinks, out, partial, partial_stats,
    q_row, q_head, out_row, out_head, table_row, page, layer_offset, value_offset, token,
    scale_page, scale_layer_offset, scale_value_offset,
    window, scaling, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr, MOST_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + tile * 4)
    first_row = tl.load(tiles + tile * 4 + 1)
    num_rows = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    start, end = _bounds(position, num_rows, window, split, HAS_WINDOW, NUM_SPLITS, MOST_SPLITS, MIN_SPLIT, BLOCK_N)
    if (num_rows == 0) | (start >= end):
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row, head = first_row + m // GROUP, kv_head * GROUP + m % GROUP
    is_row, is_dim = m // GROUP < num_rows, d < HEAD_DIM
    queries = tl.load(
        q + row[:, None].to(tl.int64) * q_row + head[:, None] * q_head + d[None, :],
        mask=is_row[:, None] & is_dim[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        queries = queries.to(tl.float32)
    at = position + m // GROUP  # of each query

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        is_key = n < end
        block = tl.load(tables + sequence.to(tl.int64) * table_row + n // PAGE_TOKENS, mask=is_key, other=0)
        lies = block.to(tl.int64) * page + layer_offset + (n % PAGE_TOKENS) * token + kv_head * HEAD_DIM
        keys = tl.load(cache + lies[None, :] + d[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0)
        values = tl.load(
            cache + lies[:, None] + value_offset + d[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0
        )
        keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        scores = tl.dot(queries, keys, input_precision="ieee") * scaling
        if HAS_SCALES:
            scale_lies = block.to(tl.int64) * scale_page + scale_layer_offset + kv_head * PAGE_TOKENS + n % PAGE_TOKENS
            scores *= tl.load(scales + scale_lies, mask=is_key, other=0.0)[None, :]
            value_scales = tl.load(scales + scale_lies + scale_value_offset, mask=is_key, other=0.0)
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)  # softcap * tanh(scores / softcap)
        visible = is_row[:, None] & is_key[None, :] & (n[None, :] <= at[:, None])
        if HAS_WINDOW:
            visible = visible & (n[None, :] > at[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen nothing yet has a top of -inf, and -inf - -inf is no number.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - pivot[:, None])
        kept = tl.exp(top - pivot)
        total = total * kept + tl.sum(weights, axis=1)
        acc = acc * kept[:, None]
        if HAS_SCALES:
            largest = tl.max(value_scales, axis=0)
            shares = weights * (value_scales / largest)[None, :]
            acc += tl.dot(shares.to(values.dtype), values, input_precision="ieee") * largest
        else:
            acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        top = new_top

    if NUM_SPLITS == 1:
        if HAS_SINKS:
            sink = tl.load(sinks + head).to(tl.float32)
            total += tl.exp(sink - top)
        total = tl.where(is_row, total, 1.0)
        tl.store(
            out + row[:, None].to(tl.int64) * out_row + head[:, None] * out_head + d[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty), mask=is_row[:, None] & is_dim[None, :],
        )  # fmt: skip
    else:
        num_heads = tl.num_programs(1) * GROUP
        lies = (tile.to(tl.int64) * num_heads + head) * NUM_SPLITS + split  # a tile has one row
        tl.store(partial + lies[:, None] * HEAD_DIM + d[None, :], acc, mask=is_row[:, None] & is_dim[None, :])
        tl.store(partial_stats + lies * 2, top, mask=is_row)
        tl.store(partial_stats + lies * 2 + 1, total, mask=is_row)


@triton.jit
def _combine(
    tiles, sinks, out, partial, partial_stats, out_row, out_head, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, NUM_SPLITS: tl.constexpr, MOST_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tiles + tile * 4 + 1)
    num_rows = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    if num_rows == 0:
        return
    split, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    start, end = _bounds(position, num_rows, window, split, HAS_WINDOW, NUM_SPLITS, MOST_SPLITS, MIN_SPLIT, BLOCK_N)
    used = (start < end) & (split < NUM_SPLITS)
    lies = (tile.to(tl.int64) * tl.num_programs(1) + head) * NUM_SPLITS + split
    tops = tl.load(partial_stats + lies * 2, mask=used, other=float("-inf"))
    totals = tl.load(partial_stats + lies * 2 + 1, mask=used, other=0.0)
    top = tl.max(tops, axis=0)
    if HAS_SINKS:
        top = tl.maximum(top, tl.load(sinks + head).to(tl.float32))
    shares = tl.exp(tops - top)
    total = tl.sum(totals * shares, axis=0)
    if HAS_SINKS:
        total += tl.exp(tl.load(sinks + head).to(tl.float32) - top)
    mask = used[:, None] & (d < HEAD_DIM)[None, :]
    parts = tl.load(partial + lies[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    result = tl.sum(parts * shares[:, None], axis=0) / total
    tl.store(out + row.to(tl.int64) * out_row + head * out_head + d, result.to(out.dtype.element_ty), mask=d < HEAD_DIM)


def rows_of_tile(group: int) -> int:
    """Rows of a prefill tile, for `group` query heads to a KV head."""
    return max(1, TILE_QUERIES // group)


def paged_attention(
    q: Tensor,
    cache: Tensor,
    layer: int,
    block_tables: Tensor,
    tiles: Tensor,
    out: Tensor,
    *,
    tile_rows: int,
    max_context: int,
    scaling: float,
    scales: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """out = softmax(cap(scaling * q K^T)) V for the rows of the tiles, over keys that the cache holds already.

    Tiles of one row have their keys split over several programs. `tile_rows` is the most rows a tile has, and
    `max_context` the most keys (more may be said than is true).
    Shapes: q, out [T, Hq, D] (any stride but that of D); cache [B, L, 2, P, Hk, D], codes if there are `scales`
    [B, L, 2, Hk, P]; block_tables [S, n]; tiles [N, 4]; sinks [Hq].
    """
    num_heads, head_dim = q.shape[1], q.shape[2]
    _, _, _, page_tokens, num_kv_heads, _ = cache.shape
    group, num_tiles = num_heads // num_kv_heads, tiles.shape[0]
    assert q.stride(2) == out.stride(2) == block_tables.stride(1) == 1
    assert cache.stride()[4:] == (head_dim, 1)
    num_splits = min(_MOST_SPLITS, triton.cdiv(max_context, _MIN_SPLIT_TOKENS)) if tile_rows == 1 else 1
    partial = partial_stats = out
    if num_splits > 1:
        partial = torch.empty((num_tiles, num_heads, num_splits, head_dim), dtype=torch.float32, device=q.device)
        partial_stats = torch.empty((num_tiles, num_heads, num_splits, 2), dtype=torch.float32, device=q.device)
    block_d = power_of_2(head_dim, MIN_DOT)
    shared = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_N": _BLOCK_TOKENS,
        "NUM_SPLITS": num_splits,
        "MOST_SPLITS": _MOST_SPLITS,
        "MIN_SPLIT": _MIN_SPLIT_TOKENS,
        "HAS_WINDOW": window is not None,
        "HAS_SINKS": sinks is not None,
    }
    some_sinks = out if sinks is None else sinks
    some_scales = out if scales is None else scales
    _attend[(num_tiles, num_kv_heads, num_splits)](
        q, cache, some_scales, block_tables, tiles, some_sinks, out, partial, partial_stats,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), block_tables.stride(0),
        cache.stride(0), layer * cache.stride(1), cache.stride(2), cache.stride(3),
        *strides_of_scales(scales, layer),
        window or 0, scaling, softcap or 0.0,
        GROUP=group, PAGE_TOKENS=page_tokens, BLOCK_M=power_of_2(tile_rows * group, MIN_DOT),
        HAS_SOFTCAP=softcap is not None, HAS_SCALES=scales is not None, UPCAST=upcast(q.dtype),
        num_warps=4 if block_d <= 128 else 8, **shared,
    )  # fmt: skip
    if num_splits > 1:
        _combine[(num_tiles, num_heads)](
            tiles, some_sinks, out, partial, partial_stats, out.stride(0), out.stride(1), window or 0,
            BLOCK_SPLITS=power_of_2(num_splits), num_warps=2, **shared,
        )  # fmt: skip
