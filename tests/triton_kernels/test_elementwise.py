"""The kernels between the products, against plain torch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from engine.kv.rows import KVQuantization, dequantize_rows, quantize_rows
from engine.kv.storage import KVShape, KVStorage
from engine.triton_kernels import elementwise
from tests.support.triton_device import DEVICE

TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected.double()).abs().max()
    return bool(error <= TOLERANCE[found.dtype] * expected.double().abs().max())


def norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@dtypes
@pytest.mark.parametrize("columns", [24, 128, 100])
def test_rms_norm(columns: int, dtype: torch.dtype) -> None:
    x, weight = draw(3, columns, dtype=dtype), draw(columns, dtype=dtype, seed=1)
    assert close(elementwise.rms_norm(x, weight, 1e-5), norm64(x, weight, 1e-5))


@dtypes
def test_rms_norm_of_a_sum_keeps_the_sum(dtype: torch.dtype) -> None:
    x, stream, weight = draw(3, 72, dtype=dtype), draw(3, 72, dtype=dtype, seed=1), draw(72, dtype=dtype, seed=2)
    total = x + stream
    y = elementwise.rms_norm(x, weight, 1e-5, residual=stream)
    # Triton's interpreter cuts what it should round to bfloat16.
    assert torch.equal(stream, total) or (DEVICE.type == "cpu" and dtype is torch.bfloat16 and close(stream, total))
    assert close(y, norm64(total, weight, 1e-5))


@dtypes
@pytest.mark.parametrize("columns", [40, 1500])
def test_silu_mul(columns: int, dtype: torch.dtype) -> None:
    gate_up = draw(2, 2 * columns, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    assert close(elementwise.silu_mul(gate_up), functional.silu(gate) * up)


def rotate64(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.double().chunk(2, dim=-1)
    return x.double() * cos.double()[:, None] + torch.cat([-right, left], -1) * sin.double()[:, None]


@dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 24), (6, 1, 64)])
def test_rope_and_cache(num_heads: int, num_kv_heads: int, head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    rows, page_tokens = 3, 4
    qkv = draw(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    angles = draw(rows, head_dim, dtype=torch.float32, seed=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = draw(2, head_dim, dtype=dtype, seed=2)
    widths = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
    q, k, v = (part.view(rows, -1, head_dim) for part in qkv.clone().split(widths, dim=1))
    if normed:
        q, k = norm64(q, weights[0], 1e-6), norm64(k, weights[1], 1e-6)
    slots = torch.tensor([9, -1, 2], device=DEVICE)
    cache = draw(3, 2, 2, page_tokens, num_kv_heads, head_dim, dtype=dtype, seed=3)
    before = cache.clone()
    norms = (weights, 1e-6) if normed else None
    found = elementwise.rope_and_cache(qkv, num_heads, cos, sin, cache, 1, slots, norms)
    assert close(found, rotate64(q, cos, sin))
    keys = rotate64(k, cos, sin)
    for row, slot in ((0, 9), (2, 2)):
        assert close(cache[slot // 4, 1, 0, slot % 4], keys[row])
        assert torch.equal(cache[slot // 4, 1, 1, slot % 4], v[row])
        before[slot // 4, 1, :, slot % 4] = cache[slot // 4, 1, :, slot % 4]
    assert torch.equal(cache, before)  # the row without a slot, other slots and other layers were left alone


@dtypes
def test_write_kv_takes_rows_as_they_lie(dtype: torch.dtype) -> None:
    k, v = draw(2, 3, 5, dtype=dtype).transpose(0, 1), draw(3, 2, 5, dtype=dtype, seed=1)
    cache = torch.zeros(2, 2, 2, 4, 2, 5, dtype=dtype, device=DEVICE)
    elementwise.write_kv(k, v, cache, 1, torch.tensor([6, -1, 1], device=DEVICE))
    expected = torch.zeros_like(cache)
    for row, (block, offset) in {0: (1, 2), 2: (0, 1)}.items():
        expected[block, 1, 0, offset], expected[block, 1, 1, offset] = k[row], v[row]
    assert torch.equal(cache, expected)


@dtypes
@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_rope_and_cache_keeps_the_rounded_rows_of_what_it_would_have_kept(
    quantization: KVQuantization, dtype: torch.dtype
) -> None:
    rows, num_heads, num_kv_heads, head_dim = 3, 4, 3, 24
    qkv = draw(rows, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    qkv[0, -head_dim:] = 0
    cos, sin = (draw(rows, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    slots = torch.tensor([9, -1, 2], device=DEVICE)
    queries, caches = [], []
    for kind in (None, quantization):
        storage = KVStorage(KVShape(2, 4, num_kv_heads, head_dim, dtype, kind), 3, DEVICE)
        given = qkv.clone()
        queries.append(
            elementwise.rope_and_cache(given, num_heads, cos, sin, storage.data, 1, slots, None, storage.scales)
        )
        caches.append([storage.gather(layer, torch.arange(3, device=DEVICE)) for layer in range(2)])
    assert torch.equal(queries[0], queries[1])
    for plain, found in zip(caches[0][1], caches[1][1], strict=True):
        assert plain[9].any()
        assert torch.equal(found, dequantize_rows(*quantize_rows(plain, quantization)))
    assert not any(part.any() for part in caches[1][0])  # of the other layer
