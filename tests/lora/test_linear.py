"""LoRA layers against the float64 formula: any shapes, ranks and mixtures, and rows of the base left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.linear import LoraEmbedding, LoraLinear
from engine.lora.reference_lora import lora_embedding, lora_linear
from engine.lora.storage import BorrowedStorage, SiteWeights
from tests.support.lora_images import cut, linear_sites, pack, random_weights, spec_of

# Largest deviation, relative to the largest element of the reference: the low-rank product and the sum are each
# rounded once to the dtype (eps 1.2e-7, 9.8e-4, 7.8e-3).
TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def bind(
    batch: LoraBatch, sites: tuple[LinearSite, ...], dtype: torch.dtype, ranks: dict[int, int]
) -> dict[int, dict[int, SiteWeights]]:
    """Bind one random adapter per slot; returns {site: {slot: weights}} for the reference."""
    storage = BorrowedStorage()
    table: dict[int, dict[int, SiteWeights]] = {site.index: {} for site in sites}
    for slot, rank in ranks.items():
        image = pack(f"adapter-{slot}", spec_of(sites, NAMES[dtype]), random_weights(sites, rank, seed=slot))
        weights = storage.load(image)
        batch.bind(slot, weights)
        for w in weights:
            table[w.site][slot] = w
    return table


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    deviation = (found.double() - expected).abs().max() / expected.abs().max()
    assert deviation <= TOLERANCE[dtype], f"deviation {deviation:.2e}"


@pytest.fixture(autouse=True)
def _as_in_a_step() -> object:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


MIXTURES = {
    "one adapter for all rows": cut((7, 1)),
    "one row": cut((1, 2)),
    "one row of each adapter": cut((1, 1), (1, 2), (1, 3), (1, 4)),
    "base rows at both ends": cut((3, 0), (4, 2), (2, 0)),
    "everything at once": cut((1, 4), (2, 0), (5, 3), (1, 1), (1, 0), (64, 2), (1, 3), (1, 0)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("widths", [(1, 1), (5, 3), (37, 53), (64, 192)], ids=str)
def test_mixed_ranks_equal_the_formula(dtype: torch.dtype, mixture: str, widths: tuple[int, int]) -> None:
    segments, sites, batch = MIXTURES[mixture], linear_sites(widths), LoraBatch()
    slots = bind(batch, sites, dtype, ranks={1: 1, 2: 3, 3: 8, 4: 64})[0]
    base = nn.Linear(*widths).to(dtype)
    x = torch.randn(segments[-1].row_end + 1, widths[0]).to(dtype)
    batch.set(segments)
    assert_near(LoraLinear(base, sites[0], batch)(x), lora_linear(base(x), x, segments, slots), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_rows_of_no_segment_are_the_bases_bit_for_bit(dtype: torch.dtype) -> None:
    sites, batch = linear_sites((37, 53)), LoraBatch()
    bind(batch, sites, dtype, ranks={1: 8, 2: 3})
    base = nn.Linear(37, 53).to(dtype)
    layer = LoraLinear(base, sites[0], batch)
    x = torch.randn(20, 37).to(dtype)
    batch.set(cut((4, 0), (3, 1), (6, 0), (2, 2)))
    y, plain = layer(x), base(x)
    untouched = [0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 15, 16, 17, 18, 19]
    assert torch.equal(y[untouched], plain[untouched])
    assert not torch.equal(y[4:7], plain[4:7])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_a_request_gets_the_same_alone_and_in_any_mixture(dtype: torch.dtype) -> None:
    sites, batch = linear_sites((64, 96)), LoraBatch()
    bind(batch, sites, dtype, ranks={1: 8, 2: 64, 3: 1})
    layer = LoraLinear(nn.Linear(64, 96).to(dtype), sites[0], batch)
    x = torch.randn(6, 64).to(dtype)
    batch.set(cut((6, 1)))
    alone = layer(x)
    for before, after in (((3, 0), (1, 2)), ((5, 2), (4, 0)), ((1, 3), (7, 1))):
        batch.set(cut(before, (6, 1), after))
        others = torch.randn(before[0] + 6 + after[0], 64).to(dtype)
        others[before[0] : before[0] + 6] = x
        assert_near(layer(others)[before[0] : before[0] + 6], alone.double(), dtype)
    batch.set(cut(*((1, 1),) * 6))  # the same rows one by one
    assert_near(layer(x), alone.double(), dtype)


def test_transformers_rows_in_front_are_one_batch_of_t_rows() -> None:
    sites, batch = linear_sites((5, 3)), LoraBatch()
    bind(batch, sites, torch.float32, ranks={1: 2})
    layer = LoraLinear(nn.Linear(5, 3), sites[0], batch)
    x = torch.randn(9, 5)
    batch.set(cut((2, 0), (4, 1)))
    assert torch.equal(layer(x[None])[0], layer(x))


def test_conv1d_is_a_base_like_any_other() -> None:
    sites, batch = linear_sites((6, 4)), LoraBatch()
    slots = bind(batch, sites, torch.float32, ranks={1: 3})[0]
    base = Conv1D(4, 6)
    layer = LoraLinear(base, sites[0], batch)
    x, segments = torch.randn(1, 5, 6), cut((1, 0), (3, 1))
    batch.set(segments)
    assert_near(layer(x)[0], lora_linear(base(x)[0], x[0], segments, slots), torch.float32)
    assert layer.nf == 4


def test_without_segments_the_bases_output_is_handed_on() -> None:
    sites, batch = linear_sites((5, 3)), LoraBatch()
    bind(batch, sites, torch.float32, ranks={1: 2})
    base, x = nn.Linear(5, 3), torch.randn(4, 5)
    batch.set(())
    assert not batch.rows.active
    assert torch.equal(LoraLinear(base, sites[0], batch)(x), base(x))


def test_adapter_that_leaves_a_site_out_changes_nothing_there() -> None:
    sites, batch = linear_sites((5, 3), (5, 3)), LoraBatch()
    batch.bind(1, BorrowedStorage().load(pack("k", spec_of(sites), random_weights(sites, 2, seed=1, only=(1,)))))
    base, x = nn.Linear(5, 3), torch.randn(4, 5)
    batch.set(cut((4, 1)))
    assert torch.equal(LoraLinear(base, sites[0], batch)(x), base(x))
    assert not torch.equal(LoraLinear(base, sites[1], batch)(x), base(x))


def test_slot_that_changes_hands_serves_the_new_adapter() -> None:
    sites, batch = linear_sites((5, 3)), LoraBatch()
    base, x, storage = nn.Linear(5, 3), torch.randn(4, 5), BorrowedStorage()
    layer = LoraLinear(base, sites[0], batch)
    for seed in (1, 2):
        weights = storage.load(pack(f"adapter-{seed}", spec_of(sites), random_weights(sites, 2, seed)))
        batch.bind(7, weights)
        batch.set(cut((4, 7)))
        assert_near(layer(x), lora_linear(base(x), x, cut((4, 7)), {7: weights[0]}), torch.float32)
        batch.unbind(7)


def test_lm_head_goes_by_the_sampled_rows() -> None:
    layer_site = LinearSite(index=0, name="layers.0.up", in_features=5, out_features=5, layer=0)
    head_site = LinearSite(index=1, name="lm_head", in_features=5, out_features=9)
    batch = LoraBatch()
    table = bind(batch, (layer_site, head_site), torch.float32, ranks={1: 2, 2: 3})
    layer, head = LoraLinear(nn.Linear(5, 5), layer_site, batch), LoraLinear(nn.Linear(5, 9), head_site, batch)
    x, sampled = torch.randn(6, 5), cut((1, 2), (1, 0), (1, 1))
    batch.set(cut((3, 2), (3, 1)), sampled)
    assert_near(layer(x), lora_linear(layer.base(x), x, cut((3, 2), (3, 1)), table[0]), torch.float32)
    rows = x[[2, 3, 5]]
    assert_near(head(rows), lora_linear(head.base(rows), rows, sampled, table[1]), torch.float32)


def test_more_rows_than_the_layer_has_is_an_error() -> None:
    sites, batch = linear_sites((5, 3)), LoraBatch()
    bind(batch, sites, torch.float32, ranks={1: 2})
    batch.set(cut((4, 1)))
    with pytest.raises(ValueError, match="segments reach row 4, the layer was given 3 rows"):
        LoraLinear(nn.Linear(5, 3), sites[0], batch)(torch.randn(3, 5))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((LoraSegment(0, 2, 9),), "not bound"),
        ((LoraSegment(2, 3, 1), LoraSegment(0, 1, 1)), "begins before row 3"),
        ((LoraSegment(0, 3, 1), LoraSegment(2, 4, 1)), "begins before row 3"),
        ((LoraSegment(2, 2, 1),), "empty"),
    ],
)
def test_segments_that_make_no_sense_are_refused(segments: tuple[LoraSegment, ...], message: str) -> None:
    batch = LoraBatch()
    bind(batch, linear_sites((5, 3)), torch.float32, ranks={1: 2})
    with pytest.raises(ValueError, match=message):
        batch.set(segments)


def test_slots_are_bound_once_and_never_slot_zero() -> None:
    batch = LoraBatch()
    bind(batch, linear_sites((5, 3)), torch.float32, ranks={1: 2})
    for slot in (0, 1):
        with pytest.raises(ValueError, match=f"slot {slot} cannot be bound"):
            batch.bind(slot, ())
    with pytest.raises(KeyError):
        batch.unbind(2)


def test_what_the_layer_has_not_itself_is_the_bases() -> None:
    site = linear_sites((5, 3))[0]
    base = nn.Linear(5, 3)
    layer = LoraLinear(base, site, LoraBatch())
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert (layer.in_features, layer.out_features) == (5, 3)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


class ScaledEmbedding(nn.Embedding):
    """Like Gemma's: the output is multiplied by a scalar."""

    def __init__(self, num_embeddings: int, width: int, scale: float | Tensor) -> None:
        super().__init__(num_embeddings, width)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("scale", [None, 8.0, torch.tensor(8.0)], ids=["plain", "number", "tensor"])
def test_embedding_equals_the_formula(dtype: torch.dtype, scale: float | Tensor | None) -> None:
    site = LinearSite(index=0, name="embed_tokens", in_features=11, out_features=6, kind="embedding")
    batch = LoraBatch()
    slots = bind(batch, (site,), dtype, ranks={1: 1, 2: 5})[0]
    base = (nn.Embedding(11, 6) if scale is None else ScaledEmbedding(11, 6, scale)).to(dtype)
    ids, segments = torch.tensor([[0, 10, 3, 3, 7, 1, 2]]), cut((1, 0), (3, 2), (1, 1))
    batch.set(segments, cut((1, 1)))
    expected = lora_embedding(base(ids)[0], ids[0], segments, slots, 1.0 if scale is None else 8.0)
    found = LoraEmbedding(base, site, batch)(ids)
    assert_near(found[0], expected, dtype)
    assert torch.equal(found[0, [0, 5, 6]], base(ids)[0, [0, 5, 6]])


def test_base_of_another_dtype_gets_the_adapters_part_added() -> None:
    sites, batch = linear_sites((16, 8)), LoraBatch()
    slots = bind(batch, sites, torch.bfloat16, ranks={1: 4})[0]
    base, x = nn.Linear(16, 8), torch.randn(5, 16)
    batch.set(cut((5, 1)))
    found = LoraLinear(base, sites[0], batch)(x)
    assert found.dtype == torch.float32
    expected = lora_linear(base(x), x, cut((5, 1)), slots)
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE[torch.bfloat16]


def test_weights_are_never_written() -> None:
    sites, batch = linear_sites((16, 8)), LoraBatch()
    image = pack("k", spec_of(sites), random_weights(sites, 4, seed=1))
    before = np.array(image.data)
    batch.bind(1, BorrowedStorage().load(image))
    batch.set(cut((5, 1)))
    LoraLinear(nn.Linear(16, 8), sites[0], batch)(torch.randn(5, 16))
    assert np.array_equal(before, image.data)
