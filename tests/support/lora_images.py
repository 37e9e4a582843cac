"""Adapter images for tests, packed by hand with numpy: nothing here is shared with the store's packer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from engine.core.plan import LoraSegment
from engine.image_spec import ImageSpec, LinearSite
from engine.lora.image import AdapterImage, AdapterManifest
from engine.lora.storage import SiteWeights

_ALIGNMENT = 64


def cut(*runs: tuple[int, int]) -> tuple[LoraSegment, ...]:
    """Segments out of (number of rows, slot) runs; slot 0 leaves a gap."""
    segments, row = [], 0
    for num_rows, slot in runs:
        if slot:
            segments.append(LoraSegment(row, row + num_rows, slot))
        row += num_rows
    return tuple(segments)


def linear_sites(*widths: tuple[int, int]) -> tuple[LinearSite, ...]:
    """Sites layers.0.linear_i of one decoder layer with the given (in, out) widths."""
    return tuple(
        LinearSite(index=i, name=f"layers.0.linear_{i}", in_features=n, out_features=m, layer=0)
        for i, (n, m) in enumerate(widths)
    )


def spec_of(sites: tuple[LinearSite, ...], dtype: str = "float32") -> ImageSpec:
    return ImageSpec(base_fingerprint="tests", dtype=dtype, sites=sites)  # type: ignore[arg-type]


def pack(key: str, spec: ImageSpec, weights: Mapping[int, tuple[np.ndarray, np.ndarray, float]]) -> AdapterImage:
    """An image out of {site: (a, b, scaling)}, float32 arrays in the image's own orientation. Codes are rounded."""
    manifest, data = pack_parts(spec, weights)
    return AdapterImage(key, AdapterManifest.from_dict(manifest, spec), data)


def pack_parts(
    spec: ImageSpec, weights: Mapping[int, tuple[np.ndarray, np.ndarray, float]]
) -> tuple[dict[str, Any], bytes]:
    data = bytearray()
    entries = []
    for site in sorted(weights):
        a, b, scaling = weights[site]
        entry = {"site": site, "rank": int(b.shape[0]), "scaling": scaling}
        if spec.dtype == "int8":
            codes_a, of_a = _codes(a, _rank_axis(spec.sites[site]))
            codes_b, of_b = _codes(b, 0)
            tensors = {"a_offset": codes_a, "b_offset": codes_b, "scales_offset": of_a + of_b}
        else:
            tensors = {"a_offset": _bytes(a, spec.dtype), "b_offset": _bytes(b, spec.dtype)}
        for name, raw in tensors.items():
            entry[name] = len(data)
            data += raw + bytes(-len(raw) % _ALIGNMENT)
        entries.append(entry)
    rank = max((e["rank"] for e in entries), default=0)
    manifest = {
        "format": 2 if spec.dtype == "int8" else 1,
        "spec": spec.digest,
        "dtype": spec.dtype,
        "num_bytes": len(data),
        "rank": rank,
        "entries": entries,
    }
    return manifest, bytes(data)


def random_weights(
    sites: tuple[LinearSite, ...], rank: int, seed: int, only: tuple[int, ...] | None = None
) -> dict[int, tuple[np.ndarray, np.ndarray, float]]:
    """Weights for all sites (or those in `only`), of a size that makes the adapter count as much as the base."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for site in sites:
        if only is None or site.index in only:
            shape = (site.in_features, rank) if site.kind == "embedding" else (rank, site.in_features)
            a = rng.standard_normal(shape).astype(np.float32) / np.float32(site.in_features**0.5)
            b = rng.standard_normal((rank, site.out_features)).astype(np.float32)
            chosen[site.index] = (a, b, 0.5 + 0.25 * (seed % 5))
    return chosen


def in_numbers(image: AdapterImage, spec: ImageSpec) -> dict[int, SiteWeights]:
    """What an image of codes says, by site, in float64."""
    found = {}
    for e in image.manifest.entries:
        a, b = (
            np.frombuffer(image.data.tobytes(), np.int8, shape[0] * shape[1], offset).reshape(shape).astype(np.float64)
            for offset, shape in ((e.a_offset, e.a_shape), (e.b_offset, e.b_shape))
        )
        scales = np.frombuffer(image.data.tobytes(), "<f4", 2 * e.rank, e.scales_offset).astype(np.float64)
        of_a = np.expand_dims(scales[: e.rank], 1 - _rank_axis(spec.sites[e.site]))
        of_b = scales[e.rank :, None]
        found[e.site] = SiteWeights(e.site, torch.from_numpy(a * of_a), torch.from_numpy(b * of_b), e.scaling)
    return found


def _rank_axis(site: LinearSite) -> int:
    """Of a."""
    return 1 if site.kind == "embedding" else 0


def _codes(array: np.ndarray, rank_axis: int) -> tuple[bytes, bytes]:
    """Codes of -127 .. 127 in the array's own order, and each rank's step in float32."""
    exact = np.moveaxis(array.astype(np.float64), rank_axis, 0)
    steps = (np.abs(exact).max(axis=1) / 127).astype(np.float32)
    codes = np.round(exact / np.maximum(steps, 1e-38)[:, None].astype(np.float64))  # to nearest, ties to even
    return np.moveaxis(codes, 0, rank_axis).astype(np.int8).tobytes(), steps.tobytes()


def _bytes(array: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":
        bits = array.astype("<f4").view("<u4").astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return rounded.astype("<u2").tobytes()
    return array.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()
