"""Adapters that must be refused, each made from a good one by one change."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def _bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes())) and None


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


def _tensors(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))


def _first(tensors: dict[str, Any]) -> str:
    return min(tensors)


def _nan(tensors: dict[str, Any]) -> None:
    changed = tensors[_first(tensors)].copy()
    changed[0, 0] = np.nan
    tensors[_first(tensors)] = changed


def _shape(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)] = np.ascontiguousarray(tensors[_first(tensors)][:, :-1])


def _unknown_target(tensors: dict[str, Any]) -> None:
    for name in list(tensors):
        if "q_proj" in name:
            tensors[name.replace("q_proj", "z_proj")] = tensors.pop(name)


BAD: dict[str, Callable[[Path], None]] = {
    "truncated": _bytes(lambda data: data[: len(data) // 2]),
    "magic": _bytes(lambda data: b"PK\x03\x04" + data[4:]),
    "pickled": _pickled,
    "rank-zero": _config(r=0, rank_pattern={}),
    "shape": _tensors(_shape),
    "unknown-target": _tensors(_unknown_target),
    "extra-tensor": _tensors(lambda tensors: tensors.update(stray=np.zeros(4, np.float32))),
    "nan": _tensors(_nan),
    "huge-header": _bytes(lambda data: (10 << 30).to_bytes(8, "little") + data[8:]),
}


def write_bad_adapters(good: Path, folder: Path) -> None:
    """One folder `bad-<kind>` per entry of `BAD`."""
    for kind, change in BAD.items():
        shutil.copytree(good, folder / f"bad-{kind}")
        change(folder / f"bad-{kind}")
