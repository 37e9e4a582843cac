"""Models that are quantized while they are read: each weight is rounded when transformers has it complete."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.checkpoint.free_memory import FreeMemory
from engine.checkpoint.names import check_experts, holds_experts, is_router, linear_shape
from engine.checkpoint.placing import embed_scale, replace_embedding, replace_experts, replace_linear
from engine.config import Quantization
from engine.errors import ConfigError
from engine.quant.experts import ExpertWeights
from engine.quant.rounding import bytes_per_weight, can_round, quantize, round_weight
from engine.quant.weight import QuantizedWeight

logger = logging.getLogger(__name__)

_MIN_FEATURES = 32  # there is nothing to gain in a smaller layer


class RoundedQuantization:
    """The `Swap` of a 16-bit checkpoint."""

    def __init__(
        self, method: Quantization, *, lm_head: bool, embeddings: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._method: Quantization = method
        self._with_head, self._with_embeddings = lm_head, embeddings
        self._dtype, self._device = dtype, device
        self._linears: dict[str, str] = {}  # parameter -> module
        self._experts: dict[str, str] = {}
        self._halves: dict[str, dict[str, list[QuantizedWeight]]] = {}  # of experts: until both parameters were there
        self._embedding: str | None = None  # parameter, if something is made of it
        self._tied_head: str | None = None  # module that is quantized from the embedding's parameter

    def before(self, model: Any, memory: FreeMemory) -> None:
        """Choose the layers. Raises: ConfigError, ModelNotSupported for settings that this model cannot have."""
        left: list[str] = []
        for name, module in model.named_modules():
            if holds_experts(module):
                self._choose_experts(name, module, left)
            elif linear_shape(module) is not None and (self._with_head or module is not model.get_output_embeddings()):
                self._choose_linear(name, module, left)
        self._choose_embedding(model)
        if left:
            logger.warning("%d layers stay in 16 bits: %s; their inputs are no multiple of 32", len(left), left[0])

    def bytes_of(self, parameter: str) -> float | None:
        if parameter in self._linears or parameter in self._experts:
            return bytes_per_weight(self._method)
        if parameter == self._embedding:
            return 1.0 if self._with_embeddings else float(self._dtype.itemsize)
        return None

    def take(self, model: nn.Module, parameter: str, value: Tensor) -> set[str]:
        if parameter in self._experts:
            self._take_experts(model, parameter, value)
            return {parameter}
        if parameter in self._linears:
            name = self._linears[parameter]
            if name == self._tied_head:
                self._tied_head = None  # the file has both, and transformers takes each for its own
            transposed = isinstance(model.get_submodule(name), Conv1D)
            replace_linear(model, name, self._round(value.t() if transposed else value))
            return {parameter}
        gone = set()
        if self._tied_head is not None:
            replace_linear(model, self._tied_head, self._round(value))
            gone.add(f"{self._tied_head}.weight")
        if self._with_embeddings:
            weight = quantize(value, "int8").to(self._device)
            replace_embedding(model, parameter.removesuffix(".weight"), weight, self._dtype)
            gone.add(parameter)
        return gone

    def _choose_linear(self, name: str, module: nn.Module, left: list[str]) -> None:
        shape = linear_shape(module)
        if shape is None or is_router(name) or min(shape) < _MIN_FEATURES:
            return
        if can_round(self._method, shape[0]):
            self._linears[f"{name}.weight"] = name
        else:
            left.append(name)

    def _choose_experts(self, name: str, module: Any, left: list[str]) -> None:
        check_experts(name, module)
        if all(can_round(self._method, weight.shape[-1]) for weight in (module.gate_up_proj, module.down_proj)):
            self._experts |= {f"{name}.gate_up_proj": name, f"{name}.down_proj": name}
        else:
            left.append(name)

    def _choose_embedding(self, model: Any) -> None:
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        names = {module: name for name, module in model.named_modules()}
        parameter = f"{names[embeddings]}.weight"
        is_tied = head is not None and model.all_tied_weights_keys.get(f"{names[head]}.weight") == parameter
        if self._with_embeddings:
            embed_scale(names[embeddings], embeddings)
            if is_tied and not self._with_head:
                raise ConfigError(
                    "quantize_embeddings=True without quantize_lm_head saves nothing here: the output layer has the "
                    "same weights and would keep them in 16 bits; set both"
                )
        if is_tied and f"{names[head]}.weight" in self._linears:
            self._tied_head = names[head]
        if self._with_embeddings or self._tied_head is not None:
            self._embedding = parameter

    def _take_experts(self, model: nn.Module, parameter: str, value: Tensor) -> None:
        name = self._experts[parameter]
        halves = self._halves.setdefault(name, {})
        if parameter.endswith(".down_proj"):
            halves["down"] = [self._round(matrix) for matrix in value]
        else:
            middle = value.shape[1] // 2
            halves["gate"] = [self._round(matrix[:middle]) for matrix in value]
            halves["up"] = [self._round(matrix[middle:]) for matrix in value]
        if len(halves) == 3:
            weights = zip(halves["gate"], halves["up"], halves["down"], strict=True)
            replace_experts(model, name, [ExpertWeights(*matrices) for matrices in weights])
            del self._halves[name]

    def _round(self, weight: Tensor) -> QuantizedWeight:
        return round_weight(weight.contiguous(), self._method).to(self._device)
