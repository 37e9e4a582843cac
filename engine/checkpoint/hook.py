"""How quantized layers get into the model that transformers builds: as one of its quantizers, registered here.

transformers gives it the model on the meta device, before any weight is read, and each parameter it asks for when the
parameter is complete. As a quantizer of 16-bit checkpoints (`pre_quantized` is False) it also keeps transformers from
reading ahead in threads, which would hold more of the checkpoint in memory than is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.checkpoint.free_memory import FreeMemory
from engine.checkpoint.placing import finish

_NAME = "chorus"


class Swap(Protocol):
    """What puts quantized layers in."""

    def before(self, model: nn.Module, memory: FreeMemory) -> None:
        """The model is on the meta device, its weights are not read yet."""
        ...

    def bytes_of(self, parameter: str) -> float | None:
        """Bytes per element that are kept of a parameter which `take` wants; None: transformers loads it as usual."""
        ...

    def take(self, model: nn.Module, parameter: str, value: Tensor) -> set[str]:
        """Put what becomes of a parameter into the model. Returns: the parameters that are no longer needed."""
        ...


@register_quantization_config(_NAME)
class SwapConfig(QuantizationConfigMixin):
    """Carries a `Swap` through `from_pretrained`."""

    def __init__(self, swap: Swap) -> None:
        self.quant_method = _NAME
        self.swap = swap
        self.memory = FreeMemory()

    def __deepcopy__(self, memo: dict[int, Any]) -> SwapConfig:
        return self  # transformers copies the model's config, with this in it

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": _NAME}


@register_quantizer(_NAME)
class SwapQuantizer(HfQuantizer):
    """Lets a `Swap` do its work, and leaves no trace in the model."""

    quantization_config: SwapConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        with _usual_defaults():
            config.swap.before(model, config.memory)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.remove_quantization_config(model)
        finish(model)
        self.quantization_config.memory.give_back()
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return self.quantization_config.swap.bytes_of(param_name) is not None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        num_bytes = self.quantization_config.swap.bytes_of(param_name)
        return param.element_size() if num_bytes is None else num_bytes

    def get_quantize_ops(self) -> ConversionOps:
        return _Take(self.quantization_config)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """While transformers builds a model, tensors are made on the meta device and in the model's dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


class _Take(ConversionOps):
    def __init__(self, config: SwapConfig) -> None:
        self._swap, self._memory = config.swap, config.memory

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str], **_: Any) -> dict[str, Any]:
        """Returns: the parameters that are still needed."""
        left = {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            tensor = value[0] if isinstance(value, list) else value
            gone = set() if self._swap.bytes_of(name) is None else self._swap.take(model, name, tensor)
            if name not in gone:
                left[name] = tensor
            missing_keys -= gone
            self._memory.read(tensor.numel() * tensor.element_size())
            del value, tensor
        return left
