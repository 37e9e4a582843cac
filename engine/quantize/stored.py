"""Quantized layers read back from the files that were written, by the code that serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from engine.quant.formats import read_scheme
from engine.quant.weight import QuantizedWeight
from engine.quantize.source import Linear
from engine.quantize.work import header


class Stored:
    """The layers in some shards of a checkpoint with this `quantization_config`."""

    def __init__(self, shards: list[Path], quantization_config: Mapping[str, Any]) -> None:
        self._scheme = read_scheme(quantization_config, {})
        self._shards = {path: header(path) for path in shards}
        self.files = {name: path for path, names in self._shards.items() for name in names}
        self.nbytes = {name: size for names in self._shards.values() for name, size in names.items()}

    def tensor(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(name)

    def tensors_of(self, layer: Linear) -> list[str]:
        """The names of what the format stores for a layer; its bias is no part of that."""
        prefix = layer.name + "."
        present = {name.removeprefix(prefix) for name in self.files if name.startswith(prefix)} - {"bias"}
        wanted = self._scheme.tensors(layer.name, layer.in_features, layer.out_features, present)
        return [prefix + suffix for suffix in wanted if suffix in present]

    def weight(self, layer: Linear) -> QuantizedWeight:
        prefix = layer.name + "."
        tensors = {name.removeprefix(prefix): self.tensor(name) for name in self.tensors_of(layer)}
        return self._scheme.read(layer.name, layer.in_features, layer.out_features, tensors)
