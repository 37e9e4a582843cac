"""What formats of quantized checkpoints have in common: which tensors a layer has in its file, and what they mean."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.quant.weight import QuantizedWeight

Shape = tuple[int | None, ...]
"""Of a tensor in a file; None: any length."""

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What one tensor of a quantized layer must look like, to be checked against the header of its file."""

    dtypes: tuple[torch.dtype, ...]
    shapes: tuple[Shape, ...]  # any of them
    optional: bool = False

    def fits_shape(self, shape: tuple[int, ...]) -> bool:
        return any(
            len(allowed) == len(shape) and all(a in (None, n) for a, n in zip(allowed, shape, strict=True))
            for allowed in self.shapes
        )


class Scheme(Protocol):
    """One checkpoint's format, as its `quantization_config` describes it.

    `module` is a linear layer's name as in the checkpoint (an expert's too: "..experts.0.w1"). A suffix is the rest of
    a tensor's name: module + "." + suffix. `present` are the suffixes that the files hold for the module.
    A bias is no part of a scheme: it is stored as it would be without one, whoever loads the model reads it.
    """

    @property
    def name(self) -> str:
        """As in quantization_config["quant_method"]."""
        ...

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        """By the config's own rules; where they leave it open (most do for lm_head), by what the files hold."""
        ...

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        """What the files must hold for a quantized layer, by suffix; what is not named here must not be there.

        Raises: ModelNotSupported if a layer of this size cannot be stored like this; the message names the module.
        """
        ...

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        """The layer's weight from its tensors (by suffix), which `tensors` accepted by their headers.

        It may share the memory of those tensors that it keeps as they are.
        Raises: ModelNotSupported if their contents cannot be kept exactly; the message names the tensor.
        """
        ...
