"""How codes lie in files: compressed-tensors for int8, int8-dynamic, int4 and fp8, bitsandbytes for NF4, GPTQ's own.

Sources: compressed-tensors' formats pack-quantized, int-quantized and float-quantized (its `compressors`), which vLLM
documents as W4A16, W8A16, W8A8 and FP8 W8A8; bitsandbytes' `QuantState.as_dict(packed=True)`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quant.weight import NF4_VALUES, Activations, Kind, QuantizedWeight, unpack_nibbles

NF4_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a method does to every weight. `format`: compressed-tensors' name, None for bitsandbytes."""

    kind: Kind
    bits: int
    format: str | None
    activations: Activations | None = None


ROUNDINGS = {
    "int8": Rounding("int8", 8, "pack-quantized"),
    "int8-dynamic": Rounding("int8", 8, "int-quantized", "int8"),
    "int4": Rounding("int4", 4, "pack-quantized"),
    "nf4": Rounding("nf4", 4, None),
    "fp8": Rounding("fp8", 8, "float-quantized", "fp8"),
}


def pack(weight: QuantizedWeight, rounding: Rounding, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a layer, by what follows its name. `dtype`: of its scales and of the model they belong to."""
    if rounding.format is None:
        return _pack_nf4(weight, dtype)
    scales = weight.scales.to(dtype)
    if rounding.format != "pack-quantized":
        return {"weight": weight.codes, "weight_scale": scales}
    shape = torch.tensor([weight.out_features, weight.in_features])
    return {"weight_packed": _words(weight), "weight_scale": scales, "weight_shape": shape}


def describe(rounding: Rounding, group_size: int | None, kept: Collection[str], dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of config.json. `kept`: linear layers that stay as they were; `dtype`: the model's."""
    if rounding.format is None:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": _name(dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": sorted(kept),
        }
    number = "float" if rounding.kind == "fp8" else "int"
    weights = _arguments(rounding.bits, number, "group" if group_size else "channel", group_size, dynamic=False)
    inputs = _arguments(8, number, "token", None, dynamic=True) if rounding.activations else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": rounding.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": sorted(kept),
        "kv_cache_scheme": None,
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _arguments(bits: int, number: str, strategy: str, group_size: int | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": number,
        "symmetric": True,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }


def _words(weight: QuantizedWeight) -> Tensor:
    """Codes as numbers from 0 on, the first in the lowest bits of an int32. Shapes: -> int32 [out, in * bits / 32]."""
    # Those of int4 are two to a byte already, in the same order.
    codes = (weight.codes.to(torch.int16) + 128).to(torch.uint8) if weight.kind == "int8" else weight.codes
    padding = -codes.shape[1] % 4
    return torch.nn.functional.pad(codes, (0, padding)).contiguous().view(torch.int32)


def _pack_nf4(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """bitsandbytes has the even column in the high half of a byte, and the weight as one long column of bytes."""
    state = {
        "quant_type": "nf4",
        "blocksize": NF4_BLOCK,
        "dtype": _name(dtype),
        "shape": [weight.out_features, weight.in_features],
    }
    return {
        "weight": ((weight.codes << 4) | (weight.codes >> 4)).view(-1, 1),
        "weight.absmax": weight.scales.reshape(-1),
        "weight.quant_map": torch.tensor(NF4_VALUES),
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def pack_gptq(weight: QuantizedWeight, bits: int) -> dict[str, Tensor]:
    """A layer's tensors in GPTQ's layout, its first version (which stores zeros less one).

    Shapes: qweight int32 [in * bits / 32, out], qzeros int32 [groups, out * bits / 32], scales float16 [groups, out],
    g_idx int32 [in]; the first of the numbers that share a word is in its lowest bits.
    """
    half, groups = 1 << (bits - 1), weight.scales.shape[1]
    codes = unpack_nibbles(weight.codes).to(torch.int32) if bits == 4 else weight.codes.to(torch.int32) + half
    g_idx = torch.arange(weight.in_features) // weight.group_size
    if weight.order is not None:
        codes[:, weight.order] = codes.clone()
        g_idx[weight.order] = g_idx.clone()
    zeros = torch.full((weight.out_features, groups), half, dtype=torch.int32)
    if weight.zeros is not None:
        zeros += weight.zeros
    return {
        "qweight": _gptq_words(codes.t(), bits, dim=0),
        "qzeros": _gptq_words((zeros - 1).t() & (2 * half - 1), bits, dim=1),
        "scales": weight.scales.t().half(),
        "g_idx": g_idx.to(torch.int32),
    }


def _gptq_words(values: Tensor, bits: int, dim: int) -> Tensor:
    """Neighbours along `dim` in one int32."""
    per_word = 32 // bits
    parts = values.unflatten(dim, (-1, per_word)).movedim(dim + 1, -1)
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    return (parts.to(torch.int32) << shifts).sum(dim=-1, dtype=torch.int32)
