"""Reads the header of a safetensors file and proves it before a byte of weights is used.

Layout: 8 bytes little-endian header length N; N bytes of JSON; the tensors, back to back, to the end of the file.
Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import AdapterRejected
from adapter_store.image.strict_json import load_object

MAX_HEADER_BYTES = 16 << 20
MIN_BYTES = 9  # of the file's begin, to know how long its header is and that it is one
MAX_DIMS = 8
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # the element types a LoRA may have
_FOREIGN = {b"PK\x03\x04": "a zip archive, as torch.save writes", b"\x80": "a pickle", b"GGUF": "a GGUF file"}
_LFS = b"version https://git-lfs.github.com/"
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor's place. `start` and `end` are byte offsets in the whole file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(
    data: bytes | memoryview, num_bytes: int | None = None, max_header_bytes: int = MAX_HEADER_BYTES
) -> dict[str, TensorInfo]:
    """The tensors of a file of `num_bytes` that begins with `data`, by name, in the order of their bytes.

    `data` is the whole file (the default), or as much of it as `num_header_bytes` says. A header of more than
    `max_header_bytes` is not looked at: parsing takes some thirty times its bytes of memory.
    Raises: AdapterRejected when anything about the header, the element types or the offsets is not exactly right.
    """
    num_bytes = len(data) if num_bytes is None else num_bytes
    header_bytes = num_header_bytes(data, num_bytes) - 8
    if header_bytes > max_header_bytes:
        raise AdapterRejected(
            f"the safetensors header has {header_bytes} bytes; adapters of this base have at most {max_header_bytes}"
        )
    header = load_object(data[8 : 8 + header_bytes], "the safetensors header", max_header_bytes)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterRejected("the safetensors header's __metadata__ is not a map of strings")
    base = 8 + header_bytes
    tensors = sorted((_tensor(name, entry, base) for name, entry in header.items()), key=lambda t: (t.start, t.end))
    position = base
    for tensor in tensors:
        if tensor.start != position:
            raise AdapterRejected(
                f"tensor {_shown(tensor.name)} begins at byte {tensor.start}, but the one before ends at {position}: "
                "the file has a gap or an overlap"
            )
        position = tensor.end
    if position != num_bytes:
        problem = "is truncated" if position > num_bytes else "has bytes that no tensor names"
        raise AdapterRejected(
            f"the safetensors file {problem}: its tensors end at byte {position}, it has {num_bytes} bytes"
        )
    return {tensor.name: tensor for tensor in tensors}


def num_header_bytes(data: bytes | memoryview, num_bytes: int) -> int:
    """How many bytes from its first on a file of `num_bytes` needs for its length field and its header.

    `data` is its begin, `MIN_BYTES` of it or more. Raises: AdapterRejected when there cannot be such a header.
    """
    if num_bytes < 8:
        raise AdapterRejected(f"the safetensors file is truncated: it has {num_bytes} bytes, the header alone needs 8")
    if num_bytes >= len(_LFS) and bytes(data[:MIN_BYTES]) == _LFS[:MIN_BYTES]:
        raise AdapterRejected(
            "the file is a pointer of Git LFS, not the weights themselves; run `git lfs pull` where it was cloned, and "
            "upload the file that it brings"
        )
    first = bytes(data[:MIN_BYTES])
    for magic, what in _FOREIGN.items():
        # A header of 128 + 256 k bytes also begins with 0x80; what follows the length tells them apart.
        if first.startswith(magic) and first[8:9] != b"{":
            raise AdapterRejected(f"the file is {what}, not safetensors; save the adapter with safe_serialization=True")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterRejected(
            f"the safetensors header claims {length} bytes, the limit is {MAX_HEADER_BYTES}: the file is broken "
            "or is not safetensors"
        )
    if length > num_bytes - 8:
        raise AdapterRejected(
            f"the safetensors header claims {length} bytes, the file has only {num_bytes}: it is truncated"
        )
    if first[8:9] != b"{":
        raise AdapterRejected("the file is not safetensors: its header does not begin with '{'")
    return 8 + length


def _tensor(name: str, entry: Any, base: int) -> TensorInfo:
    shown = _shown(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterRejected(f"tensor {shown}: its header entry must hold just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise AdapterRejected(
            f"tensor {shown} has element type {_shown(dtype)}; only {', '.join(ITEM_BYTES)} are served"
        )
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise AdapterRejected(f"tensor {shown}: {_shown(shape)} is not a shape")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise AdapterRejected(f"tensor {shown}: {_shown(offsets)} are not data_offsets")
    expected, spanned = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if spanned != expected:
        raise AdapterRejected(
            f"tensor {shown}: its offsets span {spanned} bytes, its shape {tuple(shape)} needs {expected}"
        )
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), start=base + offsets[0], end=base + offsets[1])


def _shown(value: Any) -> str:
    text = repr(value[:_SHOWN_CHARS] if isinstance(value, str | list) else value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
