"""The fast attention paths against the oracle, on odd shapes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from engine.kv.backend import AttentionBackend, AttentionInputs, LayerCall
from engine.kv.native_attention import NativeAttention
from engine.kv.reference_attention import ReferenceAttention, attend
from engine.kv.storage import KVShape, KVStorage
from engine.kv.torch_attention import TorchAttention
from engine.kv.triton_attention import TritonAttention
from tests.support.native import native_or_skip
from tests.support.triton_device import DEVICE as TRITON_DEVICE

FAST = ("torch", "native", "triton")
CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
TRITON_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# (rows of this step, tokens computed before) of each sequence
DECODES = ((1, 0), (1, 1), (1, 15), (1, 16), (1, 63), (1, 7), (1, 30))
PREFILLS = ((5, 0), (17, 0), (3, 13), (16, 16), (2, 31))
MIXED = ((1, 9), (4, 0), (1, 0), (7, 5), (1, 33), (2, 1))


def device_of(name: str) -> torch.device:
    return TRITON_DEVICE if name == "triton" else CPU


def make_step(
    sequences: tuple[tuple[int, int], ...],
    block_size: int,
    num_blocks: int,
    seed: int,
    device: torch.device = CPU,
) -> AttentionInputs:
    blocks = list(range(num_blocks))
    random.Random(seed).shuffle(blocks)
    tables, slots, starts = [], [], [0]
    for rows, before in sequences:
        table = [blocks.pop() for _ in range(-(-(rows + before) // block_size))]
        slots += [table[p // block_size] * block_size + p % block_size for p in range(before, before + rows)]
        tables.append(table)
        starts.append(starts[-1] + rows)
    width = max(map(len, tables))
    contexts = tuple(rows + before for rows, before in sequences)
    return AttentionInputs(
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], device=device),
        query_starts=tuple(starts),
        context_lengths=contexts,
    )


def make_backend(name: str, storage: KVStorage) -> AttentionBackend:
    if name == "reference":
        return ReferenceAttention(storage)
    if name == "triton":
        return TritonAttention(storage)
    return TorchAttention(storage) if name == "torch" else NativeAttention(native_or_skip(), storage)


def run_both(
    fast: str,
    sequences: tuple[tuple[int, int], ...],
    *,
    block_size: int = 4,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    layer: LayerCall | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator, device = torch.Generator().manual_seed(7), device_of(fast)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    step = make_step(sequences, block_size, 160, seed=3, device=device)
    rows = step.query_starts[-1]
    shape = KVShape(2, block_size, heads[1], head_dim, dtype)
    past = draw(160, 2, 2, block_size, heads[1], head_dim)
    q, k, v = draw(rows, heads[0], head_dim), draw(rows, heads[1], head_dim), draw(rows, heads[1], head_dim)
    layer = layer or LayerCall(index=1, scaling=head_dim**-0.5)
    outputs = []
    for name in ("reference", fast):
        storage = KVStorage(shape, 160, device)
        storage.data.copy_(past)
        backend = make_backend(name, storage)
        backend.plan(step)
        outputs.append(backend.run(q, k, v, layer))
    assert outputs[1].dtype == dtype
    return outputs[0].float(), outputs[1].float()


@pytest.mark.parametrize(
    ("fast", "sequences", "block_size", "heads", "dtype"),
    [
        *itertools.product(
            ("torch", "native"), (DECODES, PREFILLS, MIXED), (1, 4, 16), ((4, 2), (6, 1), (3, 3)), TOLERANCE
        ),
        # The interpreter takes a second for each.
        *itertools.product(("triton",), (DECODES, PREFILLS), (4,), ((4, 2), (6, 1)), TOLERANCE),
        ("triton", MIXED, 1, (3, 3), torch.float16),
        ("triton", MIXED, 16, (4, 2), torch.bfloat16),
    ],
)
def test_fast_path_equals_the_oracle(fast, sequences, block_size, heads, dtype) -> None:
    expected, actual = run_both(fast, sequences, block_size=block_size, heads=heads, head_dim=5, dtype=dtype)
    assert (expected - actual).abs().max() <= (TRITON_TOLERANCE if fast == "triton" else TOLERANCE)[dtype]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("head_dim", [16, 33, 64, 80, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_heads_of_every_size_equal_the_oracle(fast, head_dim, dtype) -> None:
    expected, actual = run_both(fast, MIXED, head_dim=head_dim, heads=(14, 2), dtype=dtype)
    assert (expected - actual).abs().max() <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("fast", "sequences", "window"),
    [
        *itertools.product(("torch", "native"), (DECODES, PREFILLS, MIXED), (None, 1, 3, 4, 9, 1000)),
        *itertools.product(("triton",), (MIXED,), (None, 1, 4, 1000)),
    ],
)
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (0.7, True)])
def test_windows_caps_and_sinks_are_those_of_the_oracle(fast, sequences, window, softcap, sinks) -> None:
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device_of(fast)) if sinks else None
    layer = LayerCall(index=0, scaling=0.4, sliding_window=window, softcap=softcap, sinks=sink)
    expected, actual = run_both(fast, sequences, layer=layer)
    assert (expected - actual).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("window", [None, 600])
def test_long_contexts_equal_the_oracle(fast, window) -> None:
    """Beyond what one program of a GPU reads: 300, 700, 1,100 and 4,500 keys, and a prefill in tiles."""
    sequences = ((1, 299), (1, 699), (1, 5), (1, 1099), (1, 4499), (70, 200))
    layer = LayerCall(index=1, scaling=0.5, sliding_window=window, sinks=torch.ones(4, device=device_of(fast)))
    expected, actual = run_both(fast, sequences, block_size=64, layer=layer)
    assert (expected - actual).abs().max() <= TOLERANCE[torch.float32]


def test_the_oracle_itself_is_causal_softmax_attention() -> None:
    """Against torch's own, on a case it knows."""
    q, k, v = (torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    ours = attend(q, k, v, torch.arange(6), LayerCall(index=0, scaling=0.5))
    theirs = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, scale=0.5
    )
    assert torch.allclose(ours, theirs[0].transpose(0, 1), atol=1e-6)


def test_long_capped_prefill_is_cut_into_parts_without_a_seam(monkeypatch) -> None:
    monkeypatch.setattr("engine.kv.torch_attention._MAX_SCORES", 100)
    expected, actual = run_both("torch", PREFILLS, layer=LayerCall(index=0, scaling=0.4, softcap=2.0))
    assert (expected - actual).abs().max() <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("fast", FAST)
@pytest.mark.parametrize("window", [None, 3])
def test_what_another_sequence_left_in_a_block_is_never_seen(fast, window) -> None:
    """Not even as NaN: a sequence whose numbers broke must not break the next owner of its blocks."""
    device = device_of(fast)
    step = make_step(((1, 5), (1, 0), (1, 9), (3, 2)), 4, 32, seed=1, device=device)
    layer = LayerCall(index=0, scaling=0.4, sliding_window=window)
    q, k, v = (torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    outputs = []
    for leavings in (0.0, float("nan")):
        storage = KVStorage(KVShape(1, 4, 2, 4, torch.float32), 32, device)
        storage.data.fill_(leavings)
        for table, context in zip(step.block_tables.tolist(), step.context_lengths, strict=True):
            for position in range(context):
                storage.data[table[position // 4], :, :, position % 4] = 1.0
        backend = make_backend(fast, storage)
        backend.plan(step)
        outputs.append(backend.run(q, k, v, layer))
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("fast", ["reference", *FAST])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("kind", ["plain", "capped", "int8"])
def test_a_block_behind_the_window_may_be_gone(fast, block_size, kind) -> None:
    """Its place in the table says block 0, whose numbers may be anything: the output has the same bits."""
    device, window = device_of(fast), 7
    rows = ((1, 40), (1, 22), (1, 6), (5, 30), (20, 17), (1, 99))
    step = make_step(rows, block_size, 400, seed=2, device=device)
    step = replace(step, block_tables=step.block_tables + 1, slot_mapping=step.slot_mapping + block_size)
    gone = step.block_tables.clone()
    for table, (_, before) in zip(gone, rows, strict=True):
        table[: max(0, before - window + 1) // block_size] = 0
    assert (gone == 0).sum() > 4
    layer = LayerCall(index=0, scaling=0.4, sliding_window=window, softcap=5.0 if kind == "capped" else None)
    shape = KVShape(1, block_size, 2, 16, torch.float32, "int8" if kind == "int8" else None)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(29, 2, 16, generator=generator).to(device) for _ in range(3))
    past = torch.randn(401 * block_size, 2, 16, generator=generator).to(device)
    outputs = []
    for tables in (step.block_tables, gone):
        storage = KVStorage(shape, 401, device)
        storage.write(0, past, past.flip(0), torch.arange(len(past), device=device))
        if tables is gone:
            storage.pages.view(401, -1)[0] = 0xFF  # NaN as a number, and as a scale
        backend = make_backend(fast, storage)
        backend.plan(replace(step, block_tables=tables))
        outputs.append(backend.run(q, k, v, layer))
    assert torch.isfinite(outputs[0]).all()
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_row_has_the_same_bits_in_any_cut(dtype) -> None:
    """Alone, or with the rows before it: the compiled kernel adds in one order."""
    outputs = []
    for cut in ((40,), (1,) * 40, (17, 3, 20)):
        storage = KVStorage(KVShape(1, 4, 2, 24, dtype), 160)
        backend = make_backend("native", storage)
        q, k, v = (torch.randn(40, h, 24, generator=torch.Generator().manual_seed(h)).to(dtype) for h in (6, 2, 2))
        start, parts = 0, []
        for rows in cut:
            backend.plan(make_step(((rows, start),), 4, 160, seed=3))
            part = slice(start, start + rows)
            parts.append(backend.run(q[part], k[part], v[part], LayerCall(index=0, scaling=0.2, sliding_window=29)))
            start += rows
        outputs.append(torch.cat(parts))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_copied_block_has_all_layers_of_its_source() -> None:
    storage = KVStorage(KVShape(3, 4, 2, 5, torch.float32), 6)
    storage.data.normal_()
    before = storage.data.clone()
    storage.copy_blocks([1, 4], [4, 2])
    assert torch.equal(storage.data[4], before[1])
    assert torch.equal(storage.data[2], before[4])  # sources are read before targets are written
    untouched = [0, 1, 3, 5]
    assert torch.equal(storage.data[untouched], before[untouched])


def test_a_block_costs_what_the_storage_allocates() -> None:
    shape = KVShape(3, 4, 2, 5, torch.bfloat16)
    storage = KVStorage(shape, 7)
    assert storage.num_bytes == storage.data.numel() * storage.data.element_size() == 7 * shape.block_bytes


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_batch_cut_into_parts_has_no_seam(monkeypatch, dtype) -> None:
    monkeypatch.setattr("engine.kv.torch_attention._PART_BYTES", {"cpu": 1})
    expected, actual = run_both("torch", (*DECODES, *DECODES), dtype=dtype)
    assert (expected - actual).abs().max() <= TOLERANCE[dtype]
