"""Packs an adapter into its image: one flat uint8 buffer and a manifest. numpy only; neither boto3, ray nor torch.

Each tensor starts at a multiple of 64 bytes, little endian, in the spec's element type, at its true rank. Of a linear
site: a [rank, in] as PEFT stores it, b [rank, out] transposed. Of an embedding: a [vocabulary, rank] transposed,
b [rank, out] transposed. `y = W x + scaling * (x a^T) b`; the scaling is in the manifest, not folded into b.

In int8 a tensor is codes of -127 .. 127, and `scales` float32 [2, rank] say what a code counts in: in a, then in b, one
for each of the ranks. Codes are rounded once, from the file's own values.
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
from adapter_store.image.inspect import (
    ADAPTER_FILES,
    KNOWN_FILES,
    MAX_BYTES_SETTING,
    PICKLE_FILE,
    Buffer,
    Inspected,
    Limits,
    SitePair,
    check_file_names,
    inspect,
)
from adapter_store.image.rounding import convert, quantize_rows
from adapter_store.image.safetensors_header import TensorInfo
from adapter_store.image.spec import DTYPE_BYTES, Spec, read_spec

ALIGNMENT_BYTES = 64
_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# bfloat16 is no numpy type: it is carried as its bits.
_STORED: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
_SCALE_BYTES = 4
_FORMATS = {"float32": 1, "float16": 1, "bfloat16": 1, "int8": 2}  # 2: entries have scales
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
    if not set(files) & set(ADAPTER_FILES):
        raise AdapterRejected(_what_it_is(folder))
    return pack(files, spec, limits)


def _what_it_is(folder: Path) -> str:
    """Of a folder without the files of an adapter: what to give instead."""
    told = f"{str(folder)!r} has neither {' nor '.join(ADAPTER_FILES)}"
    inner = sorted(path.parent.relative_to(folder) for path in folder.glob(f"*/{ADAPTER_FILES[0]}"))
    if inner:
        latest = max(inner, key=lambda path: (len(path.name), path.name))  # checkpoint-1000 is after checkpoint-500
        return f"{told}, but {len(inner)} of its folders have; give one of them: {str(folder / latest)!r}"
    if (folder / "config.json").is_file():
        return f"{told}: it is a whole model; serve it as the base, or extract a LoRA from it"
    if (folder / PICKLE_FILE).is_file():
        check_file_names((PICKLE_FILE,))
    return f"{told}; an adapter is a folder with both, as PEFT's save_pretrained writes it"


def pack_checked(files: Mapping[str, Buffer], spec: Spec, limits: Limits | None = None) -> PackedImage:
    """`pack`, for a spec that was read before."""
    inspected, entries, num_bytes = plan_image(files, spec, limits)
    data = _aligned_zeros(num_bytes)
    weights = memoryview(files["adapter_model.safetensors"])
    for pair, entry in zip(inspected.pairs, entries, strict=True):
        if spec.dtype == "int8":
            _quantize_pair(data, entry, weights, pair)
            continue
        _write(data, entry["a_offset"], weights, pair.a, spec.dtype, transpose=pair.site.kind == "embedding")
        _write(data, entry["b_offset"], weights, pair.b, spec.dtype, transpose=True)
    manifest = {
        "format": _FORMATS[spec.dtype],
        "spec": spec.digest,
        "dtype": spec.dtype,
        "num_bytes": num_bytes,
        "rank": inspected.rank,
        "entries": entries,
    }
    if inspected.notices:
        manifest["notices"] = list(inspected.notices)
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
    entries, num_bytes = _layout(inspected, spec.dtype)
    if limits.max_bytes is not None and num_bytes > limits.max_bytes:
        raise AdapterTooLarge(f"its image in {spec.dtype}", num_bytes, limits.max_bytes, setting=MAX_BYTES_SETTING)
    return inspected, entries, num_bytes


def _layout(inspected: Inspected, dtype: str) -> tuple[list[dict[str, Any]], int]:
    entries, offset, item_bytes = [], 0, DTYPE_BYTES[dtype]
    for pair in inspected.pairs:
        entry = {"site": pair.site.index, "rank": pair.rank, "scaling": pair.scaling}
        sizes = {
            "a_offset": pair.rank * pair.site.in_features * item_bytes,
            "b_offset": pair.rank * pair.site.out_features * item_bytes,
        }
        if dtype == "int8":
            sizes["scales_offset"] = 2 * pair.rank * _SCALE_BYTES
        for name, num_bytes in sizes.items():
            entry[name] = offset
            offset += _room(num_bytes)
        entries.append(entry)
    return entries, offset


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
    values = _read(weights, tensor, dtype)
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


def _read(weights: memoryview, tensor: TensorInfo, dtype: str) -> NDArray[Any]:
    """A tensor of the file, converted to `dtype`, in its own shape."""
    name = _NAMES[tensor.dtype]
    source = np.frombuffer(weights[tensor.start : tensor.end], dtype=_STORED[name])
    return convert(source, name, dtype).reshape(tensor.shape)


def _quantize_pair(data: NDArray[np.uint8], entry: Mapping[str, Any], weights: memoryview, pair: SitePair) -> None:
    """Writes both tensors of a site as codes, and their scales."""
    room = data[entry["scales_offset"] :][: 2 * pair.rank * _SCALE_BYTES]
    scales = room.view(_STORED["float32"]).reshape(2, pair.rank)
    a = _read(weights, pair.a, "float32")  # [rank, in]
    b = np.ascontiguousarray(_read(weights, pair.b, "float32").T)  # [rank, out]; its rows are read four times
    for i, (rows, offset, tensor) in enumerate(((a, entry["a_offset"], pair.a), (b, entry["b_offset"], pair.b))):
        try:
            codes, scales[i] = quantize_rows(rows)
        except ValueError as error:
            raise AdapterRejected(f"tensor {tensor.name!r} holds {error}; the training run went wrong") from error
        target = data[offset : offset + codes.size].view(np.int8)
        if tensor is pair.a and pair.site.kind == "embedding":
            np.copyto(target.reshape(codes.shape[::-1]), codes.T)
        else:
            np.copyto(target.reshape(codes.shape), codes)
