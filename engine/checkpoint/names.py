"""Where in the model a layer of the checkpoint belongs, by the renamings that transformers itself applies at load."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.integrations import moe
from transformers.pytorch_utils import Conv1D

from engine.errors import ModelNotSupported

ExpertPart = Literal["gate", "up", "down"]
# llm-compressor and gptqmodel name the parts of Mixtral's experts as others call theirs, not as its checkpoints do.
_MIXTRALS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT_INDEX = re.compile(r"\.(\d+)\.[^.]+$")
# Few weights that decide a lot: which experts a row goes to, and how much of a shared one.
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate", "wg"})


@dataclass(frozen=True, slots=True)
class Place:
    """A linear layer of the model: a module, or one of the matrices of an expert."""

    module: str  # of an expert: the module that holds all experts of its layer
    in_features: int
    out_features: int
    expert: int | None = None
    part: ExpertPart | None = None


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """in_features and out_features of a linear layer, and nothing of other modules."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape  # stored transposed
        return int(in_features), int(out_features)
    if type(module) is nn.Linear:  # what is derived from it computes something else
        return module.in_features, module.out_features
    return None


def is_router(name: str) -> bool:
    """Whether a linear layer of this name chooses among experts, and so is never rounded."""
    return name.rpartition(".")[2] in _ROUTERS


def holds_experts(module: nn.Module) -> bool:
    """Whether this is one of transformers' modules with the weights of all experts of a layer in two parameters."""
    names = ("gate_up_proj", "up_proj", "down_proj")
    return any(getattr(getattr(module, name, None), "ndim", 0) == 3 for name in names)


def check_experts(name: str, module: nn.Module) -> None:
    """Raises: ModelNotSupported if they compute anything but down(act(gate(x)) * up(x))."""
    wanted = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    wrong = [key for key, value in wanted.items() if getattr(module, key, None) is not value]
    wrong += ["has_post_expert_norm"] if getattr(module, "has_post_expert_norm", False) else []
    if getattr(type(module), "_apply_gate", None) is not moe._default_apply_gate:
        wrong.append("_apply_gate")
    if not wrong and not hasattr(module, "act_fn"):
        wrong.append("act_fn")
    if wrong:
        raise ModelNotSupported(
            f"{name} ({type(module).__name__}): experts of this kind ({', '.join(wrong)}) are not served with "
            "quantized weights; serve the model without quantization"
        )


class CheckpointNames:
    """Names of a checkpoint, and what they are in one model. Answers are remembered."""

    def __init__(self, skeleton: Any) -> None:
        """`skeleton`: the model as transformers builds it; it may be on the meta device."""
        mapping = get_model_conversion_mapping(skeleton)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._prefix = skeleton.base_model_prefix
        self.parameters = skeleton.state_dict()
        self._modules = dict(skeleton.named_modules())
        self._places: dict[str, Place | None] = {}
        self.reasons: dict[str, str] = {}  # why what looked like a layer has no place

    def targets(self, key: str) -> list[str]:
        """The parameters that a tensor becomes, or becomes a part of."""
        renamed, pattern = self._rename(key)
        if pattern is None:
            return [renamed]
        names = self._converter(pattern).target_patterns
        return [renamed.replace(names[0], name) for name in names]

    def is_converted(self, key: str) -> bool:
        """Whether a parameter is made of the tensor, not just named by it."""
        return self._rename(key)[1] is not None

    def place(self, layer: str) -> Place | None:
        """Where a layer of the checkpoint belongs; None if it is none of the model's linear layers, as it is there."""
        if layer not in self._places:
            try:
                self._places[layer] = self._find(layer)
            except ModelNotSupported as error:
                self._places[layer], self.reasons[layer] = None, str(error)
        return self._places[layer]

    def _rename(self, key: str) -> tuple[str, str | None]:
        """Also: the pattern of the converter that the tensor goes through."""
        renamed, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self.parameters)
        if renamed not in self.parameters and key in self.parameters:
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self.parameters)
        return renamed, pattern

    def _converter(self, pattern: str) -> WeightConverter:
        return next(converter for converter in self._converters if pattern in converter.source_patterns)

    def _find(self, layer: str) -> Place | None:
        target, pattern = self._rename(f"{layer}.weight")
        parent, _, part = layer.rpartition(".")
        if target not in self.parameters and ".experts." in parent and part in _MIXTRALS:
            target, pattern = self._rename(f"{parent}.{_MIXTRALS[part]}.weight")
        if target not in self.parameters:
            return None
        if pattern is not None:
            return self._find_expert(layer, target, pattern)
        name = target.removesuffix(".weight")
        shape = linear_shape(self._modules[name]) if name in self._modules else None
        return None if shape is None else Place(name, *shape)

    def _find_expert(self, layer: str, target: str, pattern: str) -> Place:
        converter = self._converter(pattern)
        operations = [type(operation) for operation in converter.operations]
        name, _, parameter = target.rpartition(".")
        index = _EXPERT_INDEX.search(layer)
        if parameter == "gate_up_proj" and operations == [MergeModulelist, Concatenate] and index:
            part: ExpertPart = "gate" if pattern == converter.source_patterns[0] else "up"
        elif parameter == "down_proj" and operations == [MergeModulelist] and index:
            part = "down"
        else:
            made_by = ", ".join(operation.__name__ for operation in operations)
            raise ModelNotSupported(f"transformers makes {target} of it ({made_by}), which codes cannot follow")
        check_experts(name, self._modules[name])
        _, rows, columns = self.parameters[target].shape
        return Place(name, columns, rows if part == "down" else rows // 2, int(index[1]), part)
