"""compressed-tensors, as llm-compressor writes it: integers of 4 and 8 bits and float8, packed or not.

    w[n, k] = weight_scale[n, g] * (code[n, k] - weight_zero_point[n, g])        g = k / group_size, or g_idx[k]

pack-quantized: codes + 2^(bits - 1), from the lowest bits of a word on, along inputs; zero points so along outputs.
int-quantized, float-quantized, naive-quantized: int8 or float8_e4m3fn as it is.
Source: compressed-tensors 0.19.0, compressors/pack_quantized, compressors/naive_quantized and utils/match.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quant.formats.bits import (
    bytes_of,
    permute_columns,
    signed,
    sorted_groups,
    spread_blocks,
    zeros_or_none,
)  # fmt: skip
from engine.quant.formats.config_groups import Group, by_precedence, check_names, matches, read_groups
from engine.quant.formats.fields import Fields, refuse_module
from engine.quant.scheme import SCALE_DTYPES, Shape, TensorSpec
from engine.quant.weight import QuantizedWeight, unpack_nibbles

_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")


@dataclass(frozen=True, slots=True)
class CompressedTensorsScheme:
    groups: tuple[Group, ...]
    ignored: tuple[str, ...]
    name: str = "compressed-tensors"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        """As the config says; but a head that shares the embedding's weight has no tensors, and so no codes."""
        if not present or any(matches(module, name) for name in self.ignored):
            return False
        return self._group(module) is not None

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        group = self._group(module) or self.groups[0]
        rows, columns = _block(group, in_features, out_features)
        if in_features % columns or (group.kind == "int4" and in_features % 2):
            refuse_module(module, f"its {in_features} inputs are odd, or no multiple of the group size {columns}")
        scales = (-(-out_features // rows), in_features // columns)
        shapes: tuple[Shape, ...] = (scales, scales[:1], ())[: 3 if scales == (1, 1) else 2 if scales[1] == 1 else 1]
        specs = {"weight_scale": TensorSpec(SCALE_DTYPES, shapes)}
        if group.reordered:
            specs["weight_g_idx"] = TensorSpec((torch.int32, torch.int64), ((in_features,),))
        if group.packed:
            per_word = 8 if group.kind == "int4" else 4
            specs["weight_packed"] = TensorSpec((torch.int32,), ((out_features, -(-in_features // per_word)),))
            specs["weight_shape"] = TensorSpec((torch.int64, torch.int32), ((2,),))
            words = (-(-out_features // per_word), scales[1])
            packed_zeros = TensorSpec((torch.int32, torch.int8), (words, *shapes), group.symmetric)
            return {**specs, "weight_zero_point": packed_zeros}
        dtype = torch.float8_e4m3fn if group.kind == "fp8" else torch.int8
        specs["weight"] = TensorSpec((dtype,), ((out_features, in_features),))
        if group.kind == "int8":
            specs["weight_zero_point"] = TensorSpec((torch.int8,), shapes, group.symmetric)
        return specs

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        group = self._group(module) or self.groups[0]
        rows, columns = _block(group, in_features, out_features)
        codes = _packed_codes(module, in_features, out_features, group, tensors) if group.packed else tensors["weight"]
        scales = tensors["weight_scale"].float().view(-(-out_features // rows), in_features // columns)
        zeros = _zeros(module, out_features, group, tensors, scales.shape)
        order = None
        if group.reordered:
            name = f"{module}.weight_g_idx"
            group_of, order = sorted_groups(name, tensors["weight_g_idx"], scales.shape[1])
            scales, zeros = scales[:, group_of], None if zeros is None else zeros[:, group_of]
        if order is not None:
            codes = permute_columns(codes, order, nibbles=group.kind == "int4")
        return QuantizedWeight(
            kind=group.kind,
            codes=codes,
            scales=spread_blocks(scales, rows, out_features),
            zeros=None if zeros is None else zeros_or_none(spread_blocks(zeros, rows, out_features)),
            order=order,
            activations=group.activations,
        )

    def _group(self, module: str) -> Group | None:
        of_target = {target: group for group in reversed(self.groups) for target in group.targets}
        return next((of_target[t] for t in by_precedence(of_target) if matches(module, t)), None)


def _block(group: Group, in_features: int, out_features: int) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    rows, columns = group.block
    return (out_features if rows == -1 else rows, in_features if columns == -1 else columns)


def _packed_codes(
    module: str, in_features: int, out_features: int, group: Group, tensors: Mapping[str, Tensor]
) -> Tensor:
    """Words hold inputs in turn, from their lowest bits: our own layout, but for what fills the last word."""
    if tensors["weight_shape"].tolist() != [out_features, in_features]:
        shape = tensors["weight_shape"].tolist()
        refuse_module(f"{module}.weight_shape", f"it says {shape}, the model {[out_features, in_features]}")
    packed = bytes_of(tensors["weight_packed"])
    if group.kind == "int4":
        return packed[:, : in_features // 2].contiguous()
    return signed(packed[:, :in_features])


def _zeros(
    module: str, out_features: int, group: Group, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> Tensor | None:
    """In units of codes, one per scale. Packed ones are along outputs: [out / 8, groups] words hold [out, groups]."""
    stored = tensors.get("weight_zero_point")
    if stored is None:
        return None
    if stored.dtype != torch.int32:
        if stored.numel() != shape[0] * shape[1]:
            refuse_module(f"{module}.weight_zero_point", f"{list(stored.shape)} in int8 for scales of {list(shape)}")
        return stored.view(shape)
    nibbles = group.kind == "int4"
    packed = bytes_of(stored.t())
    codes = unpack_nibbles(packed) if nibbles else packed
    if shape[0] != out_features or codes.shape[1] < out_features or codes.shape[1] >= out_features + 8:
        refuse_module(f"{module}.weight_zero_point", f"{list(stored.shape)} words for scales of {list(shape)}")
    return codes[:, :out_features].t().to(torch.int16) - (8 if nibbles else 128)


def read_compressed_tensors(config: Mapping[str, Any], metadata: Mapping[str, str]) -> CompressedTensorsScheme:
    fields = Fields(config)
    fields.pass_over("quant_method", "version", "global_compression_ratio", "run_compressed", "dequantize")
    fields.pass_over("use_optimized_inference")
    fields.choice("quantization_status", ("compressed", "frozen"))
    layout = fields.choice("format", _LAYOUTS)
    for key in ("kv_cache_scheme", "transform_config"):
        part = fields.part(key)
        if part is not None:
            fields.refuse(key, config[key], "only weights, and activations rounded as they come, are served")
    sparsity = fields.part("sparsity_config")
    if sparsity is not None:
        sparsity.choice("format", ("dense",), "dense")
    groups = fields.part("config_groups")
    if groups is None:
        fields.refuse("config_groups", None, "it says which layers are quantized")
    ignored = check_names(fields, "ignore", fields.strings("ignore"))
    fields.end()
    return CompressedTensorsScheme(read_groups(groups, layout), ignored)
