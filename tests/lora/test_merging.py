"""Several adapters as one image: the sum of their products, whatever their ranks, scalings, sites and element type."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engine.errors import AdapterTooLarge
from engine.image_spec import ImageSpec, LinearSite
from engine.lora.image import ALIGNMENT_BYTES, AdapterImage
from engine.lora.merging import Weighted, merge_key, merged, merged_size
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of

# What one more rounding of b to the type may add, relative to the largest element of the sum.
TOLERANCE = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.2e-2, "int8": 1e-6}
SITES = (
    *linear_sites((16, 24), (24, 8), (8, 40)),
    LinearSite(index=3, name="embed", in_features=30, out_features=16, kind="embedding"),
)


def products(image: AdapterImage, spec: ImageSpec) -> dict[int, np.ndarray]:
    """By site, [in, out] in float64: what the image adds to a weight."""
    found, stored = {}, {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}[spec.dtype]
    for e in image.manifest.entries:
        a, b = (
            _read(image, offset, shape, stored) for offset, shape in ((e.a_offset, e.a_shape), (e.b_offset, e.b_shape))
        )
        if spec.sites[e.site].kind == "linear":
            a = a.T
        if e.scales_offset is not None:
            scales = _read(image, e.scales_offset, (2, e.rank), "<f4")
            a, b = a * scales[0], b * scales[1][:, None]
        found[e.site] = e.scaling * (a @ b)
    return found


def _read(image: AdapterImage, offset: int, shape: tuple[int, int], stored: str) -> np.ndarray:
    values = np.frombuffer(image.data.tobytes(), stored, shape[0] * shape[1], offset).reshape(shape)
    if stored == "<u2":
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def some(spec: ImageSpec, *adapters: tuple[int, float, tuple[int, ...] | None]) -> list[Weighted]:
    """Adapters of (rank, weight, sites), each with a scaling of its own."""
    return [
        (pack(f"a{seed}", spec, random_weights(spec.sites, rank, seed, only)), weight)
        for seed, (rank, weight, only) in enumerate(adapters)
    ]


def total(parts: list[Weighted], spec: ImageSpec) -> dict[int, np.ndarray]:
    sums: dict[int, np.ndarray] = {}
    for image, weight in parts:
        for site, product in products(image, spec).items():
            sums[site] = sums.get(site, 0.0) + weight * product
    return sums


MIXTURES = {
    "one": ((4, 1.0, None),),
    "one, half": ((4, 0.5, None),),
    "two of one rank": ((4, 0.5, None), (4, 0.5, None)),
    "ranks": ((1, 0.3, None), (7, 0.9, None), (16, -0.2, None)),
    "a negative largest": ((3, -2.0, None), (5, 1.0, None)),
    "other sites": ((3, 0.7, (0, 2)), (5, 0.4, (1, 3)), (2, 0.1, (2,))),
    "weights far apart": ((4, 1e-3, None), (4, 1e3, None)),
    "one without weight": ((4, 0.0, None), (6, 1.5, None)),
    "sixteen": tuple((1 + i % 5, 1 / (i + 1), None) for i in range(16)),
    "sums beyond one": ((2, 3.0, None), (2, 4.0, None), (2, -6.5, None)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_merge_is_the_weighted_sum_of_the_products(mixture: str, dtype: str) -> None:
    spec = spec_of(SITES, dtype)
    parts = some(spec, *MIXTURES[mixture])
    image = merged("merge", parts, spec)
    expected, found = total(parts, spec), products(image, spec)
    expected = {site: sum_ for site, sum_ in expected.items() if np.any(sum_)}
    assert found.keys() == expected.keys()
    for site, sum_ in expected.items():
        assert np.abs(found[site] - sum_).max() <= TOLERANCE[dtype] * np.abs(sum_).max()
    assert (image.manifest.rank, image.num_bytes) == merged_size(parts, spec)
    assert image.key == "merge"


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_parts_that_count_alike_are_copied_bit_for_bit(dtype: str) -> None:
    """Weighting each of A and B, or folding the scaling into B, would change them."""
    spec = spec_of(SITES[:1], dtype)
    weights = random_weights(spec.sites, 3, 1)
    parts = [(pack("a", spec, weights), 0.3), (pack("b", spec, random_weights(spec.sites, 5, 6)), 0.3)]
    (entry,) = merged("merge", parts, spec).manifest.entries
    data = merged("merge", parts, spec).data.tobytes()
    for (image, _), first in zip(parts, (0, 3), strict=True):
        (of,) = image.manifest.entries
        for at, of_at, width in ((entry.a_offset, of.a_offset, 16), (entry.b_offset, of.b_offset, 24)):
            row = width * {"float32": 4, "int8": 1}.get(dtype, 2)
            assert data[at + first * row :][: of.rank * row] == image.data.tobytes()[of_at:][: of.rank * row]


def test_ranks_add_up_and_nothing_is_padded() -> None:
    spec = spec_of(SITES[:2])
    image = merged("merge", some(spec, (1, 1.0, None), (2, 1.0, (0,)), (3, 0.0, None)), spec)
    assert [(e.site, e.rank) for e in image.manifest.entries] == [(0, 3), (1, 1)]
    room = sum(-(-4 * n // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for n in (3 * 16, 3 * 24, 24, 8))
    assert image.num_bytes == room


def test_weights_of_zero_leave_the_base() -> None:
    spec = spec_of(SITES)
    image = merged("merge", some(spec, (2, 0.0, None), (3, 0.0, None)), spec)
    assert (image.manifest.entries, image.num_bytes) == ((), 0)


def test_a_part_is_not_changed() -> None:
    spec = spec_of(SITES)
    parts = some(spec, (2, 0.3, None), (3, -0.7, None))
    before = [image.data.tobytes() for image, _ in parts]
    merged("merge", parts, spec)
    assert [image.data.tobytes() for image, _ in parts] == before


def test_a_product_that_float32_cannot_hold_is_refused() -> None:
    spec = spec_of(SITES[:1])
    weights = {site: (a, b, 1e35) for site, (a, b, _) in random_weights(spec.sites, 2, 0).items()}
    with pytest.raises(AdapterTooLarge, match=r"1e\+06 times a scaling of 1e\+35"):
        merged("merge", [(pack("a", spec, weights), 1e6)], spec)


def test_keys_tell_versions_weights_and_their_order_apart() -> None:
    lists = [
        [("a", 1.0)], [("a", 2.0)], [("b", 1.0)], [("a", 1.0), ("b", 1.0)], [("b", 1.0), ("a", 1.0)],
        [("a", 1.0), ("b", -1.0)], [("ab", 1.0)], [("a", 1.0), ("a", 1.0)], [("a", 1.0), ("b", 1.0000000000000002)],
    ]  # fmt: skip
    for one, other in itertools.combinations(lists, 2):
        assert merge_key(one) != merge_key(other)
    assert merge_key([("a", 1)]) == merge_key([("a", 1.0)])
