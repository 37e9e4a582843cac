"""Quantized layers read back from the files that were written, by the code that serves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoint.weight_files import WeightFiles
from engine.quant.formats import read_scheme
from engine.quant.weight import QuantizedWeight
from engine.quantize.source import Linear


class Stored:
    """The files of a folder, of a checkpoint with this `quantization_config`."""

    def __init__(self, folder: Path, quantization_config: Mapping[str, Any]) -> None:
        files = WeightFiles(folder)
        self.files = files.tensors
        self._scheme = read_scheme(quantization_config, files.metadata)

    def tensor(self, name: str) -> Tensor:
        return self.files[name].read()

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
