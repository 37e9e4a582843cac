"""Several adapters as one image: what each adds to a layer is weighted and summed, by putting their ranks side by side.

    sum_i w_i s_i (x a_i^T) b_i  =  s (x [a_1; a_2; ..]^T) [r_1 b_1; r_2 b_2; ..]      with r_i = w_i s_i / s

That is the sum itself, whatever the ranks, scalings and sites of the parts are; weighting A and B each would not be. s
is the largest w_i s_i of the site in magnitude, so that no |r_i| is above 1: b of that part, and of every other with as
large a product, is copied as it is, and the others' are rounded once to the image's type. In int8 the r_i go into b's
scales, and no code changes.

Pure functions on images; no torch.
"""

from __future__ import annotations

import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import AdapterTooLarge
from engine.image_spec import ImageSpec
from engine.lora.image import ALIGNMENT_BYTES, FORMATS, ITEM_BYTES, AdapterImage, AdapterManifest, ImageEntry

Weighted = tuple[AdapterImage, float]
"""An image, and how often what it adds counts."""

_SCALE_BYTES = 4
_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}  # bfloat16 is carried as its bits
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class _Piece:
    """What one part has for one site, and its product of weight and scaling."""

    image: AdapterImage
    entry: ImageEntry
    factor: float


def merge_key(versions: Iterable[tuple[str, float]]) -> str:
    """The key of a merge of these (adapter version, weight) pairs: the same parts in the same order, the same key."""
    hasher = hashlib.sha256(b"merge")
    for version, weight in versions:
        encoded = version.encode()
        hasher.update(struct.pack("<Qd", len(encoded), weight) + encoded)
    return hasher.hexdigest()


def merged_size(parts: Sequence[Weighted], spec: ImageSpec) -> tuple[int, int]:
    """Largest rank and bytes of what `merged` makes of `parts`, without making it."""
    _, entries, num_bytes = _layout(parts, spec)
    return max((entry["rank"] for entry in entries), default=0), num_bytes


def merged(key: str, parts: Sequence[Weighted], spec: ImageSpec) -> AdapterImage:
    """One image that adds to each layer the sum of what `parts` add, each times its weight; all are of `spec`.

    A part of weight 0 takes no room. Raises: AdapterTooLarge if a weight times a scaling is no float32 number.
    """
    pieces, entries, num_bytes = _layout(parts, spec)
    data = _aligned(num_bytes)
    for site_pieces, entry in zip(pieces, entries, strict=True):
        _write(data, site_pieces, entry, spec)
    manifest = {
        "format": FORMATS[spec.dtype],
        "spec": spec.digest,
        "dtype": spec.dtype,
        "num_bytes": num_bytes,
        "rank": max((entry["rank"] for entry in entries), default=0),
        "entries": entries,
    }
    return AdapterImage(key, AdapterManifest.from_dict(manifest, spec), data)


def _layout(parts: Sequence[Weighted], spec: ImageSpec) -> tuple[list[list[_Piece]], list[dict[str, Any]], int]:
    """What goes to each site, where it goes, and the bytes of all."""
    by_site: defaultdict[int, list[_Piece]] = defaultdict(list)
    for image, weight in parts:
        for of in image.manifest.entries:
            factor = weight * of.scaling
            if not abs(factor) <= _LARGEST:
                raise AdapterTooLarge(f"a weight of {weight:g} times a scaling of {of.scaling:g} is no float32 number")
            if factor:
                by_site[of.site].append(_Piece(image, of, factor))
    entries: list[dict[str, Any]] = []
    offset, item_bytes = 0, ITEM_BYTES[spec.dtype]
    for index in sorted(by_site):
        site, rank = spec.sites[index], sum(piece.entry.rank for piece in by_site[index])
        largest = max((piece.factor for piece in by_site[index]), key=abs)
        entry: dict[str, Any] = {"site": index, "rank": rank, "scaling": largest}
        sizes = {"a_offset": rank * site.in_features * item_bytes, "b_offset": rank * site.out_features * item_bytes}
        if spec.dtype == "int8":
            sizes["scales_offset"] = 2 * rank * _SCALE_BYTES
        for name, num_bytes in sizes.items():
            entry[name] = offset
            offset += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        entries.append(entry)
    return [by_site[index] for index in sorted(by_site)], entries, offset


def _write(data: npt.NDArray[np.uint8], pieces: list[_Piece], entry: dict[str, Any], spec: ImageSpec) -> None:
    """All pieces of one site, rank behind rank."""
    stored, rank = np.dtype(_STORED[spec.dtype]), entry["rank"]
    site = spec.sites[entry["site"]]
    is_embedding = site.kind == "embedding"
    a_shape = (site.in_features, rank) if is_embedding else (rank, site.in_features)
    a = _view(data, entry["a_offset"], a_shape, stored)
    b = _view(data, entry["b_offset"], (rank, site.out_features), stored)
    first = 0
    for piece in pieces:
        of, last = piece.entry, first + piece.entry.rank
        ratio = piece.factor / entry["scaling"]
        source = piece.image.data
        a_part = _view(source, of.a_offset, of.a_shape, stored)
        b_part = _view(source, of.b_offset, of.b_shape, stored)
        if is_embedding:
            a[:, first:last] = a_part
        else:
            a[first:last] = a_part
        if of.scales_offset is None:
            b[first:last] = b_part if ratio == 1.0 else _times(b_part, ratio, spec.dtype)
        else:
            b[first:last] = b_part
            scales = _view(data, entry["scales_offset"], (2, rank), np.dtype("<f4"))
            of_part = _view(source, of.scales_offset, (2, of.rank), np.dtype("<f4"))
            scales[0, first:last] = of_part[0]
            scales[1, first:last] = of_part[1] * np.float32(ratio)
        first = last


def _times(values: npt.NDArray[Any], ratio: float, dtype: str) -> npt.NDArray[Any]:
    """Products in float32, rounded to nearest even. No ratio is above 1 in magnitude, so none is beyond `dtype`."""
    if dtype == "float32":
        return np.asarray(values * np.float32(ratio))
    if dtype == "float16":
        return np.asarray((values.astype(np.float32) * np.float32(ratio)).astype(np.float16))
    bits = ((values.astype(np.uint32) << 16).view(np.float32) * np.float32(ratio)).view(np.uint32)
    return np.asarray(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def _view(data: npt.NDArray[np.uint8], offset: int, shape: tuple[int, int], stored: np.dtype[Any]) -> npt.NDArray[Any]:
    return data[offset : offset + shape[0] * shape[1] * stored.itemsize].view(stored).reshape(shape)


def _aligned(num_bytes: int) -> npt.NDArray[np.uint8]:
    raw = np.zeros(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + num_bytes]
