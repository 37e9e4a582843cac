"""Methods that look at weights alone: every tensor is read, rounded if it is a layer's weight, and written."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.errors import ConfigError
from engine.quant.rounding import DEFAULT_GROUP_SIZES, MIN_GROUP_SIZE, quantize
from engine.quantize.layouts import NF4_BLOCK, ROUNDINGS, describe, pack
from engine.quantize.options import Options
from engine.quantize.source import Linear, Source
from engine.quantize.work import Work


def group_size_of(source: Source, options: Options) -> int | None:
    """Inputs that share a scale, the same in all layers; None: all inputs of an output channel.

    Raises: ConfigError naming the layer whose inputs it does not divide.
    """
    if options.method == "nf4":
        return _checked(source, NF4_BLOCK, "nf4 has blocks of 64; use int4 with a smaller --group-size, or int8")
    if options.method not in ("awq", "gptq", "int4"):
        return None
    if options.group_size is not None:
        return _checked(source, options.group_size, "give a --group-size that divides the inputs of every layer")
    size = DEFAULT_GROUP_SIZES["int4"]
    while size > MIN_GROUP_SIZE and any(layer.in_features % size for layer in source.layers.values()):
        size //= 2
    return _checked(source, size, "give a smaller --group-size, or use int8")


def _checked(source: Source, group_size: int, remedy: str) -> int:
    for layer in source.layers.values():
        if layer.in_features % group_size:
            raise ConfigError(
                f"group_size={group_size} does not divide the {layer.in_features} inputs of {layer.name}; {remedy}"
            )
        if layer.in_features % 2:
            raise ConfigError(f"{layer.name} has {layer.in_features} inputs, an odd number: use int8")
    return group_size


def configuration(source: Source, options: Options, group_size: int | None) -> dict[str, Any]:
    """The `quantization_config` of what `run` writes."""
    dtype = next(iter(source.layers.values())).dtype
    return describe(ROUNDINGS[options.method], group_size, source.kept, dtype)


def run(source: Source, options: Options, group_size: int | None, work: Work) -> None:
    """Write every unit that is not done yet."""
    by_tensor = {layer.stored_as: layer for layer in source.layers.values()}
    units = source.units().values()
    for unit, names in enumerate(tqdm(units, desc=options.method, unit="layer")):
        if unit in work.done:
            continue
        tensors: dict[str, Tensor] = {}
        for name in names:
            weight = source.tensor(name)
            layer = by_tensor.get(name)
            if layer is not None:
                tensors |= _rounded(weight, layer, options, group_size)
            if layer is None or layer.name + ".weight" != name:  # a tied head leaves the embedding as it is
                tensors[name] = weight
        work.finish_unit(unit, tensors)


def _rounded(weight: Tensor, layer: Linear, options: Options, group_size: int | None) -> dict[str, Tensor]:
    rounding = ROUNDINGS[options.method]
    quantized = quantize(
        weight.to(options.device),
        rounding.kind,
        group_size,
        rounding.activations,
        scale_dtype=torch.float32 if rounding.format is None else layer.dtype,
    )
    packed = pack(quantized.to(torch.device("cpu")), rounding, layer.dtype)
    return {f"{layer.name}.{suffix}": tensor for suffix, tensor in packed.items()}
