"""Packed linear layers and their LoRA against float64: any width, any number of rows, any mixture of adapters."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.native_lora import NativeLora
from engine.lora.reference_lora import lora_linear
from engine.lora.storage import BorrowedStorage, SiteWeights
from engine.model.packed import PackedGroup, PackedLinear, pack_linears
from tests.support.lora_images import cut, linear_sites, pack, random_weights, spec_of
from tests.support.native import deviation, native_or_skip

# One rounding of the result (bfloat16: and one more when LoRA is added); the sums are float32.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
WIDTHS = [(1, 1), (5, 3), (37, 53), (64, 192), (576, 96), (96, 260)]
ROWS = [1, 2, 4, 11, 12, 13, 24, 25, 100, 301]


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def make_group(linears: list[nn.Linear], lora: NativeLora | None = None) -> list[PackedLinear]:
    sites = linear_sites(*((linear.in_features, linear.out_features) for linear in linears))
    group = PackedGroup(native_or_skip(), linears, lora, sites, linears[0].weight.dtype)
    return [PackedLinear(linear, group, i, sampled=False) for i, linear in enumerate(linears)]


def exactly(linear: nn.Linear, x: Tensor) -> Tensor:
    y = x.double() @ linear.weight.double().T
    return y if linear.bias is None else y + linear.bias.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_any_number_of_rows_equals_the_product(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    linear = nn.Linear(*widths, bias=widths[0] % 2 == 1).to(dtype)
    (layer,) = make_group([linear])
    for rows in ROWS:
        x = torch.randn(rows, widths[0]).to(dtype)
        assert layer(x).dtype == dtype
        assert deviation(layer(x), exactly(linear, x)) <= TOLERANCE[dtype], f"{rows} rows"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_layers_of_one_input_are_computed_together_and_right(dtype: torch.dtype, num_threads: int) -> None:
    linears = [nn.Linear(64, width, bias=False).to(dtype) for width in (96, 33, 32)]
    layers = make_group(linears)
    native_or_skip(num_threads)
    for x in (torch.randn(1, 7, 64).to(dtype), torch.randn(1, 70, 64).to(dtype)):
        for linear, layer in zip(linears, layers, strict=True):
            y = layer(x)
            assert y.shape == (1, x.shape[1], linear.out_features)
            assert deviation(y, exactly(linear, x)) <= TOLERANCE[dtype]


def test_a_layer_called_out_of_turn_or_twice_still_answers_for_its_own_input() -> None:
    linears = [nn.Linear(8, 4), nn.Linear(8, 4)]
    first, second = make_group(linears)
    a, b = torch.randn(3, 8), torch.randn(3, 8)
    assert deviation(first(a), exactly(linears[0], a)) <= 1e-5
    assert deviation(first(b), exactly(linears[0], b)) <= 1e-5  # the second was never asked about a
    assert deviation(second(b), exactly(linears[1], b)) <= 1e-5
    assert deviation(second(b), exactly(linears[1], b)) <= 1e-5
    assert deviation(second(a), exactly(linears[1], a)) <= 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    (layer,) = make_group([nn.Linear(577, 100).to(dtype)])
    x = torch.randn(301, 577).to(dtype)
    everything = layer(x)
    for start, end in ((0, 1), (3, 16), (100, 101), (200, 230)):
        assert torch.equal(layer(x[start:end].clone()), everything[start:end])


def test_nan_and_infinity_stay_in_their_row() -> None:
    linear = nn.Linear(40, 40, bias=False).bfloat16()
    (layer,) = make_group([linear])
    x = torch.randn(3, 40).bfloat16()
    good = layer(x.clone())
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[0], good[0])
    assert y[1].isnan().all()
    assert y[2].isinf().all()


# ---- LoRA

MIXTURES = {
    "one row": ((1, 2),),
    "one row of each": ((1, 1), (1, 2), (1, 3), (1, 4)),
    "base rows at both ends": ((3, 0), (4, 2), (2, 0)),
    "more rows than a chunk": ((1, 0), (40, 3), (17, 1), (2, 0), (16, 4)),
}


def bind(
    batch: LoraBatch, sites: tuple[LinearSite, ...], dtype: torch.dtype, ranks: dict[int, int]
) -> dict[int, dict[int, SiteWeights]]:
    storage = BorrowedStorage()
    table: dict[int, dict[int, SiteWeights]] = {site.index: {} for site in sites}
    for slot, rank in ranks.items():
        weights = storage.load(
            pack(f"adapter-{slot}", spec_of(sites, NAMES[dtype]), random_weights(sites, rank, seed=slot))
        )
        batch.bind(slot, weights)
        for w in weights:
            table[w.site][slot] = w
    return table


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("widths", [(1, 1), (37, 53), (64, 192), (130, 140)], ids=str)
def test_mixed_ranks_equal_the_formula(dtype: torch.dtype, mixture: str, widths: tuple[int, int]) -> None:
    lora = NativeLora(native_or_skip(), num_slots=4)
    batch, segments = LoraBatch(lora), cut(*MIXTURES[mixture])
    linears = [nn.Linear(*widths, bias=False).to(dtype), nn.Linear(widths[0], 40).to(dtype)]
    layers = make_group(linears, lora)
    slots = bind(batch, linear_sites(widths, (widths[0], 40)), dtype, ranks={1: 1, 2: 3, 3: 8, 4: 65})
    batch.set(segments)
    x = torch.randn(segments[-1].row_end + 2, widths[0]).to(dtype)
    for site, (linear, layer) in enumerate(zip(linears, layers, strict=True)):
        expected = lora_linear(exactly(linear, x), x.double(), segments, slots[site])
        assert deviation(layer(x), expected) <= 2 * TOLERANCE[dtype]


def test_an_unbound_slot_adds_nothing() -> None:
    lora = NativeLora(native_or_skip(), num_slots=2)
    batch = LoraBatch(lora)
    (layer,) = make_group([nn.Linear(8, 8)], lora)
    x = torch.randn(4, 8)
    plain = layer(x)
    bind(batch, linear_sites((8, 8)), torch.float32, ranks={1: 2})
    batch.set((LoraSegment(0, 4, 1),))
    assert not torch.equal(layer(x), plain)
    batch.set(())
    batch.unbind(1)
    batch.bind(2, ())
    batch.set((LoraSegment(0, 4, 2),))
    assert torch.equal(layer(x), plain)


def test_segments_beyond_the_rows_are_an_error() -> None:
    lora = NativeLora(native_or_skip(), num_slots=1)
    batch = LoraBatch(lora)
    (layer,) = make_group([nn.Linear(8, 8)], lora)
    bind(batch, linear_sites((8, 8)), torch.float32, ranks={1: 2})
    batch.set((LoraSegment(0, 5, 1),))
    with pytest.raises(ValueError, match="segments reach row 5, the layer was given 4 rows"):
        layer(torch.randn(4, 8))


def test_other_layers_than_nn_linear_are_left_alone() -> None:
    model = nn.ModuleDict({"narrow": nn.Linear(4, 4).half(), "plain": nn.Linear(4, 4)})
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    sites = [
        LinearSite(index=i, name=name, in_features=4, out_features=4, layer=0)
        for i, name in enumerate(("narrow", "plain"))
    ]
    assert pack_linears(model, sites, native_or_skip(), None, torch.float32) == {1}
    assert type(model["narrow"]) is nn.Linear
    assert type(model["plain"]) is PackedLinear
