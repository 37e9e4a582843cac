"""bitsandbytes: NF4, its scales rounded once more or not, and LLM.int8().

NF4: w = NF4_VALUES[code] * absmax, row by row, `blocksize` values to a scale. A byte's high half comes first.
Rounded scales: absmax = nested_quant_map[absmax] * nested_absmax[i / nested_blocksize] + nested_offset.
INT8: w[n, k] = weight[n, k] * SCB[n] / 127. LLM.int8() rounds inputs too, but for outliers; here all stay as they are.
Source: bitsandbytes 0.50.2, functional.py (QuantState, dequantize_4bit) and nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quant.formats.bits import bytes_of
from engine.quant.formats.fields import Fields, check_patterns, is_skipped, refuse_module
from engine.quant.scheme import TensorSpec
from engine.quant.weight import NF4_VALUES, QuantizedWeight

_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STORAGES = {"uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STATE = "weight.quant_state.bitsandbytes__nf4"
_INT8_SUFFIXES = ("SCB", "weight_format")


@dataclass(frozen=True, slots=True)
class Nf4Scheme:
    skipped: tuple[str, ...]
    nested: bool  # scales are rounded once more
    storage: torch.dtype  # what the bytes of codes are stored as
    name: str = "bitsandbytes"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        held = any(suffix.startswith("weight.") for suffix in present)
        return held and not is_skipped(module, self.skipped)

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        num_bytes, item = in_features * out_features // 2, self.storage.itemsize
        if in_features % 2 or num_bytes % item:
            refuse_module(module, f"its {in_features} inputs are odd, or no multiple of what is stored as one value")
        blocks = tuple((-(-2 * num_bytes // size),) for size in _BLOCK_SIZES)
        specs = {
            "weight": TensorSpec((self.storage,), ((num_bytes // item, 1), (1, num_bytes // item))),
            "weight.absmax": TensorSpec((torch.uint8 if self.nested else torch.float32,), blocks),
            "weight.quant_map": TensorSpec((torch.float32,), ((16,),)),
            _STATE: TensorSpec((torch.uint8,), ((None,),)),
        }
        if self.nested:
            specs["weight.nested_absmax"] = TensorSpec((torch.float32,), ((None,),))
            specs["weight.nested_quant_map"] = TensorSpec((torch.float32,), ((256,),))
        return specs

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        state = _read_state(module, tensors[_STATE])
        if state.take("shape") != [out_features, in_features]:
            refuse_module(f"{module}.{_STATE}", f"its shape is not the model's {[out_features, in_features]}")
        if not torch.equal(tensors["weight.quant_map"], torch.tensor(NF4_VALUES)):
            refuse_module(f"{module}.weight.quant_map", "its values are not those of NF4")
        size = state.choice("blocksize", _BLOCK_SIZES)
        absmax = tensors["weight.absmax"]
        if absmax.numel() != -(-in_features * out_features // size):
            refuse_module(f"{module}.weight.absmax", f"{absmax.numel()} scales for blocks of {size}")
        if self.nested:
            absmax = _nested(module, state, absmax, tensors)
        state.end()
        packed = bytes_of(tensors["weight"].view(-1)).view(out_features, in_features // 2)
        return QuantizedWeight(
            kind="nf4",
            codes=(packed << 4) | (packed >> 4),
            scales=_runs(absmax, size, in_features, out_features),
        )


def _read_state(module: str, packed: Tensor) -> Fields:
    try:
        values = json.loads(bytes(packed.tolist()))
    except ValueError as error:
        refuse_module(f"{module}.{_STATE}", f"it is no JSON: {error}")
    state = Fields(values, f"{module}.{_STATE}")
    state.choice("quant_type", ("nf4",))
    state.pass_over("dtype")  # of the weight before
    return state


def _nested(module: str, state: Fields, absmax: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Scales from their own codes, in float32 as bitsandbytes does."""
    size, offset = state.size("nested_blocksize"), state.take("nested_offset")
    state.choice("nested_dtype", ("float32",))
    scales = tensors["weight.nested_absmax"]
    if not isinstance(offset, float) or size < 0 or scales.numel() != -(-absmax.numel() // size):
        refuse_module(f"{module}.weight.nested_absmax", f"{scales.numel()} scales for blocks of {size} and {offset}")
    blocks = torch.arange(absmax.numel()) // size
    return tensors["weight.nested_quant_map"][absmax.long()] * scales[blocks] + offset


def _runs(absmax: Tensor, size: int, in_features: int, out_features: int) -> Tensor:
    """Scales by row. A block may begin in one row and end in the next: then runs of the largest size that divides both.

    Shapes: [out * in / size] -> [out, runs], contiguous.
    """
    run = math.gcd(size, in_features)
    starts = torch.arange(0, in_features * out_features, run)
    return absmax[starts // size].view(out_features, in_features // run).float()


@dataclass(frozen=True, slots=True)
class Int8Scheme:
    skipped: tuple[str, ...]
    name: str = "bitsandbytes"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        return any(suffix in present for suffix in _INT8_SUFFIXES) and not is_skipped(module, self.skipped)

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        return {
            "weight": TensorSpec((torch.int8,), ((out_features, in_features),)),
            "SCB": TensorSpec((torch.float32,), ((out_features,),)),
            "weight_format": TensorSpec((torch.uint8,), ((),), optional=True),
        }

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
            refuse_module(f"{module}.weight_format", "only weights row by row (0) are served, no layouts of GPUs")
        return QuantizedWeight(kind="int8", codes=tensors["weight"], scales=(tensors["SCB"] / 127)[:, None])


def read_bitsandbytes(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Nf4Scheme | Int8Scheme:
    fields = Fields(config)
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    fields.pass_over("quant_method", "_load_in_4bit", "_load_in_8bit")
    # Where bitsandbytes computes and in what, and which inputs of LLM.int8() it rounds.
    fields.pass_over("bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_enable_fp32_cpu_offload")
    skipped = fields.strings("llm_int8_skip_modules")
    check_patterns(fields, "llm_int8_skip_modules", skipped)
    fields.choice("llm_int8_has_fp16_weight", (False,), False)
    kind, nested = fields.take("bnb_4bit_quant_type", "fp4"), fields.flag("bnb_4bit_use_double_quant")
    storage = fields.choice("bnb_4bit_quant_storage", _STORAGES, "uint8")
    fields.end()
    if four == eight:
        fields.refuse("load_in_4bit", four, f"with load_in_8bit={eight}; one of them is true")
    if eight:
        return Int8Scheme(skipped)
    if kind != "nf4":
        fields.refuse("bnb_4bit_quant_type", kind, "served: 'nf4'")
    return Nf4Scheme(skipped, nested, _STORAGES[storage])
