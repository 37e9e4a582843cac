"""Reading adapter images: one flat byte buffer per adapter and the manifest that says what lies where.

The adapter store packs images; this module checks a manifest against the base model it is about to serve and never
changes a byte. Layout of the buffer (little endian, every tensor at a multiple of 64 bytes, no padding of ranks):

    linear site:     a [R, in_features]      b [R, out_features]        y = W x + scaling * (x a^T) b
    embedding site:  a [vocabulary, R]       b [R, out_features]        y = W[id] + scaling * a[id] b

In int8 both are codes, and each site has scales float32 [2, R] besides: what a code of a given rank counts in, in a and
in b. Both belong to the low-rank vector: (x a^T) b = ((x codes_a^T) * scales[0] * scales[1]) codes_b.

No torch here: the store's client and the scheduler's side of the engine handle images too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import AdapterImageInvalid
from engine.image_spec import ImageSpec, LinearSite

FORMATS = {"float32": 1, "float16": 1, "bfloat16": 1, "int8": 2}  # 2: entries have scales
ALIGNMENT_BYTES = 64
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}

_SCALE_BYTES = 4
_ADDRESS_BYTES = {**ITEM_BYTES, "int8": _SCALE_BYTES}  # what the buffer's address must be a multiple of
_MANIFEST_FIELDS = frozenset(("format", "spec", "dtype", "num_bytes", "rank", "entries"))
_OPTIONAL_FIELDS = frozenset(("notices",))  # for people, not for an engine
_ENTRY_FIELDS = frozenset(("site", "rank", "scaling", "a_offset", "b_offset"))
_SCALED_FIELDS = _ENTRY_FIELDS | {"scales_offset"}
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """The LoRA weights of one site: where its tensors start in the buffer (bytes) and their shapes."""

    site: int
    rank: int
    scaling: float
    a_offset: int
    b_offset: int
    a_shape: tuple[int, int]
    b_shape: tuple[int, int]
    scales_offset: int | None = None  # int8 only: of float32 [2, rank]

    def extents(self, item_bytes: int) -> tuple[tuple[int, int], ...]:
        """Where each tensor starts, and its bytes: a, b and, if there are any, scales."""
        a = self.a_offset, self.a_shape[0] * self.a_shape[1] * item_bytes
        b = self.b_offset, self.b_shape[0] * self.b_shape[1] * item_bytes
        return (a, b) if self.scales_offset is None else (a, b, (self.scales_offset, 2 * self.rank * _SCALE_BYTES))


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """A checked manifest: every entry names a site of the spec and lies inside the buffer, apart from all others."""

    spec_digest: str
    dtype: str
    num_bytes: int
    rank: int  # the largest
    entries: tuple[ImageEntry, ...]  # ascending by site

    @classmethod
    def from_dict(cls, manifest: Mapping[str, Any], spec: ImageSpec) -> AdapterManifest:
        """Check a plain manifest against `spec`.

        Raises: AdapterImageInvalid naming the field or the entry, its value and what it should be.
        """
        if spec.tp_degree != 1:
            raise AdapterImageInvalid(f"tp_degree={spec.tp_degree} is not supported: images are read whole; use 1")
        told = _OPTIONAL_FIELDS & set(manifest) if isinstance(manifest, Mapping) else frozenset()
        _check_fields(manifest, _MANIFEST_FIELDS | told, "manifest")
        _check_equal("format", manifest["format"], FORMATS[spec.dtype], "pack the adapter again")
        _check_equal("spec", manifest["spec"], spec.digest, "it was packed for another base model; pack it for this")
        _check_equal("dtype", manifest["dtype"], spec.dtype, "pack the adapter with the dtype of the engine's adapters")
        num_bytes = _whole(manifest["num_bytes"], "num_bytes", 0)
        if num_bytes % ALIGNMENT_BYTES:
            raise AdapterImageInvalid(f"num_bytes={num_bytes} is not a multiple of {ALIGNMENT_BYTES}")
        if not isinstance(manifest["entries"], list | tuple):
            raise AdapterImageInvalid(f"entries={manifest['entries']!r} is not a list")
        entries = tuple(_entry(raw, i, spec) for i, raw in enumerate(manifest["entries"]))
        _check_ascending(entries)
        _check_extents(entries, num_bytes, ITEM_BYTES[spec.dtype])
        rank = max((e.rank for e in entries), default=0)
        _check_equal("rank", manifest["rank"], rank, "it must be the largest rank of the entries")
        return cls(spec_digest=spec.digest, dtype=spec.dtype, num_bytes=num_bytes, rank=rank, entries=entries)


class AdapterImage:
    """One adapter version on the host: its key, its manifest and its bytes. Read-only.

    `data` may be anything with the buffer protocol (a numpy array out of shared memory, bytes, a memory map); it is
    kept alive and never copied.

    Raises: AdapterImageInvalid if the buffer's length is not the manifest's, or its address is not aligned for the
    manifest's dtype.
    """

    __slots__ = ("__weakref__", "data", "key", "manifest", "weights")

    def __init__(self, key: str, manifest: AdapterManifest, data: Any) -> None:
        view: npt.NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)
        view.flags.writeable = False
        if view.size != manifest.num_bytes:
            raise AdapterImageInvalid(
                f"adapter {key!r}: the buffer has {view.size} bytes, its manifest says {manifest.num_bytes}"
            )
        if view.size and view.ctypes.data % _ADDRESS_BYTES[manifest.dtype]:
            raise AdapterImageInvalid(
                f"adapter {key!r}: the buffer's address is not a multiple of {_ADDRESS_BYTES[manifest.dtype]} bytes, "
                f"as {manifest.dtype} needs it; hand over a buffer of its own instead of an odd slice"
            )
        self.key = key
        self.manifest = manifest
        self.data = view
        self.weights: object | None = None  # what a storage has made of it ahead of its step

    @property
    def num_bytes(self) -> int:
        return self.manifest.num_bytes

    def __repr__(self) -> str:
        return f"AdapterImage({self.key!r}, {self.num_bytes} bytes, rank {self.manifest.rank})"


def touch_pages(image: AdapterImage) -> None:
    """Read one byte of each page, so that none faults later. About 0.1 ms per MiB of shared memory the first time."""
    image.data[::_PAGE_BYTES].max(initial=0)


def _entry(raw: Mapping[str, Any], position: int, spec: ImageSpec) -> ImageEntry:
    """Says where an error is only when there is one: a request waits for hundreds of these."""
    site: LinearSite | None = None
    try:
        _check_fields(raw, _ENTRY_FIELDS if spec.dtype != "int8" else _SCALED_FIELDS, "")
        index = _whole(raw["site"], ".site", 0)
        if index >= len(spec.sites):
            raise AdapterImageInvalid(f".site={index} is not one of the base model's {len(spec.sites)} sites")
        site = spec.sites[index]
        rank = _whole(raw["rank"], ".rank", 1)
        scaling = raw["scaling"]
        if isinstance(scaling, bool) or not isinstance(scaling, int | float) or not math.isfinite(scaling):
            raise AdapterImageInvalid(f".scaling={scaling!r} is not a finite number")
        a_offset, b_offset = _offset(raw["a_offset"], ".a_offset"), _offset(raw["b_offset"], ".b_offset")
        scales_offset = _offset(raw["scales_offset"], ".scales_offset") if "scales_offset" in raw else None
    except AdapterImageInvalid as error:
        where = f"entries[{position}]" if site is None else f"entries[{position}] ({site.name})"
        raise AdapterImageInvalid(f"{where}{error}") from None
    a_shape, b_shape = _shapes(site, rank)
    return ImageEntry(index, rank, float(scaling), a_offset, b_offset, a_shape, b_shape, scales_offset)


def _shapes(site: LinearSite, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    a_shape = (site.in_features, rank) if site.kind == "embedding" else (rank, site.in_features)
    return a_shape, (rank, site.out_features)


def _check_fields(raw: object, names: frozenset[str], where: str) -> None:
    if not isinstance(raw, Mapping):
        raise AdapterImageInvalid(f"{where} is {type(raw).__name__}, not a mapping")
    if raw.keys() != names:
        missing = sorted(names - raw.keys())
        unknown = sorted(str(name) for name in raw if name not in names)
        raise AdapterImageInvalid(f"{where}: missing fields {missing}, unknown fields {unknown}")


def _check_equal(name: str, value: object, expected: object, remedy: str) -> None:
    if type(value) is not type(expected) or value != expected:
        raise AdapterImageInvalid(f"{name}={value!r} should be {expected!r}: {remedy}")


def _whole(value: Any, name: str, low: int) -> int:
    if type(value) is not int or value < low:
        raise AdapterImageInvalid(f"{name}={value!r} is not a whole number of at least {low}")
    return value


def _offset(value: Any, name: str) -> int:
    offset = _whole(value, name, 0)
    if offset % ALIGNMENT_BYTES:
        raise AdapterImageInvalid(f"{name}={offset} is not a multiple of {ALIGNMENT_BYTES}")
    return offset


def _check_ascending(entries: tuple[ImageEntry, ...]) -> None:
    for position in range(1, len(entries)):
        if entries[position].site <= entries[position - 1].site:
            raise AdapterImageInvalid(
                f"entries[{position}].site={entries[position].site} does not come after "
                f"{entries[position - 1].site}: entries ascend by site, each site once"
            )


def _check_extents(entries: tuple[ImageEntry, ...], num_bytes: int, item_bytes: int) -> None:
    extents = []
    for position, e in enumerate(entries):
        for name, (offset, size) in zip(("a", "b", "scales"), e.extents(item_bytes), strict=False):
            if offset + size > num_bytes:
                where = f"entries[{position}].{name}_offset={offset}"
                raise AdapterImageInvalid(f"{where}: its {size} bytes would end at {offset + size} of {num_bytes}")
            extents.append((offset, offset + size, position, name))
    extents.sort()
    for before, after in itertools.pairwise(extents):
        if after[0] < before[1]:
            first, second = (f"entries[{position}].{name}_offset={at}" for at, _, position, name in (before, after))
            raise AdapterImageInvalid(f"{second} overlaps {first}, which ends at byte {before[1]}")
