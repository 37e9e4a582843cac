"""AWQ in the layout that AutoAWQ calls GEMM, which gptqmodel writes too.

    w[n, k] = scales[g, n] * (qweight[k, n] - qzeros[g, n])        g = k / group_size

One word holds eight outputs of one input; its nibbles, from the lowest, are outputs 0 2 4 6 1 3 5 7.
Source: AutoAWQ 0.2.9, awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quant.formats.bits import bytes_of, zeros_or_none
from engine.quant.formats.fields import MAKING, Fields, check_patterns, is_skipped, refuse_module
from engine.quant.scheme import SCALE_DTYPES, TensorSpec
from engine.quant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class AwqScheme:
    """Whether a layer is quantized is up to the files: lists of modules say "gate" for a router, not for gate_proj."""

    group_size: int  # -1: one group
    skipped: tuple[str, ...]
    name: str = "awq"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        held = any(suffix in present for suffix in ("qweight", "qzeros", "scales"))
        return held and not is_skipped(module, self.skipped)

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        size = in_features if self.group_size == -1 else self.group_size
        if in_features % size or in_features % 2:
            refuse_module(module, f"its {in_features} inputs are odd, or no multiple of group_size={size}")
        if out_features % 8:
            refuse_module(module, f"AWQ packs outputs by eights, and it has {out_features}")
        words, groups = out_features // 8, in_features // size
        return {
            "qweight": TensorSpec((torch.int32,), ((in_features, words),)),
            "qzeros": TensorSpec((torch.int32,), ((groups, words),)),
            "scales": TensorSpec(SCALE_DTYPES, ((groups, out_features),)),
        }

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        packed = bytes_of(tensors["qweight"])
        even, odd = packed[0::2], packed[1::2]
        codes = _outputs_first((even & 15) | (odd << 4), (even >> 4) | (odd & 0xF0))
        packed = bytes_of(tensors["qzeros"])
        zeros = _outputs_first(packed & 15, packed >> 4).to(torch.int16) - 8
        scales = tensors["scales"].t().float().contiguous()
        return QuantizedWeight(kind="int4", codes=codes, scales=scales, zeros=zeros_or_none(zeros))


def _outputs_first(low: Tensor, high: Tensor) -> Tensor:
    """What the low and the high halves of bytes hold, put in the order of outputs.

    The low halves of a word's bytes are outputs 0 4 1 5, the high ones 2 6 3 7: output 4 b + 2 h + i is in half h of
    byte 2 i + b. Shapes: uint8 [rows, out / 2] twice -> uint8 [out, rows], contiguous.
    """
    rows, num_bytes = low.shape
    ordered = low.new_empty((num_bytes // 4, 2, 2, 2, rows))  # words, b, h, i, rows
    for h, half in enumerate((low, high)):
        ordered[:, :, h] = half.t().contiguous().view(-1, 2, 2, rows).transpose(1, 2)
    return ordered.view(2 * num_bytes, rows)


def read_awq(config: Mapping[str, Any], metadata: Mapping[str, str]) -> AwqScheme:
    fields = Fields(config)
    fields.pass_over("quant_method", "zero_point", "sym", "lm_head", *MAKING)  # zero points are in the files either way
    fields.choice("bits", (4,), fields.take("w_bit"))
    size = fields.size("group_size", fields.take("q_group_size", 128))
    for key in ("version", "format", "checkpoint_format"):
        fields.choice(key, ("gemm",), "gemm")
    fields.choice("method", ("awq",), "awq")
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.choice("desc_act", (False,), False)
    if fields.take("backend") == "llm-awq":
        fields.refuse("backend", "llm-awq", "its layout is another; served: the GEMM layout of AutoAWQ")
    skipped = fields.strings("modules_to_not_convert")
    check_patterns(fields, "modules_to_not_convert", skipped)
    fields.end()
    return AwqScheme(group_size=size, skipped=skipped)
