"""The LoRA kernels against float64: ranks, shapes and cuts that do not fit their tiles."""

from __future__ import annotations

import pytest
import torch

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.reference_lora import lora_linear
from engine.lora.storage import SiteWeights
from engine.lora.triton_lora import TritonLora
from tests.support.triton_device import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NUM_SITES = 4


def weights_of(site: int, in_features: int, out_features: int, rank: int, dtype: torch.dtype) -> SiteWeights:
    draw = torch.Generator().manual_seed(1000 * site + rank)
    a = torch.randn(rank, in_features, generator=draw).div(in_features**0.5).to(DEVICE, dtype)
    b = torch.randn(rank, out_features, generator=draw).div(rank**0.5).to(DEVICE, dtype)
    return SiteWeights(site, a, b, 0.5 + site)


def codes_of(w: SiteWeights, small: float = 1.0) -> tuple[SiteWeights, SiteWeights]:
    """Codes near `small` times these weights, and the same numbers in float64."""
    tensors, steps = [], []
    for matrix in (w.a.double(), small * w.b.double()):
        steps.append((matrix.abs().amax(dim=1) / 127).float())
        tensors.append((matrix / steps[-1].double()[:, None]).round().to(torch.int8))
    exact = [codes.double() * step.double()[:, None] for codes, step in zip(tensors, steps, strict=True)]
    return w._replace(a=tensors[0], b=tensors[1], scales=torch.stack(steps)), w._replace(a=exact[0], b=exact[1])


def lora_with(slots: dict[int, list[SiteWeights]], dtype: torch.dtype, *, are_codes: bool = False) -> TritonLora:
    lora = TritonLora(NUM_SITES, 8, dtype, DEVICE, are_codes=are_codes)
    for slot, weights in slots.items():
        lora.bind(slot, weights)
    return lora


def deviation(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


SEGMENTS = {
    "single rows": tuple(LoraSegment(i, i + 1, 1 + i % 3) for i in (0, 1, 2, 4)),
    "one adapter": (LoraSegment(0, 40, 2),),
    "mixed": (LoraSegment(1, 2, 1), LoraSegment(2, 9, 3), LoraSegment(9, 10, 2), LoraSegment(20, 40, 1)),
}


@pytest.mark.parametrize("are_codes", [False, True], ids=["floats", "codes"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
def test_layers_of_one_input_get_each_its_own(
    segments: tuple[LoraSegment, ...], dtype: torch.dtype, are_codes: bool
) -> None:
    """Three layers side by side; ranks 3, 16 and 40; slot 2 has nothing for the second layer."""
    in_features, widths = 48, [40, 24, 130]
    slots = {
        slot: [weights_of(site, in_features, width, rank, dtype) for site, width in enumerate(widths, 1)]
        for slot, rank in ((1, 3), (2, 16), (3, 40))
    }
    del slots[2][1]
    bound = slots
    if are_codes:
        pairs = {slot: [codes_of(w) for w in all_of] for slot, all_of in slots.items()}
        bound = {slot: [codes for codes, _ in all_of] for slot, all_of in pairs.items()}
        slots = {slot: [exact for _, exact in all_of] for slot, all_of in pairs.items()}
    lora = lora_with(bound, dtype, are_codes=are_codes)
    x = torch.randn(41, in_features, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    y = torch.randn(41, sum(widths), generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    parts = [
        lora_linear(part, x, segments, {slot: w for slot, all_of in slots.items() for w in all_of if w.site == site})
        for site, part in enumerate(y.clone().split(widths, dim=1), 1)
    ]
    lora.set(segments, ())
    lora.add(y, x, lora.group([1, 2, 3], widths, in_features))
    assert deviation(y, torch.cat(parts, dim=1)) < TOLERANCE[dtype]


def test_inputs_wider_than_one_program_reads_are_summed_whole() -> None:
    w = weights_of(0, 4500, 17, 5, torch.float32)
    lora, segments = lora_with({1: [w]}, torch.float32), (LoraSegment(0, 1, 1), LoraSegment(1, 4, 1))
    x = torch.randn(4, 4500, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = torch.zeros(4, 17, device=DEVICE)
    expected = lora_linear(y, x, segments, {1: w})
    lora.set(segments, ())
    lora.add(y, x, lora.group([0], [17], 4500))
    assert deviation(y, expected) < 1e-5


@pytest.mark.parametrize("num_rows", [1, 5])
def test_codes_whose_steps_float16_cannot_hold_are_multiplied_all_the_same(num_rows: int) -> None:
    """A step of b of 1e-7 times a small x: as float16 it would have two digits of its ten left."""
    codes, exact = codes_of(weights_of(0, 64, 32, 8, torch.float32), small=3e-6)
    assert codes.scales is not None
    assert codes.scales[1].max() < 1.2e-7
    lora, segments = lora_with({1: [codes]}, torch.float16, are_codes=True), (LoraSegment(0, num_rows, 1),)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, 64, generator=draw).mul(40).to(DEVICE, torch.float16)
    y = torch.zeros(num_rows, 32, dtype=torch.float16, device=DEVICE)
    expected = lora_linear(y, x, segments, {1: exact})
    lora.set(segments, ())
    lora.add(y, x, lora.group([0], [32], 64))
    assert deviation(y, expected) < TOLERANCE[torch.float16]


def test_an_unbound_slot_adds_nothing_and_a_new_adapter_takes_it_over() -> None:
    first, second = (weights_of(0, 32, 32, rank, torch.float32) for rank in (4, 100))
    lora, segments = lora_with({3: [first]}, torch.float32), (LoraSegment(0, 2, 3),)
    x, y = torch.ones(2, 32, device=DEVICE), torch.zeros(2, 32, device=DEVICE)
    group = lora.group([0], [32], 32)
    lora.set(segments, ())
    lora.unbind(3, (0,))
    lora.add(y, x, group)
    assert not y.any()
    lora.bind(3, [second])
    assert lora.max_rank == 100
    lora.add(y, x, group)
    assert deviation(y, lora_linear(torch.zeros(2, 32, device=DEVICE), x, segments, {3: second})) < 1e-5


def test_a_site_alone_takes_the_dtype_it_knows_and_leaves_others_alone() -> None:
    site = LinearSite(index=2, name="model.layers.0.mlp.down_proj", in_features=32, out_features=16, layer=0)
    w = weights_of(2, 32, 16, 8, torch.float16)
    lora, segments = lora_with({1: [w]}, torch.float16), (LoraSegment(0, 3, 1),)
    lora.set(segments, segments)
    addition = lora.addition(site, sampled=False)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    y = torch.zeros(1, 3, 16, dtype=torch.float16, device=DEVICE)
    assert not addition.add(y.float(), x.float())
    assert addition.add(y, x)
    assert deviation(y[0], lora_linear(torch.zeros(3, 16, device=DEVICE), x[0], segments, {1: w})) < 4e-3
    logits = torch.full((1, 3, 16), 1000.0, device=DEVICE)  # whose steps in float16 are of a half
    assert addition.add(logits, x)
    assert deviation(logits[0] - 1000, lora_linear(torch.zeros(3, 16, device=DEVICE), x[0], segments, {1: w})) < 4e-3
    lora.set_fixed(None)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        addition.add(y.float(), x.float())


def test_segments_beyond_the_rows_are_refused() -> None:
    lora = lora_with({1: [weights_of(0, 32, 32, 4, torch.float32)]}, torch.float32)
    lora.set((LoraSegment(0, 5, 1),), ())
    with pytest.raises(ValueError, match="segments reach row 5, the layer was given 4 rows"):
        lora.add(torch.zeros(4, 32, device=DEVICE), torch.zeros(4, 32, device=DEVICE), lora.group([0], [32], 32))
