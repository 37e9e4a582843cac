"""torchao: int8 and float8 weights, with inputs rounded or not, as transformers saves them in safetensors.

    w[n, k] = scale[n / rows, k / columns] * (qdata[n, k] - zero_point[n / rows, k / columns])

A layer's weight is tensors _weight_qdata, _weight_scale and so on. What they are is in the `__metadata__` of the
header, under the weight's name. Source: torchao 0.18.0, prototype/safetensors/safetensors_support.py.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ModelNotSupported
from engine.quant.formats.bits import spread_blocks, zeros_or_none
from engine.quant.formats.fields import Fields, refuse_module
from engine.quant.scheme import SCALE_DTYPES, TensorSpec
from engine.quant.weight import Activations, QuantizedWeight

_CONFIGS = (
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
    "FqnToConfig",  # a config per layer: the header says which
)
_PLAIN = "Tensor"


@dataclass(frozen=True, slots=True)
class _Described:
    """What the header says of one weight."""

    is_float: bool
    block: tuple[int, int]  # outputs and inputs that share a scale
    tensors: tuple[str, ...]
    activations: Activations | None


@dataclass(frozen=True, slots=True)
class TorchaoScheme:
    """What is quantized is in the header; the config repeats how it came about."""

    weights: Mapping[str, _Described]  # by module
    name: str = "torchao"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        return module in self.weights or any(suffix.startswith("_weight_") for suffix in present)

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        weight = self._described(module)
        rows, columns = weight.block
        if in_features % columns or out_features % rows:
            refuse_module(module, f"blocks of {weight.block} do not divide its {out_features} x {in_features} weight")
        scales = ((out_features // rows, in_features // columns),)
        dtype = torch.float8_e4m3fn if weight.is_float else torch.int8
        specs = {
            "_weight_qdata": TensorSpec((dtype,), ((out_features, in_features),)),
            "_weight_scale": TensorSpec(SCALE_DTYPES, scales),
        }
        if "zero_point" in weight.tensors:
            specs["_weight_zero_point"] = TensorSpec((torch.int8,), scales)
        return specs

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        weight = self._described(module)
        zeros = tensors.get("_weight_zero_point")
        if zeros is not None:
            zeros = zeros_or_none(spread_blocks(zeros, weight.block[0], out_features))
        return QuantizedWeight(
            kind="fp8" if weight.is_float else "int8",
            codes=tensors["_weight_qdata"],
            scales=spread_blocks(tensors["_weight_scale"].float(), weight.block[0], out_features),
            zeros=zeros,
            activations=weight.activations,
        )

    def _described(self, module: str) -> _Described:
        if module not in self.weights:
            refuse_module(f"{module}._weight_qdata", "the files' headers do not say what it is")
        return self.weights[module]


def read_torchao(config: Mapping[str, Any], metadata: Mapping[str, str]) -> TorchaoScheme:
    fields = Fields(config)
    # Layers left out have no entry in the header; and without embeddings in it there was none to untie.
    fields.pass_over("quant_method", "modules_to_not_convert", "untie_embedding_weights")
    fields.choice("include_input_output_embeddings", (False,), False)
    kinds = fields.part("quant_type")
    made_by = None if kinds is None else kinds.part("default")
    if made_by is None:
        fields.refuse("quant_type", config.get("quant_type"), f"served: {', '.join(_CONFIGS)}")
    made_by.choice("_type", _CONFIGS)
    fields.end()
    weights = {}
    for name, text in metadata.items():
        described = _description(name, text)
        if described is not None:
            weights[name.removesuffix(".weight")] = described
    if not weights:
        raise ModelNotSupported(
            "torchao: no header of the files describes a quantized weight; save the model with transformers 5"
        )
    return TorchaoScheme(weights)


def _description(name: str, text: str) -> _Described | None:
    """None for what is no weight, or is stored as it was."""
    try:
        value = json.loads(text)
    except ValueError:
        return None  # "format": "pt", and whatever else headers hold
    if not isinstance(value, dict) or value.get("_type", _PLAIN) == _PLAIN:
        return None
    fields = Fields(value, name)
    kind = fields.choice("_type", ("Int8Tensor", "Float8Tensor"))
    if not name.endswith(".weight"):
        refuse_module(name, f"a {value['_type']} that is no linear layer's weight")
    is_float = kind == "Float8Tensor"
    names = fields.strings("_tensor_data_names")
    served = ("qdata", "scale") if is_float else ("qdata", "scale", "zero_point")
    data = fields.part("_data")
    fields.end()
    if data is None or not {"qdata", "scale"} <= set(names) <= set(served):
        refuse_module(name, f"its tensors are {list(names)}; served: {list(served)}")
    block = data.take("block_size")
    if not isinstance(block, list) or [type(size) for size in block] != [int, int] or min(block) < 1:
        data.refuse("block_size", block, "served: two sizes, of outputs and of inputs")
    activations = _activations(data.part("act_quant_kwargs"), is_float)
    # How its kernels run, the type before, and that int8 codes use a part of their range only.
    data.pass_over("mm_config", "kernel_preference", "dtype", "reduce_range")
    data.end()
    return _Described(is_float, (block[0], block[1]), names, activations)


def _activations(kwargs: Fields | None, is_float: bool) -> Activations | None:
    """Inputs are rounded row by row, evenly on both sides of 0; nothing else is served."""
    if kwargs is None:
        return None
    kwargs.choice("_type", ("QuantizeTensorToFloat8Kwargs" if is_float else "QuantizeTensorToInt8Kwargs",))
    data = kwargs.part("_data")
    granularity = None if data is None else data.part("granularity")
    kwargs.end()
    if data is None or granularity is None:
        kwargs.refuse("granularity", None, "served: PerRow")
    granularity.choice("_type", ("PerRow",))
    Fields(granularity.take("_data", {"dim": -1}), granularity.where).choice("dim", (-1,), -1)
    if is_float:
        _check_enum(data, "float8_dtype", "float8_e4m3fn")
        data.pass_over("mm_config", "kernel_preference")
    else:
        _check_enum(data, "mapping_type", "SYMMETRIC")
        data.choice("reduce_range", (False,), False)
    data.end()
    return "fp8" if is_float else "int8"


def _check_enum(fields: Fields, key: str, served: str) -> None:
    value = fields.take(key)
    if not isinstance(value, dict) or value.get("_data") != served:
        fields.refuse(key, value, f"served: {served}")
