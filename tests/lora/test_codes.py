"""Adapters in eight bits through every layer and CPU kernel, against float64 of what their images say."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.copier import Copier, HostPages, Pacer
from engine.lora.image import AdapterImage
from engine.lora.linear import LoraEmbedding, LoraLinear
from engine.lora.native_lora import NativeLora
from engine.lora.pages import lay_out
from engine.lora.reference_lora import lora_embedding, lora_linear
from engine.lora.storage import AdapterStorage, BorrowedStorage, PagedStorage, SiteWeights
from engine.model.packed import PackedGroup, PackedLinear
from tests.support.lora_images import cut, in_numbers, linear_sites, pack, random_weights, spec_of
from tests.support.native import deviation, native_or_skip
from tests.support.waiting import patience

# Largest deviation, relative to the largest element expected. Codes are exact and sums float32, whatever the
# activations are: what is left is one rounding of the result to them, and in float32 that of the sums.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
RANKS = {1: 1, 2: 3, 3: 8, 4: 65}
MIXTURES = {
    "one row": ((1, 2),),
    "one row of each": ((1, 1), (1, 2), (1, 3), (1, 4)),
    "base rows at both ends": ((3, 0), (4, 2), (2, 0)),
    "more rows than a chunk": ((1, 0), (40, 3), (17, 1), (2, 0), (16, 4)),
}
WIDTHS = [(1, 1), (37, 53), (64, 192), (130, 140)]
Table = dict[int, dict[int, SiteWeights]]  # site -> slot -> weights in float64


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def image_of(sites: tuple[LinearSite, ...], rank: int, seed: int) -> AdapterImage:
    return pack(f"adapter-{seed}", spec_of(sites, "int8"), random_weights(sites, rank, seed))


def bind(batch: LoraBatch, sites: tuple[LinearSite, ...], storage: AdapterStorage | None = None) -> Table:
    """One random adapter in each slot of RANKS. Returns: what its image says."""
    table: Table = {site.index: {} for site in sites}
    first_page = 1
    for slot, rank in RANKS.items():
        image = image_of(sites, rank, slot)
        num_pages = sum(lay_out(image.manifest, storage._page_bytes).runs) if isinstance(storage, PagedStorage) else 0
        batch.bind(slot, (storage or BorrowedStorage()).load(image, tuple(range(first_page, first_page + num_pages))))
        first_page += num_pages
        for site, weights in in_numbers(image, spec_of(sites, "int8")).items():
            table[site][slot] = weights
    return table


def packed_layers(linears: list[nn.Linear], lora: NativeLora) -> list[PackedLinear]:
    sites = linear_sites(*((linear.in_features, linear.out_features) for linear in linears))
    group = PackedGroup(native_or_skip(), linears, lora, sites, linears[0].weight.dtype)
    return [PackedLinear(linear, group, i, sampled=False) for i, linear in enumerate(linears)]


def of_base(linear: nn.Linear, x: Tensor) -> Tensor:
    return x.double() @ linear.weight.double().T


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_layers_in_torch_equal_the_formula(dtype: torch.dtype, mixture: str, widths: tuple[int, int]) -> None:
    sites, batch, segments = linear_sites(widths), LoraBatch(), cut(*MIXTURES[mixture])
    slots = bind(batch, sites)[0]
    base, x = nn.Linear(*widths).to(dtype), torch.randn(segments[-1].row_end + 2, widths[0]).to(dtype)
    batch.set(segments)
    y = LoraLinear(base, sites[0], batch)(x)
    assert y.dtype == dtype
    assert deviation(y, lora_linear(base(x), x, segments, slots)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_the_compiled_layers_equal_the_formula(dtype: torch.dtype, mixture: str, widths: tuple[int, int]) -> None:
    lora = NativeLora(native_or_skip(), num_slots=4)
    batch, segments = LoraBatch(lora), cut(*MIXTURES[mixture])
    linears = [nn.Linear(*widths, bias=False).to(dtype), nn.Linear(widths[0], 40, bias=False).to(dtype)]
    layers = packed_layers(linears, lora)
    table = bind(batch, linear_sites(widths, (widths[0], 40)))
    batch.set(segments)
    x = torch.randn(segments[-1].row_end + 2, widths[0]).to(dtype)
    for site, (linear, layer) in enumerate(zip(linears, layers, strict=True)):
        expected = lora_linear(of_base(linear, x), x.double(), segments, table[site])
        assert deviation(layer(x), expected) <= 2 * TOLERANCE[dtype]  # the base's output is rounded too


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    lora = NativeLora(native_or_skip(), num_slots=4)
    batch = LoraBatch(lora)
    (layer,) = packed_layers([nn.Linear(577, 100).bfloat16()], lora)
    bind(batch, linear_sites((577, 100)))
    x = torch.randn(60, 577).bfloat16()
    batch.set((LoraSegment(0, 60, 4),))
    everything = layer(x)
    for start, end in ((0, 1), (3, 16), (20, 53)):
        batch.set((LoraSegment(0, end - start, 4),))
        assert torch.equal(layer(x[start:end].clone()), everything[start:end])


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_that_was_not_swapped_has_the_kernel_add_to_it(base_dtype: torch.dtype) -> None:
    """In bfloat16, where the kernel does not add to outputs as they are, torch does."""
    sites, lora = linear_sites((37, 53)), NativeLora(native_or_skip(), num_slots=4)
    batch, segments = LoraBatch(lora), cut((2, 3), (1, 0), (5, 4))
    slots = bind(batch, sites)[0]
    base, x = nn.Linear(37, 53).to(base_dtype), torch.randn(9, 37).to(base_dtype)
    batch.set(segments)
    found = LoraLinear(base, sites[0], batch)(x)
    assert deviation(found, lora_linear(base(x), x, segments, slots)) <= TOLERANCE[base_dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_embeddings_equal_the_formula(dtype: torch.dtype, scale: float | None) -> None:
    site = LinearSite(index=0, name="embed_tokens", in_features=11, out_features=6, kind="embedding")
    batch, base = LoraBatch(), nn.Embedding(11, 6).to(dtype)
    slots = bind(batch, (site,))[0]
    if scale is not None:
        base.embed_scale = scale  # the adapter's part is scaled by it; this base's own is not
    ids, segments = torch.tensor([[0, 10, 3, 3, 7, 1, 2]]), cut((1, 0), (3, 2), (1, 4))
    batch.set(segments)
    found = LoraEmbedding(base, site, batch)(ids)
    assert deviation(found[0], lora_embedding(base(ids)[0], ids[0], segments, slots, scale or 1.0)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("page_bytes", [64, 448, 1 << 16])
def test_codes_and_scales_in_pages_are_those_of_the_image(page_bytes: int) -> None:
    """Pages smaller than a tensor, of a few tensors, and of a whole adapter."""
    sites = linear_sites((37, 53), (64, 40))
    buffer = torch.full(((1 << 20) // page_bytes * page_bytes,), 7, dtype=torch.uint8)
    storage = PagedStorage(buffer, page_bytes, Copier(HostPages(buffer, 96), Pacer(None)))
    batch, segments = LoraBatch(), cut(*MIXTURES["one row of each"])
    table = bind(batch, sites, storage)
    num_copied = 0
    for _ in patience("every adapter to be copied"):
        num_copied += len(storage.copied())
        if num_copied >= len(RANKS):
            break
    storage.close()
    batch.set(segments)
    for site, (width, _) in zip(sites, ((37, 53), (64, 40)), strict=True):
        base, x = nn.Linear(site.in_features, site.out_features), torch.randn(4, width)
        found = LoraLinear(base, site, batch)(x)
        expected = lora_linear(base(x), x, segments, table[site.index])
        assert deviation(found, expected) <= TOLERANCE[torch.float32]


def test_a_slot_takes_adapters_of_any_elements_in_turn() -> None:
    sites, lora = linear_sites((16, 8)), NativeLora(native_or_skip(), num_slots=1)
    batch = LoraBatch(lora)
    linear, x = nn.Linear(16, 8, bias=False), torch.randn(3, 16)
    (layer,) = packed_layers([linear], lora)
    for dtype in ("int8", "float32", "bfloat16", "int8"):
        image = pack(f"in {dtype}", spec_of(sites, dtype), random_weights(sites, 4, seed=9))
        weights = BorrowedStorage().load(image)
        batch.bind(1, weights)
        batch.set(cut((3, 1)))
        slots = {1: in_numbers(image, spec_of(sites, dtype))[0] if dtype == "int8" else weights[0]}
        assert deviation(layer(x), lora_linear(of_base(linear, x), x, cut((3, 1)), slots)) <= TOLERANCE[torch.float32]
        batch.unbind(1)


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_the_part_of_a_random_adapter_is_within_two_percent_of_pefts(rank: int) -> None:
    """Normal weights: a step is a 127th of about three deviations, which leaves 0.8 % in a and as much in b."""
    site = LinearSite(index=0, name="proj", in_features=256, out_features=384, layer=0)
    theirs = get_peft_model(
        nn.Sequential(OrderedDict(proj=nn.Linear(256, 384))), LoraConfig(r=rank, target_modules=["proj"])
    )
    layer = theirs.base_model.model.proj
    for matrix in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        nn.init.normal_(matrix)
    a, b = (matrix["default"].weight.numpy() for matrix in (layer.lora_A, layer.lora_B))
    image = pack("k", spec_of((site,), "int8"), {0: (a, b.T.copy(), layer.scaling["default"])})
    batch, x = LoraBatch(), torch.randn(64, 256)
    batch.bind(1, BorrowedStorage().load(image))
    batch.set(cut((64, 1)))
    plain = layer.base_layer(x)
    found, expected = LoraLinear(layer.base_layer, site, batch)(x) - plain, theirs(x) - plain
    assert 0.005 < float((found - expected).norm() / expected.norm()) < 0.02
