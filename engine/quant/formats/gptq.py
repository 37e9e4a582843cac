"""GPTQ, in 4 and 8 bits, as AutoGPTQ, gptqmodel and optimum write it.

    w[n, k] = scales[g, n] * (qweight[k, n] - zero[g, n])        g = g_idx[k]

One word of qweight holds 8 (or 4) inputs of one output, one of qzeros as many outputs of one group, the first in the
lowest bits. Format "gptq" stores zero - 1, subtracted from whole words, "gptq_v2" stores zero.
Source: gptqmodel 7.6.0, gptqmodel/utils/model.py, convert_gptq_v1_to_v2_format_module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.quant.formats.bits import bytes_of, permute_columns, signed, sorted_groups, zeros_or_none
from engine.quant.formats.fields import MAKING, Fields, check_patterns, refuse_module
from engine.quant.scheme import SCALE_DTYPES, TensorSpec
from engine.quant.weight import QuantizedWeight, unpack_nibbles

_LAYOUTS = ("gptq", "gptq_v2")
_LITERAL = re.compile(r"(?:[^\\.^$*+?{}\[\]()|]|\\[^a-zA-Z0-9])*")  # a whole name, no regular expression


@dataclass(frozen=True, slots=True)
class _Packing:
    """How one layer is stored: the config's numbers, or those of a rule of `dynamic`."""

    bits: int
    group_size: int  # -1: one group
    desc_act: bool  # inputs are in an order of their own, which only g_idx tells


@dataclass(frozen=True, slots=True)
class GptqScheme:
    """Whether a layer is quantized is up to the files, but for those that a rule of `dynamic` leaves out."""

    packing: _Packing
    rules: tuple[tuple[str, _Packing | None], ...]  # regular expressions, the first that matches; None: in 16 bits
    minus_one: bool  # zeros are stored less one
    carries: bool  # a zero of 0, less one, borrowed from its neighbour in the word
    name: str = "gptq"

    def is_quantized(self, module: str, present: Collection[str]) -> bool:
        held = any(suffix in present for suffix in ("qweight", "qzeros", "scales", "g_idx"))
        return held and self._packing(module) is not None

    def tensors(
        self, module: str, in_features: int, out_features: int, present: Collection[str]
    ) -> dict[str, TensorSpec]:
        packing = self._packing(module) or self.packing
        per_word = 32 // packing.bits
        if in_features % per_word or out_features % per_word:
            refuse_module(
                module, f"{in_features} inputs and {out_features} outputs are not both multiples of {per_word}"
            )
        size = in_features if packing.group_size == -1 else packing.group_size
        groups = math.ceil(in_features / size)
        return {
            "qweight": TensorSpec((torch.int32,), ((in_features // per_word, out_features),)),
            "qzeros": TensorSpec((torch.int32,), ((groups, out_features // per_word),)),
            "scales": TensorSpec(SCALE_DTYPES, ((groups, out_features),)),
            "g_idx": TensorSpec((torch.int32,), ((in_features,),), optional=not packing.desc_act or groups == 1),
        }

    def read(self, module: str, in_features: int, out_features: int, tensors: Mapping[str, Tensor]) -> QuantizedWeight:
        packing = self._packing(module) or self.packing
        nibbles = packing.bits == 4
        codes = bytes_of(tensors["qweight"].t())  # a word's bytes are inputs in turn, as in `QuantizedWeight`
        zeros = self._zeros(module, tensors["qzeros"], nibbles)
        scales = tensors["scales"].t().float()
        group_of, order = sorted_groups(f"{module}.g_idx", self._groups(packing, in_features, tensors), scales.shape[1])
        if order is not None:
            codes = permute_columns(codes, order, nibbles=nibbles)
        return QuantizedWeight(
            kind="int4" if nibbles else "int8",
            codes=codes if nibbles else signed(codes),
            scales=scales[:, group_of].contiguous(),
            zeros=zeros_or_none(zeros[:, group_of]),
            order=order,
        )

    def _packing(self, module: str) -> _Packing | None:
        return next((packing for rule, packing in self.rules if re.match(rule, module)), self.packing)

    @staticmethod
    def _groups(packing: _Packing, in_features: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """Which group each input is in. Shapes: [in]."""
        if "g_idx" in tensors:
            return tensors["g_idx"]
        return torch.arange(in_features) // (in_features if packing.group_size == -1 else packing.group_size)

    def _zeros(self, module: str, words: Tensor, nibbles: bool) -> Tensor:
        """In units of codes of `QuantizedWeight`. Shapes: int32 [groups, out * bits / 32] -> int16 [out, groups]."""
        if self.minus_one:
            if not self.carries:
                self._check_no_wrap(module, words, nibbles)
            words = words + (0x11111111 if nibbles else 0x01010101)
        packed = bytes_of(words)
        zeros = unpack_nibbles(packed) if nibbles else packed
        return zeros.t().to(torch.int16) - (8 if nibbles else 128)

    def _check_no_wrap(self, module: str, words: Tensor, nibbles: bool) -> None:
        packed = bytes_of(words)
        stored = unpack_nibbles(packed) if nibbles else packed
        if bool((stored == (15 if nibbles else 255)).any()):
            refuse_module(
                f"{module}.qzeros",
                "a zero point of 0 is stored as -1, which older writers let spill over its neighbours (sym=False, "
                "checkpoint_format='gptq'); quantize again with gptqmodel, or in 'gptq_v2'",
            )


def read_gptq(config: Mapping[str, Any], metadata: Mapping[str, str]) -> GptqScheme:
    fields = Fields(config)
    meta = fields.take("meta", {})
    written_by = str(meta.get("quantizer")) if isinstance(meta, Mapping) else ""
    # The files say which layers are quantized, lm_head too.
    fields.pass_over("quant_method", "lm_head", "backend", "modules_to_not_convert", *MAKING)
    packing = _packing_of(fields)
    symmetric = fields.flag("sym", True)
    named = fields.take("format")
    layout = fields.choice("checkpoint_format", _LAYOUTS, named or "gptq")
    if named not in (None, layout):
        fields.refuse("format", named, f"with checkpoint_format={layout!r}; served: {', '.join(_LAYOUTS)}")
    fields.choice("method", ("gptq",), "gptq")
    fields.choice("pack_dtype", ("int32",), "int32")
    fields.choice("data_type", ("int",), "int")
    fields.choice("is_marlin_format", (False,), False)
    rules = _rules(fields.part("dynamic"), packing)
    fields.end()
    return GptqScheme(
        packing=packing, rules=rules, minus_one=layout == "gptq", carries=symmetric or "gptqmodel" in written_by
    )


def _packing_of(fields: Fields, default: _Packing | None = None) -> _Packing:
    bits = fields.choice("bits", (4, 8), default and default.bits)
    size = fields.size("group_size", default and default.group_size)
    return _Packing(bits, size, fields.flag("desc_act", default is not None and default.desc_act))


def _rules(dynamic: Fields | None, default: _Packing) -> tuple[tuple[str, _Packing | None], ...]:
    """gptqmodel's rules: a regular expression that a name must start with, "-:" before it if the layer is left out.

    Source: gptqmodel 7.6.0, gptqmodel/quantization/config.py, _get_dynamic_patterns.
    """
    rules: list[tuple[str, _Packing | None]] = []
    for key, value in dynamic.take_all().items() if dynamic else ():
        fields = Fields(value or {}, f"quantization_config.dynamic.{key}")
        pattern = key.removeprefix("+:").removeprefix("-:")
        check_patterns(fields, key, (pattern,))
        if _LITERAL.fullmatch(pattern):
            pattern += "$"
        if key.startswith("-:"):
            rules.append((pattern, None))
            continue
        fields.pass_over("sym", "mse", *MAKING)
        rules.append((pattern, _packing_of(fields, default)))
        fields.end()
    return tuple(rules)
