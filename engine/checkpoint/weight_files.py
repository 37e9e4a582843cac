"""The safetensors files of a checkpoint: all headers first, then tensors one at a time, into memory of their own.

Nothing is mapped: a tensor that was read and dropped leaves nothing behind, so what loading takes at its peak is what
was kept so far and one tensor.
Source: huggingface/safetensors, "Format": 8 bytes length of the header, the header in JSON, the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelNotSupported

_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor, as the header of its file describes it."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Raises: ModelNotSupported if the file has become shorter than its header said."""
        raw = torch.empty(self.num_bytes, dtype=torch.uint8)
        if self.num_bytes:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                self._fill(file, memoryview(raw.numpy()))
        return raw.view(self.dtype).view(self.shape)

    def __getitem__(self, _: Any) -> Tensor:
        """All of it, whatever is asked for: transformers reads the values of a state dict by `value[...]`."""
        return self.read()

    def _fill(self, file: Any, room: memoryview) -> None:
        while room:
            count = file.readinto(room)  # at most 2 GiB at once
            if not count:
                raise ModelNotSupported(f"{self.path} ends inside of {self.name}; copy the file anew")
            room = room[count:]


class WeightFiles:
    """What the headers of a folder's files say. `metadata` is what their writers noted down, of all files."""

    def __init__(self, folder: Path) -> None:
        """Raises: ModelNotSupported naming the file, and the tensor where one is at fault."""
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        for path in shard_paths(folder):
            tensors, metadata = _read_header(path)
            for name in tensors.keys() & self.tensors.keys():
                raise ModelNotSupported(f"{name} is in {self.tensors[name].path} and in {path}; keep one of the two")
            self.tensors |= tensors
            self.metadata |= metadata


def shard_paths(folder: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, else those of the index, in which others may lie too.

    Raises: ModelNotSupported if there is neither, or the index cannot be read or names a file that is not there.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelNotSupported(
            f"{folder} has no model.safetensors, and {index.name} cannot be read: {error}"
        ) from error
    missing = [name for name in names if not isinstance(name, str) or not (folder / name).is_file()]
    if missing:
        raise ModelNotSupported(f"{folder} lacks {missing[0]}, one of the {len(names)} files that {index.name} names")
    return [folder / name for name in names]


def _read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ModelNotSupported(f"{path} ({size} bytes) is no safetensors file, or ends inside of its header")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = {str(key): str(value) for key, value in header.pop("__metadata__", {}).items()}
        tensors = {name: _stored(name, path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelNotSupported(f"{path} has a header that is not that of a safetensors file: {error}") from error
    for tensor in tensors.values():
        if tensor.offset + tensor.num_bytes > size:
            raise ModelNotSupported(
                f"{path} is cut off: {tensor.name} ends at byte {tensor.offset + tensor.num_bytes}, the file at "
                f"{size}; copy it anew"
            )
    return tensors, metadata


def _stored(name: str, path: Path, entry: Any, data_offset: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ModelNotSupported(f"{name} in {path} is stored as {entry['dtype']}; served are {', '.join(_DTYPES)}")
    shape = tuple(int(length) for length in entry["shape"])
    tensor = StoredTensor(name, path, _DTYPES[entry["dtype"]], shape, data_offset + int(begin))
    if min((*shape, begin), default=0) < 0 or end - begin != tensor.num_bytes:
        raise ModelNotSupported(f"{name} in {path}: {end - begin} bytes are not {entry['dtype']} {list(shape)}")
    return tensor
