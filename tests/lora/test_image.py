"""Adapter images: what the reader accepts, and how it refuses everything else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from engine.errors import AdapterImageInvalid
from engine.image_spec import ImageSpec, LinearSite
from engine.lora.image import AdapterImage, AdapterManifest, touch_pages
from tests.support.golden_image import FLOAT32, GOLDEN, INT8, GoldenImage


def spec_of(golden: GoldenImage) -> ImageSpec:
    sites = tuple(LinearSite(**site) for site in golden.spec["sites"])
    return ImageSpec(**{**golden.spec, "sites": sites})


def changed(manifest: dict[str, Any], path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at `path`."""
    manifest = copy.deepcopy(manifest)
    place: Any = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return manifest


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_manifest_is_read(name: str) -> None:
    golden = GOLDEN[name]
    spec = spec_of(golden)
    assert spec.digest == golden.spec_digest
    manifest = AdapterManifest.from_dict(golden.manifest, spec)
    assert (manifest.dtype, manifest.num_bytes, manifest.rank) == (name, len(golden.data), golden.manifest["rank"])
    for entry, plain in zip(manifest.entries, golden.manifest["entries"], strict=True):
        assert {key: getattr(entry, key) for key in plain} == plain


def test_shapes_of_linear_and_embedding_sites_are_told_apart() -> None:
    entries = AdapterManifest.from_dict(FLOAT32.manifest, spec_of(FLOAT32)).entries
    assert [(e.site, e.a_shape, e.b_shape) for e in entries] == [
        (0, (5, 2), (2, 4)),
        (1, (2, 4), (2, 6)),
        (3, (3, 3), (3, 4)),
        (4, (2, 4), (2, 5)),
    ]


_BROKEN: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "another format": (("format",), 2, "format=2 should be 1"),
    "another base model": (("spec",), "beef", "spec='beef' should be"),
    "another dtype": (("dtype",), "float16", "dtype='float16' should be 'float32'"),
    "rank that no entry has": (("rank",), 8, "rank=8 should be 3"),
    "bytes that are no multiple of 64": (("num_bytes",), 500, "num_bytes=500 is not a multiple of 64"),
    "negative bytes": (("num_bytes",), -64, "num_bytes=-64"),
    "entries that are no list": (("entries",), "none", "entries='none' is not a list"),
    "unknown field": (("padding",), 0, "unknown fields ['padding']"),
    "unknown field in an entry": (("entries", 0, "bias"), True, "entries[0]: missing fields [], unknown fields"),
    "entry that is no mapping": (("entries", 0), 7, "entries[0] is int, not a mapping"),
    "site beyond the last": (("entries", 3, "site"), 5, "entries[3].site=5 is not one of the base model's 5 sites"),
    "negative site": (("entries", 0, "site"), -1, "entries[0].site=-1"),
    "site twice": (("entries", 1, "site"), 0, "entries[1].site=0 does not come after 0"),
    "sites that do not ascend": (("entries", 0, "site"), 2, "entries[1].site=1 does not come after 2"),
    "rank zero": (("entries", 1, "rank"), 0, "entries[1] (model.layers.0.self_attn.q_proj).rank=0"),
    "rank that is a truth value": (("entries", 1, "rank"), True, "rank=True"),
    "scaling that is not finite": (
        ("entries", 2, "scaling"),
        float("inf"),
        "(model.layers.0.mlp.down_proj).scaling=inf",
    ),
    "scaling that is no number": (("entries", 2, "scaling"), "2", "scaling='2' is not a finite number"),
    "unaligned offset": (("entries", 0, "b_offset"), 68, "(model.embed_tokens).b_offset=68 is not a multiple of 64"),
    "negative offset": (("entries", 0, "b_offset"), -64, "b_offset=-64"),
    "tensor beyond the end": (("entries", 3, "b_offset"), 512, "b_offset=512: its 40 bytes would end at 552 of 512"),
    "overlapping tensors": (("entries", 1, "a_offset"), 64, "overlaps entries[0].b_offset=64, which ends at byte 96"),
    "rank that makes tensors overlap": (("entries", 1, "rank"), 5, "overlaps"),
}


_BROKEN_CODES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "format of images without scales": (("format",), 1, "format=1 should be 2"),
    "another dtype": (("dtype",), "bfloat16", "dtype='bfloat16' should be 'int8'"),
    "unaligned scales": (("entries", 0, "scales_offset"), 132, "(model.embed_tokens).scales_offset=132 is not a"),
    "no scales": (("entries", 0, "scales_offset"), None, "(model.embed_tokens).scales_offset=None is not a whole"),
    "scales beyond the end": (("entries", 1, "scales_offset"), 384, "entries[1].scales_offset=384: its 16 bytes"),
    "scales upon codes": (("entries", 1, "scales_offset"), 64, "overlaps entries[0].b_offset=64"),
}


@pytest.mark.parametrize(
    ("golden", "broken"),
    [
        *(pytest.param(FLOAT32, broken, id=what) for what, broken in _BROKEN.items()),
        *(pytest.param(INT8, broken, id=what) for what, broken in _BROKEN_CODES.items()),
    ],
)
def test_broken_manifest_is_refused_by_name(golden: GoldenImage, broken: tuple[tuple[Any, ...], Any, str]) -> None:
    path, value, message = broken
    with pytest.raises(AdapterImageInvalid) as refused:
        AdapterManifest.from_dict(changed(golden.manifest, path, value), spec_of(golden))
    assert message in str(refused.value)


def test_scales_belong_to_codes_and_codes_to_scales() -> None:
    manifest: Any = copy.deepcopy(INT8.manifest)
    del manifest["entries"][0]["scales_offset"]
    with pytest.raises(AdapterImageInvalid, match=r"entries\[0\].*missing fields \['scales_offset'\]"):
        AdapterManifest.from_dict(manifest, spec_of(INT8))
    with pytest.raises(AdapterImageInvalid, match=r"unknown fields \['scales_offset'\]"):
        AdapterManifest.from_dict(changed(FLOAT32.manifest, ("entries", 0, "scales_offset"), 0), spec_of(FLOAT32))


def test_buffer_of_codes_lies_where_its_scales_can_be_read() -> None:
    manifest = AdapterManifest.from_dict(INT8.manifest, spec_of(INT8))
    with pytest.raises(AdapterImageInvalid, match="address is not a multiple of 4 bytes, as int8 needs it"):
        AdapterImage("k", manifest, np.zeros(385, dtype=np.uint8)[1:])


@pytest.mark.parametrize("field", ["format", "spec", "dtype", "num_bytes", "rank", "entries"])
def test_missing_field_is_named(field: str) -> None:
    manifest = {key: value for key, value in FLOAT32.manifest.items() if key != field}
    with pytest.raises(AdapterImageInvalid, match=f"missing fields \\['{field}'\\]"):
        AdapterManifest.from_dict(manifest, spec_of(FLOAT32))


def test_images_cut_for_tensor_parallelism_are_refused() -> None:
    spec = ImageSpec(**{**FLOAT32.spec, "sites": spec_of(FLOAT32).sites, "tp_degree": 2})
    with pytest.raises(AdapterImageInvalid, match="tp_degree=2"):
        AdapterManifest.from_dict({**FLOAT32.manifest, "spec": spec.digest}, spec)


def test_adapter_without_any_site_is_an_image_of_no_bytes() -> None:
    spec = spec_of(FLOAT32)
    manifest = AdapterManifest.from_dict({**FLOAT32.manifest, "entries": [], "rank": 0, "num_bytes": 0}, spec)
    image = AdapterImage("empty", manifest, b"")
    touch_pages(image)
    assert image.num_bytes == 0


def test_buffer_of_another_length_is_refused() -> None:
    manifest = AdapterManifest.from_dict(FLOAT32.manifest, spec_of(FLOAT32))
    with pytest.raises(AdapterImageInvalid, match="'k': the buffer has 511 bytes, its manifest says 512"):
        AdapterImage("k", manifest, FLOAT32.data[:-1])


def test_buffer_at_an_odd_address_is_refused() -> None:
    manifest = AdapterManifest.from_dict(FLOAT32.manifest, spec_of(FLOAT32))
    with pytest.raises(AdapterImageInvalid, match="address is not a multiple of 4"):
        AdapterImage("k", manifest, np.zeros(513, dtype=np.uint8)[1:])


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, np.frombuffer])
def test_image_shares_any_buffer_and_is_read_only(kind: Any) -> None:
    source = kind(FLOAT32.data) if kind is not np.frombuffer else np.frombuffer(FLOAT32.data, dtype=np.uint8)
    image = AdapterImage("k", AdapterManifest.from_dict(FLOAT32.manifest, spec_of(FLOAT32)), source)
    touch_pages(image)
    assert image.data.ctypes.data == np.frombuffer(source, dtype=np.uint8).ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        image.data[0] = 1
