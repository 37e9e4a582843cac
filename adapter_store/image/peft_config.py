"""Reads adapter_config.json: every field is honoured, harmless to serving, or refused by name. None is ignored.

Source: peft.LoraConfig 0.21, gone through field by field; a test compares the tables with the installed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from adapter_store.errors import AdapterRejected
from adapter_store.image.patterns import Matcher, in_list, layer_of, pattern_value
from adapter_store.image.strict_json import load_object

MAX_CONFIG_BYTES = 1 << 20
ALL_LINEAR = "all-linear"
OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "output", "head", "score"})

HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "bias",
        "init_lora_weights",
    }
)
# Fields that leave y = W x + scaling * B (A x) as it is once the adapter is trained.
HARMLESS: dict[str, str] = {
    "auto_mapping": "tells how to load the base",
    "peft_version": "informs",
    "base_model_name_or_path": "informs; the shapes of all tensors are checked against the base instead",
    "revision": "informs",
    "inference_mode": "freezes the weights",
    "lora_dropout": "acts in training only",
    "fan_in_fan_out": "tells how the base stores W; A and B are stored alike for Linear and Conv1D",
    "megatron_core": "is used with megatron_config only",
    "loftq_config": "is used by init_lora_weights='loftq' only, which is refused",
    "eva_config": "is used at initialization only",
    "corda_config": "is used by init_lora_weights='corda' only, which is refused",
    "lora_ga_config": "is used by init_lora_weights='lora_ga' only, which is refused",
    "qalora_group_size": "is used with use_qalora only",
    "runtime_config": "tells where PEFT computes",
}
# Fields that change what the adapter computes: refused when set.
REFUSED_WHEN_SET: dict[str, str] = {
    "modules_to_save": "full copies of base modules are not served; train LoRA on those modules instead",
    "trainable_token_indices": "changed embedding rows are not served; train LoRA on the embedding instead",
    "use_dora": "DoRA is not implemented; train with use_dora=False",
    "use_qalora": "QALoRA is not implemented; train with use_qalora=False",
    "lora_bias": "a bias on lora_B is not implemented; train with lora_bias=False",
    "layer_replication": "replicated layers need another base model; serve the expanded model as the base",
    "megatron_config": "Megatron's parallel layers are not implemented; export the adapter without it",
    "alora_invocation_tokens": "activated LoRA is not implemented; train a plain LoRA",
    "target_parameters": "LoRA on bare parameters (fused experts) is not implemented; target modules instead",
    "use_bdlora": "block-diagonal LoRA is not implemented; train a plain LoRA",
    "arrow_config": "Arrow routing is not implemented; serve its adapters one by one",
    "kasa_config": "KaSA truncates the base's weights; train a plain LoRA",
    "monteclora_config": "MonteCLoRA's sampling is not implemented; train a plain LoRA",
    "velora_config": "VeLoRA keeps buffers beside A and B; convert the adapter to a plain LoRA",
    "ensure_weight_tying": "adapters tied between embedding and head are not implemented; train them untied",
}
TASK_TYPES = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
# Initializations that leave the base alone; the others move a part of W into A and B, so that the adapter is right
# only on the base they changed.
INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(slots=True)
class LoraSettings:
    """The honoured part of adapter_config.json, checked; answers what PEFT would answer for a module name."""

    raw: dict[str, Any]
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    matcher: Matcher = field(default_factory=Matcher)

    def rank_of(self, name: str) -> int:
        """The rank PEFT gives the module `name`."""
        return int(pattern_value(self.matcher, "rank_pattern", self.rank_pattern, name, self.rank))

    def scaling_of(self, name: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv 2312.03732)."""
        alpha = float(pattern_value(self.matcher, "alpha_pattern", self.alpha_pattern, name, self.alpha))
        rank = self.rank_of(name)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, name: str, kind: str) -> bool:
        """Whether PEFT would put LoRA on the module `name`."""
        if isinstance(self.exclude_modules, str):
            if self.exclude_modules and self.matcher.fullmatch("exclude_modules", self.exclude_modules, name):
                return False
        elif in_list(self.exclude_modules, name):
            return False
        if isinstance(self.target_modules, str):
            if self.target_modules.lower() == ALL_LINEAR:
                return kind == "linear" and name.rsplit(".", 1)[-1] not in OUTPUT_HEADS
            return self.matcher.fullmatch("target_modules", self.target_modules, name)
        if name in self.target_modules:
            return True  # as in PEFT, a full name counts whatever layers_to_transform says
        if not in_list(self.target_modules, name):
            return False
        if self.layers_to_transform is None:
            return True
        layer = layer_of(self.matcher, self.layers_pattern, name)
        return layer is not None and layer in self.layers_to_transform

    def unmatched_targets(self, names: list[str]) -> list[str]:
        """Entries of the target_modules list that fit no module of the base."""
        if isinstance(self.target_modules, str):
            return []
        return [entry for entry in self.target_modules if not any(in_list([entry], name) for name in names)]


def parse_config(data: bytes | memoryview, max_rank: int | None = None) -> LoraSettings:
    """Reads and checks adapter_config.json.

    Raises: AdapterRejected, naming the field.
    """
    raw = load_object(data, "adapter_config.json", MAX_CONFIG_BYTES)
    if raw.get("peft_type") != "LORA":
        raise AdapterRejected(f"peft_type is {raw.get('peft_type')!r}; only 'LORA' is served")
    _refuse_features(raw)
    targets = _names(raw, "target_modules")
    if not targets:
        raise AdapterRejected("target_modules is empty; the configuration must name the modules that carry LoRA")
    layers = _layers(raw)
    if isinstance(targets, str) and layers is not None:
        raise AdapterRejected("layers_to_transform cannot go with a target_modules pattern; PEFT refuses it too")
    layers_pattern = _names(raw, "layers_pattern")
    if layers_pattern and layers is None:
        raise AdapterRejected("layers_pattern is set without layers_to_transform; PEFT refuses it too")
    settings = LoraSettings(
        raw=raw,
        rank=_rank(raw.get("r", 8), "r", max_rank),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=_pattern(raw, "rank_pattern", lambda value, where: _rank(value, where, max_rank)),
        alpha_pattern=_pattern(raw, "alpha_pattern", _number),
        target_modules=targets,
        exclude_modules=_names(raw, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=[layers_pattern] if isinstance(layers_pattern, str) else layers_pattern,
    )
    return settings


def _refuse_features(raw: dict[str, Any]) -> None:
    for name, value in raw.items():
        if name in HONOURED or name in HARMLESS or not value:
            continue
        why = REFUSED_WHEN_SET.get(name, "this field is unknown here, so what it changes cannot be honoured")
        raise AdapterRejected(f"{name} is set to {_short(value)}: {why}")
    bias = raw.get("bias", "none")
    if bias != "none":
        raise AdapterRejected(f"bias is {_short(bias)}: trained biases are not implemented; train with bias='none'")
    if raw.get("task_type") not in TASK_TYPES:
        raise AdapterRejected(
            f"task_type is {_short(raw['task_type'])}: its head is not served; it must be one of {TASK_TYPES}"
        )
    init = raw.get("init_lora_weights", True)
    if not (init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in INITS)):
        raise AdapterRejected(
            f"init_lora_weights is {_short(init)}: it changes the base's weights, so the adapter is wrong on any other "
            "base; convert it to a plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or, "
            "when the served base is the changed one, set init_lora_weights to true"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterRejected(f"{name} is {_short(value)}; it must be true or false")
    return bool(value)


def _rank(value: Any, where: str, max_rank: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterRejected(f"{where} is {_short(value)}; a rank is a whole number of at least 1")
    if max_rank is not None and value > max_rank:
        raise AdapterRejected(
            f"{where} is {value}, the limit is max_rank={max_rank}; train a lower rank or raise the limit"
        )
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30:
        return float(value)
    raise AdapterRejected(f"{where} is {_short(value)}; it must be a finite number (at most 1e30)")


def _pattern(raw: dict[str, Any], name: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{name} is {_short(value)}; it must be an object")
    return {key: check(item, f"{name}[{key!r}]") for key, item in value.items()}


def _names(raw: dict[str, Any], name: str) -> str | list[str]:
    value = raw.get(name) or []
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        return value
    raise AdapterRejected(f"{name} is {_short(value)}; it must be a string or a list of strings")


def _layers(raw: dict[str, Any]) -> list[int] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if layers is None or layers == []:
        return None  # PEFT takes an empty list for all layers
    if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise AdapterRejected(f"layers_to_transform is {_short(value)}; it must be a layer number or a list of them")
    return layers
