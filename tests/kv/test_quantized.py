"""A cache in eight bits: what it keeps of a row, and that attention over it is attention over just that."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from engine.kv.backend import LayerCall
from engine.kv.rows import LARGEST_CODES, KVQuantization, dequantize_rows, quantize_rows
from engine.kv.storage import KVShape, KVStorage
from tests.kv.quantized_oracle import attend64, round_rows, slots_before
from tests.kv.test_attention import DECODES, MIXED, PREFILLS, device_of, make_backend, make_step

# Of sums alone: the rounding of rows is in both sides. In 16 bits the result is rounded, of up to 4: half a step of
# 2^-9 or 2^-6; and before, by the backend, weights or widened rows.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
NUM_BLOCKS = 160
FEW = ((1, 9), (3, 5), (1, 0))  # Triton's interpreter takes half a second for a tile
BACKENDS: tuple[tuple[str, KVQuantization], ...] = (
    ("reference", "int8"),
    ("reference", "fp8"),
    ("torch", "int8"),
    ("torch", "fp8"),
    ("native", "int8"),
    ("triton", "int8"),
    ("triton", "fp8"),
)
backends = pytest.mark.parametrize(("name", "quantization"), BACKENDS)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(
    name: str,
    quantization: KVQuantization,
    sequences: tuple[tuple[int, int], ...],
    *,
    block_size: int = 4,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layer: LayerCall | None = None,
) -> None:
    """A step over what torch wrote into the cache before, against the oracle."""
    device, layer = device_of(name), layer or LayerCall(index=1, scaling=head_dim**-0.5)
    step = make_step(sequences, block_size, NUM_BLOCKS, seed=3, device=device)
    total = sum(step.context_lengths)
    q, k, v = (draw(total, h, head_dim, dtype=dtype, seed=i) for i, h in enumerate((heads[0], heads[1], heads[1])))
    k[::5] *= 4  # rows of different sizes, as trained models have them
    ends = list(itertools.accumulate(step.context_lengths))
    now = [slice(end - rows, end) for end, (rows, _) in zip(ends, sequences, strict=True)]
    past = [slice(end - sum(s), end - s[0]) for end, s in zip(ends, sequences, strict=True)]
    storage = KVStorage(KVShape(2, block_size, heads[1], head_dim, dtype, quantization), NUM_BLOCKS, device)
    backend = make_backend(name, storage)
    old_k, old_v = (torch.cat([x[part] for part in past]).to(device) for x in (k, v))
    storage.write(layer.index, old_k, old_v, slots_before(step, block_size))
    backend.plan(step)
    found = backend.run(*(torch.cat([x[part] for part in now]).to(device) for x in (q, k, v)), layer)
    keys, values = round_rows(k, quantization), round_rows(v, quantization)
    expected = []
    for (_, before), part, whole in zip(sequences, now, past, strict=True):
        seen = slice(whole.start, part.stop)
        expected.append(attend64(q[part], keys[seen], values[seen], before, layer))
    assert found.dtype is dtype
    assert (found.double().cpu() - torch.cat(expected)).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("name", "quantization", "sequences", "block_size", "heads", "head_dim", "dtype"),
    [
        *((n, q, MIXED, 4, (6, 2), 5, d) for (n, q), d in itertools.product(BACKENDS[:4], TOLERANCE)),
        *itertools.product(
            ("native",), ("int8",), (DECODES, PREFILLS, MIXED), (1, 4, 16), ((4, 2), (6, 1)), (5, 24),
            (torch.float32, torch.bfloat16),
        ),
        *itertools.product(("native",), ("int8",), (MIXED,), (16,), ((14, 2),), (64, 80, 100, 128), (torch.float32,)),
        *(("triton", q, FEW, 4, (6, 2), 5, d) for q, d in itertools.product(("int8", "fp8"), SIXTEEN_BITS)),
        ("triton", "int8", FEW, 1, (3, 3), 24, torch.float32),
        ("triton", "fp8", FEW, 16, (6, 1), 33, torch.float32),
    ],
)  # fmt: skip
def test_attention_reads_the_rounded_rows_and_nothing_else(
    name: str,
    quantization: KVQuantization,
    sequences: tuple[tuple[int, int], ...],
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    check(name, quantization, sequences, block_size=block_size, heads=heads, head_dim=head_dim, dtype=dtype)


@backends
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(4, None, True), (None, 1.5, False), (9, 0.7, True)])
def test_windows_caps_and_sinks_are_those_of_the_oracle(
    name: str, quantization: KVQuantization, window: int | None, softcap: float | None, sinks: bool
) -> None:
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device_of(name)) if sinks else None
    layer = LayerCall(index=0, scaling=0.4, sliding_window=window, softcap=softcap, sinks=sink)
    check(name, quantization, FEW if name == "triton" else MIXED, layer=layer)


@pytest.mark.parametrize(("name", "quantization"), [("torch", "int8"), ("native", "int8"), ("triton", "fp8")])
def test_long_contexts_equal_the_oracle(name: str, quantization: KVQuantization) -> None:
    """Beyond what one program of a GPU reads."""
    check(name, quantization, ((1, 699), (1, 5), (20, 300)), block_size=64, heads=(2, 1))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_keeps_the_same_bytes(name: str, quantization: KVQuantization, dtype: torch.dtype) -> None:
    """Those of the definition: a prefix computed by one kernel is read by another."""
    k, v = draw(9, 2, 40, dtype=dtype), draw(9, 2, 40, dtype=dtype, seed=1)
    k[3] = 0
    k[4, 0] *= 1e-30
    v[5] *= 1e30
    v[6, 1] = torch.arange(40) - 20.5  # ties
    step = make_step(((9, 0),), 4, 8, seed=1, device=device_of(name))
    storage = KVStorage(KVShape(2, 4, 2, 40, dtype, quantization), 8, device_of(name))
    backend = make_backend(name, storage)
    backend.plan(step)
    backend.run(*(x.to(device_of(name)) for x in (k.repeat(1, 2, 1), k, v)), LayerCall(index=1, scaling=0.1))
    found = storage.gather(1, step.block_tables[0])
    for rows, expected in zip(found, (k, v), strict=True):
        assert torch.equal(rows[:9].double().cpu(), round_rows(expected, quantization).float().double())
    untouched = storage.gather(0, step.block_tables[0])
    assert not any(rows.any() for rows in untouched)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_row_is_kept_within_half_a_step(quantization: KVQuantization) -> None:
    x = draw(500, 64) * torch.logspace(-20, 20, 500)[:, None]
    codes, scales = quantize_rows(x, quantization)
    error = (dequantize_rows(codes, scales) - x).abs() / scales[:, None]
    # e4m3 has steps of 1/8 of the power of two below, down to 2^-9.
    ratio = (x / scales[:, None]).abs()
    step = torch.ones(()) if quantization == "int8" else torch.exp2(ratio.log2().floor().clamp(min=-6) - 3)
    assert (error <= 0.5001 * step).all()
    assert codes.float().abs().max() == LARGEST_CODES[quantization]


@backends
@pytest.mark.parametrize("broken", [float("nan"), float("-inf")])
@pytest.mark.parametrize("is_value", [False, True])
def test_numbers_that_broke_stay_visible(
    name: str, quantization: KVQuantization, broken: float, is_value: bool
) -> None:
    """In every row that sees them, and in no other sequence or head."""
    device = device_of(name)
    step = make_step(((4, 0), (3, 0)), 4, 8, seed=1, device=device)
    q, k, v = draw(7, 2, 8, seed=1), draw(7, 2, 8, seed=2), draw(7, 2, 8, seed=3)
    (v if is_value else k)[2, 0, 5] = broken
    backend = make_backend(name, KVStorage(KVShape(1, 4, 2, 8, torch.float32, quantization), 8, device))
    backend.plan(step)
    found = backend.run(q.to(device), k.to(device), v.to(device), LayerCall(index=0, scaling=0.3))
    is_broken = found.isnan().any(-1).cpu()  # [T, Hq]
    assert is_broken[2:4, 0].all()
    if is_value:
        is_broken[:2, 0] = False  # neighbours in one product: no weight times a NaN is one
    assert is_broken.sum() == 2


@backends
def test_what_another_sequence_left_in_a_block_is_never_seen(name: str, quantization: KVQuantization) -> None:
    """Bytes of ones are codes and scales that are no numbers."""
    device = device_of(name)
    step = make_step(((1, 5), (1, 0), (3, 2)), 4, 32, seed=1, device=device)
    slots = slots_before(step, 4)
    layer = LayerCall(index=0, scaling=0.4, sliding_window=3)
    outputs = []
    for leavings in (0, 255):
        storage = KVStorage(KVShape(1, 4, 2, 4, torch.float32, quantization), 32, device)
        storage.pages.fill_(leavings)
        storage.write(0, *(draw(len(slots), 2, 4, seed=i).to(device) for i in range(2)), slots)
        backend = make_backend(name, storage)
        backend.plan(step)
        outputs.append(backend.run(*(draw(5, 2, 4, seed=i).to(device) for i in range(3)), layer))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_copied_block_has_the_codes_and_the_scales_of_its_source(quantization: KVQuantization) -> None:
    storage = KVStorage(KVShape(3, 4, 2, 5, torch.float32, quantization), 6)
    for layer in range(3):
        storage.write(layer, draw(24, 2, 5, seed=layer), draw(24, 2, 5, seed=layer + 9), torch.arange(24))
    before = [storage.gather(layer, torch.arange(6)) for layer in range(3)]
    storage.copy_blocks([1, 4], [4, 2])
    for layer in range(3):
        for was, now in zip(before[layer], storage.gather(layer, torch.arange(6)), strict=True):
            assert torch.equal(now, was.view(6, 4, 2, 5)[[0, 1, 4, 3, 1, 5]].view(24, 2, 5))


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize("sizes", [(3, 16, 2, 64), (2, 16, 8, 128), (1, 1, 1, 5), (2, 3, 1, 7)])
def test_a_page_can_also_hold_adapters(sizes: tuple[int, int, int, int], quantization: KVQuantization) -> None:
    """A multiple of 64 bytes, whatever the shape; as long as what the storage allocates."""
    shape = KVShape(*sizes, torch.bfloat16, quantization)
    assert shape.block_bytes % 64 == 0
    assert KVStorage(shape, 7).pages.numel() == 7 * shape.block_bytes


@pytest.mark.parametrize("head_dim", [64, 128])
def test_eight_bits_take_about_half_the_bytes_of_sixteen(head_dim: int) -> None:
    """A byte an element and four a row: 0.53 of the bytes at head size 64, 0.52 at 128."""
    ours, plain = (KVShape(24, 16, 2, head_dim, torch.bfloat16, kind).block_bytes for kind in ("int8", None))
    assert ours / plain == (head_dim + 4) / (2 * head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_cut(dtype: torch.dtype) -> None:
    """Alone or with the rows before it, and so does what the cache keeps of it."""
    outputs, pages = [], []
    for cut in ((40,), (1,) * 40, (17, 3, 20)):
        storage = KVStorage(KVShape(1, 4, 2, 24, dtype, "int8"), NUM_BLOCKS)
        backend = make_backend("native", storage)
        q, k, v = (draw(40, heads, 24, dtype=dtype, seed=heads) for heads in (6, 2, 2))
        start, parts = 0, []
        for rows in cut:
            backend.plan(make_step(((rows, start),), 4, NUM_BLOCKS, seed=3))
            part = slice(start, start + rows)
            parts.append(backend.run(q[part], k[part], v[part], LayerCall(index=0, scaling=0.2, sliding_window=29)))
            start += rows
        outputs.append(torch.cat(parts))
        pages.append(storage.pages)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    assert all(torch.equal(pages[0], other) for other in pages[1:])
