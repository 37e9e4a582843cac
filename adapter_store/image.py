"""Packs an adapter into its image: one flat uint8 buffer and a manifest. numpy only; neither boto3, ray nor torch.

Each tensor starts at a multiple of 64 bytes, little endian, in the spec's element type, at its true rank. Of a linear
site: a [rank, in] as PEFT stores it, b [rank, out] transposed. Of an embedding: a [vocabulary, rank] transposed,
b [rank, out] transposed. `y = W x + scaling * (x a^T) b`; the scaling is in the manifest, not folded into b.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_store.errors import AdapterRejected, AdapterTooLarge
from adapter_store.inspect import KNOWN_FILES, Buffer, Inspected, Limits, SitePair, inspect
from adapter_store.safetensors_header import TensorInfo
from adapter_store.spec import DTYPE_BYTES, Spec, read_spec

ALIGNMENT_BYTES = 64
_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# bfloat16 is no numpy type: it is carried as its bits.
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
# (bits without the sign, the least bits that mean infinity or NaN)
_EXPONENT = {"float32": (0x7FFFFFFF, 0x7F800000), "float16": (0x7FFF, 0x7C00), "bfloat16": (0x7FFF, 0x7F80)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedImage:
    """An adapter ready for engines of one spec. `config` is the adapter_config.json it came with."""

    manifest: dict[str, Any]
    data: NDArray[np.uint8]
    rank: int
    num_bytes: int
    config: dict[str, Any]


def pack(files: Mapping[str, Buffer], spec: Mapping[str, Any], limits: Limits | None = None) -> PackedImage:
    """Checks `files` (name -> content) and packs them for `spec` (an `ImageSpec.to_dict()`).

    Raises: AdapterRejected, AdapterTooLarge, SpecInvalid.
    """
    return pack_checked(files, read_spec(spec), limits)


def pack_folder(path: str | Path, spec: Mapping[str, Any], limits: Limits | None = None) -> PackedImage:
    """Packs the adapter in a folder; its weights are memory-mapped, never read whole.

    Raises: AdapterRejected, AdapterTooLarge, SpecInvalid.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterRejected(f"{str(path)!r} is not a folder")
    files = {name: _map_file(folder / name) for name in KNOWN_FILES if (folder / name).is_file()}
    return pack(files, spec, limits)


def pack_checked(files: Mapping[str, Buffer], spec: Spec, limits: Limits | None = None) -> PackedImage:
    """`pack`, for a spec that was read before."""
    inspected, entries, num_bytes = plan_image(files, spec, limits)
    data = _aligned_zeros(num_bytes)
    weights = memoryview(files["adapter_model.safetensors"])
    for pair, entry in zip(inspected.pairs, entries, strict=True):
        _write(data, entry["a_offset"], weights, pair.a, spec.dtype, transpose=pair.site.kind == "embedding")
        _write(data, entry["b_offset"], weights, pair.b, spec.dtype, transpose=True)
    manifest = {
        "format": 1,
        "spec": spec.digest,
        "dtype": spec.dtype,
        "num_bytes": num_bytes,
        "rank": inspected.rank,
        "entries": entries,
    }
    return PackedImage(
        manifest=manifest, data=data, rank=inspected.rank, num_bytes=num_bytes, config=inspected.settings.raw
    )


def plan_image(
    files: Mapping[str, Buffer], spec: Spec, limits: Limits | None = None, weights_bytes: int | None = None
) -> tuple[Inspected, list[dict[str, Any]], int]:
    """What is packed, where it goes, and how many bytes that takes; for `weights_bytes` see `inspect`.

    Raises: AdapterRejected, AdapterTooLarge: everything that can be told without the weights.
    """
    limits = limits or Limits()
    inspected = inspect(files, spec, limits, weights_bytes)
    entries, num_bytes = _layout(inspected, DTYPE_BYTES[spec.dtype])
    if limits.max_bytes is not None and num_bytes > limits.max_bytes:
        raise AdapterTooLarge("its image", num_bytes, limits.max_bytes)
    return inspected, entries, num_bytes


def _layout(inspected: Inspected, item_bytes: int) -> tuple[list[dict[str, Any]], int]:
    entries, offset = [], 0
    for pair in inspected.pairs:
        a_offset, offset = offset, offset + _room(pair.rank * pair.site.in_features * item_bytes)
        b_offset, offset = offset, offset + _room(pair.rank * pair.site.out_features * item_bytes)
        entries.append(_entry(pair, a_offset, b_offset))
    return entries, offset


def _entry(pair: SitePair, a_offset: int, b_offset: int) -> dict[str, Any]:
    return {
        "site": pair.site.index,
        "rank": pair.rank,
        "scaling": pair.scaling,
        "a_offset": a_offset,
        "b_offset": b_offset,
    }


def _room(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _aligned_zeros(num_bytes: int) -> NDArray[np.uint8]:
    raw = np.zeros(num_bytes + ALIGNMENT_BYTES, dtype=np.uint8)
    skip = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[skip : skip + num_bytes]


def _map_file(path: Path) -> Buffer:
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""  # nothing to map
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _write(
    data: NDArray[np.uint8], offset: int, weights: memoryview, tensor: TensorInfo, dtype: str, *, transpose: bool
) -> None:
    """Converts one tensor into its place and proves that every value that was written is finite."""
    stored = _STORED[dtype]
    count = math.prod(tensor.shape)
    source = np.frombuffer(weights[tensor.start : tensor.end], dtype=_STORED[_CODES[tensor.dtype]])
    values = convert(source, _CODES[tensor.dtype], dtype).reshape(tensor.shape)
    shape = tensor.shape[::-1] if transpose else tensor.shape
    target = data[offset : offset + count * stored.itemsize].view(stored).reshape(shape)
    np.copyto(target, values.T if transpose else values)
    mask, limit = _EXPONENT[dtype]
    bits = data[offset : offset + count * stored.itemsize].view(f"<u{stored.itemsize}")
    if int((bits & bits.dtype.type(mask)).max()) >= limit:
        raise AdapterRejected(
            f"tensor {tensor.name!r} holds NaN, infinity, or a value beyond {dtype}; the training run went wrong "
            "or the base's element type is too narrow"
        )


def convert(values: NDArray[Any], source: str, target: str) -> NDArray[Any]:
    """Converts between the element types, rounding to the nearest, ties to even; bfloat16 is carried as uint16 bits."""
    if source == target:
        return values
    if source == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    if target == "float32":
        return values.astype(np.float32, copy=False)
    if target == "float16":
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which the caller refuses
            return values.astype(np.float16)
    return _bfloat16_bits(values.astype(np.float32, copy=False))


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: NDArray[np.uint32] = bits + (0x7FFF + ((bits >> np.uint32(16)) & np.uint32(1)))
    upper = (rounded >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    # The carry could turn a NaN into a finite number or an infinity; keep it a NaN.
    return np.where(is_nan, np.uint16(0x7FC0), upper)
