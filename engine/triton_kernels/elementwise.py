"""What lies between the matrix products of a decoder layer, each in one pass over memory and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.triton_kernels.launch import power_of_2, strides_of_scales

_SILU_COLUMNS = 1024
_LARGEST_CODES = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_MIN_SCALE = tl.constexpr(2.0**-126)
_TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added and taken away, it leaves a small float32 whole, ties to even
_FP8_STEP = tl.constexpr(2.0**-3)  # of e4m3: between neighbours, as a share of the power of two below
_FP8_MIN_NORMAL = tl.constexpr(2.0**-6)


@triton.jit
def _rms_norm(x, residual, weight, y, columns, eps, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    mask = c < columns
    value = tl.load(x + row * columns + c, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        stream = tl.load(residual + row * columns + c, mask=mask, other=0.0)
        value = (value.to(tl.float32) + stream.to(tl.float32)).to(value.dtype)  # rounded as the stream is kept
        tl.store(residual + row * columns + c, value, mask=mask)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=0) / columns + eps)
    result = value * scale * tl.load(weight + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, result.to(y.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """y = s / sqrt(mean(s^2) + eps) * weight (arXiv 1910.07467), where s = x, or residual + x, which becomes residual.

    Shapes: x, residual, y [T, H] contiguous, weight [H].
    """
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    y = torch.empty_like(x)
    rows, columns = x.shape
    block = power_of_2(columns)
    _rms_norm[(rows,)](
        x, x if residual is None else residual, weight, y, columns, eps,
        BLOCK=block, HAS_RESIDUAL=residual is not None, num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return y


@triton.jit
def _silu_mul(gate_up, y, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = c < columns
    gate = tl.load(gate_up + row * 2 * columns + c, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * columns + columns + c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * columns + c, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """y = silu(gate) * up (arXiv 2002.05202). Shapes: gate_up [T, 2 I] contiguous, gate first; y [T, I]."""
    assert gate_up.is_contiguous()
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((rows, columns), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(rows, triton.cdiv(columns, _SILU_COLUMNS))](gate_up, y, columns, BLOCK=_SILU_COLUMNS, num_warps=4)
    return y


@triton.jit
def _head_norm(left, right, weight, half, mask, eps, HEAD_DIM: tl.constexpr):
    """RMSNorm of each head, given as halves [heads, D / 2]."""
    mean = (tl.sum(left * left, axis=1) + tl.sum(right * right, axis=1)) / HEAD_DIM
    scale = tl.rsqrt(mean + eps)[:, None]
    low = tl.load(weight + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    high = tl.load(weight + HEAD_DIM // 2 + half, mask=mask, other=0.0).to(tl.float32)[None, :]
    return left * scale * low, right * scale * high


@triton.jit
def _row_scales(largest, LARGEST_CODE: tl.constexpr):
    """Scales of rows by their largest |x|: NaN where that is no finite number (engine/kv/rows.py)."""
    scales = tl.maximum(tl.div_rn(largest, tl.full(largest.shape, LARGEST_CODE, tl.float32)), _MIN_SCALE)
    return tl.where(largest < float("inf"), scales, float("nan"))


@triton.jit
def _magnitude(x):
    """|x| in float32, infinite for a NaN, which `tl.max` would pass over."""
    x = tl.abs(x.to(tl.float32))
    return tl.where(x == x, x, float("inf"))


@triton.jit
def _codes(x, scales, dtype: tl.constexpr):
    """x / scales, rounded to what the cache keeps. Shapes: [H, D], [H, 1]."""
    ratio = tl.div_rn(x.to(tl.float32), tl.broadcast_to(scales, x.shape))
    ratio = tl.where(ratio == ratio, ratio, 0.0)
    magic = _TO_WHOLE
    if dtype != tl.int8:
        # Rounded here and not by the cast, which Triton's interpreter gets wrong: it drops carries into the exponent.
        power = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        magic = tl.maximum(power, _FP8_MIN_NORMAL) * (_TO_WHOLE * _FP8_STEP)
    return ((ratio + magic) - magic).to(dtype)


@triton.jit
def _rope_and_cache(
    qkv, qkv_row, cos, sin, norms, eps, cache, scales, slots, page, layer_offset, value_offset, token,
    scale_page, scale_layer_offset, scale_value_offset,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr, HAS_NORMS: tl.constexpr, LARGEST_CODE: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)  # part 0: queries, 1: keys, 2: values
    HALF: tl.constexpr = HEAD_DIM // 2
    h, half = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_HALF)
    num_heads = tl.where(part == 0, NUM_HEADS, NUM_KV_HEADS)
    first_head = tl.where(part == 0, 0, NUM_HEADS + (part - 1) * NUM_KV_HEADS)
    is_half = half < HALF
    mask = (h < num_heads) & is_half[None, :]
    source = qkv + row * qkv_row + (first_head + h) * HEAD_DIM + half[None, :]
    left, right = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
    dtype = left.dtype
    if part < 2:
        a, b = left.to(tl.float32), right.to(tl.float32)
        if HAS_NORMS:
            a, b = _head_norm(a, b, norms + part * HEAD_DIM, half, is_half, eps, HEAD_DIM)
        at = row * HEAD_DIM + half
        cos_a = tl.load(cos + at, mask=is_half, other=0.0).to(tl.float32)[None, :]
        sin_a = tl.load(sin + at, mask=is_half, other=0.0).to(tl.float32)[None, :]
        cos_b = tl.load(cos + at + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
        sin_b = tl.load(sin + at + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
        left, right = (a * cos_a - b * sin_a).to(dtype), (b * cos_b + a * sin_b).to(dtype)
    if part == 0:
        tl.store(source, left, mask=mask)
        tl.store(source + HALF, right, mask=mask)
    else:
        slot = tl.load(slots + row)
        if slot >= 0:
            block, offset = (slot // PAGE_TOKENS).to(tl.int64), slot % PAGE_TOKENS
            target = cache + block * page + layer_offset + (part - 1) * value_offset
            target += offset * token + h * HEAD_DIM + half[None, :]
            if LARGEST_CODE > 0:
                largest = tl.maximum(tl.max(_magnitude(left), axis=1), tl.max(_magnitude(right), axis=1))
                row_scales = _row_scales(largest, LARGEST_CODE)[:, None]
                scale_target = scales + block * scale_page + scale_layer_offset + (part - 1) * scale_value_offset
                tl.store(scale_target + h * PAGE_TOKENS + offset, row_scales, mask=h < num_heads)
                tl.store(target, _codes(left, row_scales, cache.dtype.element_ty), mask=mask)
                tl.store(target + HALF, _codes(right, row_scales, cache.dtype.element_ty), mask=mask)
            else:
                tl.store(target, left.to(cache.dtype.element_ty), mask=mask)
                tl.store(target + HALF, right.to(cache.dtype.element_ty), mask=mask)


def rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    layer: int,
    slots: Tensor,
    norms: tuple[Tensor, float] | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """Normalise queries and keys (`norms`: weights [2, D], eps), rotate them, and write keys and values to the cache.

    Rotation: x cos + rotate_half(x) sin (RoFormer, arXiv 2104.09864, with the halves of a head as pairs).
    Shapes: qkv [T, (Hq + 2 Hk) D], its queries changed in place; cos, sin [T, D] contiguous; cache [B, L, 2, P, Hk, D],
    codes if there are `scales` [B, L, 2, Hk, P]; slots [T], -1: to nowhere; returns the queries, a view [T, Hq, D].
    """
    _, _, _, page_tokens, num_kv_heads, head_dim = cache.shape
    assert head_dim % 2 == 0
    assert cos.shape == sin.shape == (qkv.shape[0], head_dim)
    weights, eps = (qkv, 0.0) if norms is None else norms
    _rope_and_cache[(qkv.shape[0], 3)](
        qkv, qkv.stride(0), cos, sin, weights, eps, cache, cache if scales is None else scales, slots,
        cache.stride(0), layer * cache.stride(1), cache.stride(2), cache.stride(3), *strides_of_scales(scales, layer),
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, PAGE_TOKENS=page_tokens,
        BLOCK_H=power_of_2(num_heads), BLOCK_HALF=power_of_2(head_dim // 2), HAS_NORMS=norms is not None,
        LARGEST_CODE=_LARGEST_CODES.get(cache.dtype, 0.0), num_warps=4,
    )  # fmt: skip
    return qkv[:, : num_heads * head_dim].view(-1, num_heads, head_dim)


@triton.jit
def _write_kv(
    k, v, k_row, k_head, v_row, v_head, cache, scales, slots, page, layer_offset, value_offset, token,
    scale_page, scale_layer_offset, scale_value_offset, num_heads,
    HEAD_DIM: tl.constexpr, PAGE_TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST_CODE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot < 0:
        return
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    mask = (h < num_heads) & (d < HEAD_DIM)
    keys = tl.load(k + row * k_row + h * k_head + d, mask=mask, other=0.0)
    values = tl.load(v + row * v_row + h * v_head + d, mask=mask, other=0.0)
    block, offset = (slot // PAGE_TOKENS).to(tl.int64), slot % PAGE_TOKENS
    target = cache + block * page + layer_offset + offset * token + h * HEAD_DIM + d
    if LARGEST_CODE > 0:
        key_scales = _row_scales(tl.max(_magnitude(keys), axis=1), LARGEST_CODE)[:, None]
        value_scales = _row_scales(tl.max(_magnitude(values), axis=1), LARGEST_CODE)[:, None]
        scale_target = scales + block * scale_page + scale_layer_offset + h * PAGE_TOKENS + offset
        tl.store(scale_target, key_scales, mask=h < num_heads)
        tl.store(scale_target + scale_value_offset, value_scales, mask=h < num_heads)
        keys = _codes(keys, key_scales, cache.dtype.element_ty)
        values = _codes(values, value_scales, cache.dtype.element_ty)
    tl.store(target, keys.to(cache.dtype.element_ty), mask=mask)
    tl.store(target + value_offset, values.to(cache.dtype.element_ty), mask=mask)


def write_kv(k: Tensor, v: Tensor, cache: Tensor, layer: int, slots: Tensor, scales: Tensor | None = None) -> None:
    """Put the keys and values of rows into their slots (-1: to nowhere).

    Shapes: k, v [T, Hk, D] (any stride but that of D); cache [B, L, 2, P, Hk, D], codes if there are `scales`
    [B, L, 2, Hk, P]; slots [T].
    """
    _, _, _, page_tokens, num_kv_heads, head_dim = cache.shape
    assert k.stride(2) == v.stride(2) == 1
    _write_kv[(k.shape[0],)](
        k, v, k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache, cache if scales is None else scales, slots,
        cache.stride(0), layer * cache.stride(1), cache.stride(2), cache.stride(3), *strides_of_scales(scales, layer),
        num_kv_heads,
        HEAD_DIM=head_dim, PAGE_TOKENS=page_tokens, BLOCK_H=power_of_2(num_kv_heads), BLOCK_D=power_of_2(head_dim),
        LARGEST_CODE=_LARGEST_CODES.get(cache.dtype, 0.0), num_warps=4,
    )  # fmt: skip
