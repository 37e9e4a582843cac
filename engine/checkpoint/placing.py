"""Quantized layers in the place of those that transformers built, biases and all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import ModelNotSupported
from engine.quant.embedding import QuantEmbedding
from engine.quant.experts import ExpertWeights, QuantExperts
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight


def replace_linear(model: Any, name: str, weight: QuantizedWeight) -> None:
    """The bias stays the parameter that it was, read or not. A weight tied to another is no longer."""
    layer = QuantLinear(weight)
    layer.bias = model.get_submodule(name).bias
    layer.weight = _initialized()
    _put(model, name, layer)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def _initialized() -> Tensor:
    """What transformers may find where a weight was, while it draws numbers for weights that the files lack."""
    tensor: Any = torch.empty(0)
    tensor._is_hf_initialized = True
    return tensor


def finish(model: nn.Module) -> None:
    """Once transformers is done with the model: nothing is left where weights were."""
    for module in model.modules():
        if isinstance(module, QuantLinear) and "weight" in vars(module):
            del module.weight


def replace_experts(model: Any, name: str, weights: Sequence[ExpertWeights]) -> None:
    _put(model, name, QuantExperts(weights, model.get_submodule(name).act_fn))


def replace_embedding(model: Any, name: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    _put(model, name, QuantEmbedding(weight, dtype, embed_scale(name, model.get_submodule(name))))


def embed_scale(name: str, embedding: nn.Module) -> float | None:
    """What an embedding multiplies its rows by. Raises: ModelNotSupported if it does anything else with them."""
    if type(embedding) is nn.Embedding:
        return None
    # Where both are there, embed_scale is a buffer that has no value before the weights are read.
    for attribute in ("scalar_embed_scale", "embed_scale"):
        value = getattr(embedding, attribute, None)
        if isinstance(embedding, nn.Embedding) and isinstance(value, int | float):
            return float(value)
    raise ModelNotSupported(
        f"quantize_embeddings: {name} ({type(embedding).__name__}) is no plain lookup; leave the setting at False"
    )


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
