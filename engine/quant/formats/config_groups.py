"""The part of a compressed-tensors config that says which layers are quantized, and how: config_groups.

Source: compressed-tensors 0.19.0, quantization/quant_scheme.py, quantization/quant_args.py and utils/match.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.quant.formats.fields import Fields, check_patterns
from engine.quant.weight import Activations, Kind

_OF_OBSERVERS = ("observer", "observer_kwargs", "zp_dtype")  # how scales were found; files hold the scales
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_GROUPWISE: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
_PER_CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True}
_PER_TOKEN = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
_W8A8 = {"weights": {**_PER_CHANNEL, "type": "int"}, "input_activations": {**_PER_TOKEN, "type": "int"}}
_PRESETS: dict[str, dict[str, Any]] = {  # a group may be a name with a list of targets
    "W4A16": {"weights": _GROUPWISE},
    "W4A16_ASYM": {"weights": {**_GROUPWISE, "symmetric": False}},
    "W8A16": {"weights": {**_GROUPWISE, "num_bits": 8}},
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "FP8_DYNAMIC": {"weights": {**_PER_CHANNEL, "type": "float"}, "input_activations": {**_PER_TOKEN, "type": "float"}},
}


@dataclass(frozen=True, slots=True)
class Group:
    """One entry of config_groups: its layers and how they are stored."""

    targets: tuple[str, ...]
    kind: Kind
    packed: bool
    symmetric: bool
    block: tuple[int, int]  # outputs and inputs that share a scale; -1: all of them
    reordered: bool  # every input names its group in weight_g_idx
    activations: Activations | None


def matches(module: str, target: str) -> bool:
    """Whether an entry of targets or ignore means a linear layer: its name, "re:" with an expression, or its class."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, "Linear")


def by_precedence(targets: Iterable[str]) -> list[str]:
    """A layer belongs to its most special target: names before expressions before classes."""
    return sorted(targets, key=lambda target: (target == "Linear", "re:" in target, target))


def check_names(fields: Fields, key: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names. Raises: ModelNotSupported for an "re:" entry that is no regular expression."""
    check_patterns(fields, key, [name.removeprefix("re:") for name in names if name.startswith("re:")])
    return names


def read_groups(fields: Fields, layout: str) -> tuple[Group, ...]:
    groups = []
    for key, value in fields.take_all().items():
        preset = isinstance(value, list)
        if preset and key.upper() not in _PRESETS:
            fields.refuse(key, value, f"presets served: {', '.join(_PRESETS)}")
        group = {**_PRESETS[key.upper()], "targets": value} if preset else value
        groups.append(_read_group(Fields(group, f"{fields.where}.{key}"), layout))
    return tuple(groups)


def _read_group(fields: Fields, layout: str) -> Group:
    layout = fields.choice("format", _FORMATS, layout)
    targets = check_names(fields, "targets", fields.strings("targets"))
    for target in targets:
        if target[:1].isupper() and target != "Linear":
            fields.refuse("targets", target, "served: 'Linear', names of layers, and 're:' expressions")
    weights, inputs = fields.part("weights"), fields.part("input_activations")
    if weights is None:
        fields.refuse("weights", None, "only groups with quantized weights are served")
    fields.choice("output_activations", (None,))
    fields.end()
    return _read_weights(weights, targets, layout, None if inputs is None else _read_inputs(inputs))


def _read_weights(fields: Fields, targets: tuple[str, ...], layout: str, activations: Activations | None) -> Group:
    packed = layout == "pack-quantized"
    number = fields.choice("type", ("int",) if packed or layout == "int-quantized" else ("int", "float"), "int")
    if layout == "float-quantized" and number != "float":
        fields.refuse("type", number, "in format='float-quantized' it is 'float'")
    bits = fields.choice("num_bits", (4, 8) if packed else (8,), 8)
    kind: Kind = "fp8" if number == "float" else "int4" if bits == 4 else "int8"
    if activations not in (None, kind):
        fields.refuse("num_bits", bits, f"weights of {bits} bits ({number}) with input_activations in {activations}")
    fields.choice("dynamic", (False,), False)
    symmetric = fields.flag("symmetric", True)
    if kind == "fp8" and not symmetric:
        fields.refuse("symmetric", False, "float8 weights with zero points")
    order = fields.choice("actorder", (None, False, "weight", "static", "group", "dynamic"))
    fields.choice("scale_dtype", (None, "torch.float16", "torch.bfloat16", "torch.float32"))
    fields.pass_over(*_OF_OBSERVERS)
    block = _read_block(fields)
    fields.end()
    return Group(targets, kind, packed, symmetric, block, order in ("group", "dynamic"), activations)


def _read_block(fields: Fields) -> tuple[int, int]:
    size = fields.take("group_size")
    strategy = fields.take("strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    shape = fields.take("block_structure")
    if strategy == "group" and type(size) is int and size > 0:
        return (1, size)
    if strategy == "block" and isinstance(shape, list) and [type(n) for n in shape] == [int, int] and min(shape) > 0:
        return (shape[0], shape[1])
    if strategy in ("tensor", "channel") and size in (None, -1) and shape is None:
        return (-1, -1) if strategy == "tensor" else (1, -1)
    fields.refuse("strategy", strategy, f"with group_size={size} and block_structure={shape}")


def _read_inputs(fields: Fields) -> Activations:
    """Rounded as they come, each row (token) by its own scale; scales that were measured beforehand are not served."""
    fields.choice("dynamic", (True,), False)
    number = fields.choice("type", ("int", "float"), "int")
    fields.choice("num_bits", (8,), 8)
    fields.choice("strategy", ("token",), "tensor")
    fields.choice("symmetric", (True,), True)
    for key in ("group_size", "block_structure", "actorder"):
        fields.choice(key, (None, False))
    fields.choice("scale_dtype", (None, "torch.float16", "torch.bfloat16", "torch.float32"))
    fields.pass_over(*_OF_OBSERVERS)
    fields.end()
    return "int8" if number == "int" else "fp8"
