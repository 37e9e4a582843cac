"""Reads adapter_config.json: which modules carry LoRA, of which rank and scaling, as PEFT would put it on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from adapter_store.errors import AdapterRejected
from adapter_store.image.config_fields import check_fields, shown
from adapter_store.image.patterns import Question, first_matches, first_numbers, suffixes
from adapter_store.image.strict_json import load_object

MAX_CONFIG_BYTES = 1 << 20
MAX_NAMES = 20_000  # in a list of modules
ALL_LINEAR = "all-linear"
OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "output", "head", "score"})


class ModuleLora(NamedTuple):
    """What the configuration says of one module."""

    rank: int
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """The honoured part of adapter_config.json, checked. `notices` tell what was accepted and has no effect."""

    raw: dict[str, Any]
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    ensure_weight_tying: bool
    notices: tuple[str, ...]

    def modules(self, kinds: Mapping[str, str]) -> dict[str, ModuleLora]:
        """Of the modules `kinds` (name -> "linear" or "embedding"), those on which PEFT would put LoRA.

        Raises: AdapterRejected for a pattern that is none, or that takes too long to match.
        """
        names = self._targeted(kinds)
        ranks = self._values("rank_pattern", self.rank_pattern, names, self.rank)
        alphas = self._values("alpha_pattern", self.alpha_pattern, names, self.alpha)
        found = {}
        for name, rank, alpha in zip(names, ranks, alphas, strict=True):
            # alpha / sqrt(rank): rank-stabilized LoRA, arXiv 2312.03732
            found[name] = ModuleLora(rank, alpha / math.sqrt(rank) if self.use_rslora else alpha / rank)
        return found

    def unmatched_targets(self, names: Sequence[str]) -> list[str]:
        """Entries of the target_modules list that fit no module of the base."""
        if isinstance(self.target_modules, str):
            return []
        called = {suffix for name in names for suffix in suffixes(name)}
        return [entry for entry in self.target_modules if entry not in called]

    def _targeted(self, kinds: Mapping[str, str]) -> tuple[str, ...]:
        """Source: peft.tuners.tuners_utils.check_target_module_exists (0.21)."""
        names = tuple(kinds)
        excluded = self._meant("exclude_modules", self.exclude_modules, names)
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            meant = {name for name in names if kinds[name] == "linear" and not is_head(name)}
        else:
            meant = self._meant("target_modules", self.target_modules, names)
            if self.layers_to_transform is not None:
                # As in PEFT, a full name counts whatever layers_to_transform says.
                meant = self._in_layers(names, meant) | (meant & set(self.target_modules))
        return tuple(name for name in names if name in meant and name not in excluded)

    def _meant(self, field: str, entries: str | list[str], names: tuple[str, ...]) -> set[str]:
        """PEFT's rule: a string is a regular expression for the whole name, an entry of a list a name or its end."""
        if not entries:
            return set()
        if isinstance(entries, str):
            found = first_matches(Question(field, "whole", (entries,)), names)
            return {name for name, position in zip(names, found, strict=True) if position >= 0}
        wanted = set(entries)
        return {name for name in names if not wanted.isdisjoint(suffixes(name))}

    def _in_layers(self, names: tuple[str, ...], meant: set[str]) -> set[str]:
        assert self.layers_to_transform is not None
        if self.layers_pattern:
            layers = first_matches(Question("layers_pattern", "layer", self.layers_pattern), names)
        else:
            layers = first_numbers(names)
        return {n for n, layer in zip(names, layers, strict=True) if layer in self.layers_to_transform and n in meant}

    def _values(self, field: str, patterns: dict[str, Any], names: tuple[str, ...], default: Any) -> list[Any]:
        if not patterns:
            return [default] * len(names)
        keys = tuple(patterns)
        found = first_matches(Question(field, "suffix", keys), names)
        return [
            patterns.get(name, default) if position < 0 else patterns[keys[position]]
            for name, position in zip(names, found, strict=True)
        ]


def is_head(name: str) -> bool:
    """Whether `name` is what models call their output layer."""
    return name.rsplit(".", 1)[-1] in OUTPUT_HEADS


def parse_config(data: bytes | memoryview, max_rank: int | None = None) -> LoraSettings:
    """Reads and checks adapter_config.json.

    Raises: AdapterRejected, naming the field.
    """
    raw = load_object(data, "adapter_config.json", MAX_CONFIG_BYTES)
    if "peft_type" not in raw and ("model_type" in raw or "architectures" in raw):
        raise AdapterRejected(
            "it is the configuration of a whole model, not of an adapter; serve that model as the base"
        )
    if raw.get("peft_type") != "LORA":
        raise AdapterRejected(f"peft_type is {shown(raw.get('peft_type'))}; only 'LORA' is served")
    notices = check_fields(raw)
    targets = _names(raw, "target_modules")
    if not targets:
        raise AdapterRejected("target_modules is empty; the configuration must name the modules that carry LoRA")
    layers = _layers(raw)
    if isinstance(targets, str) and layers is not None:
        raise AdapterRejected("layers_to_transform cannot go with a target_modules pattern; PEFT refuses it too")
    layers_pattern = _names(raw, "layers_pattern")
    if layers_pattern and layers is None:
        raise AdapterRejected("layers_pattern is set without layers_to_transform; PEFT refuses it too")
    return LoraSettings(
        raw=raw,
        rank=_rank(raw.get("r", 8), "r", max_rank),
        alpha=_number(raw.get("lora_alpha", 8), "lora_alpha"),
        use_rslora=_flag(raw, "use_rslora"),
        rank_pattern=_pattern(raw, "rank_pattern", lambda value, where: _rank(value, where, max_rank)),
        alpha_pattern=_pattern(raw, "alpha_pattern", _number),
        target_modules=targets,
        exclude_modules=_names(raw, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=(layers_pattern,) if isinstance(layers_pattern, str) else tuple(layers_pattern),
        ensure_weight_tying=_flag(raw, "ensure_weight_tying"),
        notices=notices,
    )


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise AdapterRejected(f"{name} is {shown(value)}; it must be true or false")
    return bool(value)


def _rank(value: Any, where: str, max_rank: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterRejected(f"{where} is {shown(value)}; a rank is a whole number of at least 1")
    if max_rank is not None and value > max_rank:
        raise AdapterRejected(
            f"{where} is {value}, the limit is max_rank={max_rank}; train a lower rank or raise the limit"
        )
    return value


def _number(value: Any, where: str) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e30:
        return float(value)
    raise AdapterRejected(f"{where} is {shown(value)}; it must be a finite number (at most 1e30)")


def _pattern(raw: dict[str, Any], name: str, check: Callable[[Any, str], Any]) -> dict[str, Any]:
    value = raw.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{name} is {shown(value)}; it must be an object")
    return {key: check(item, f"{name}[{shown(key)}]") for key, item in value.items()}


def _names(raw: dict[str, Any], name: str) -> str | list[str]:
    value = raw.get(name) or []
    if isinstance(value, list) and len(value) > MAX_NAMES:
        raise AdapterRejected(f"{name} has {len(value)} entries, the limit is {MAX_NAMES}; name modules by their ends")
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) and item for item in value)):
        return value
    raise AdapterRejected(f"{name} is {shown(value)}; it must be a string or a list of strings")


def _layers(raw: dict[str, Any]) -> frozenset[int] | None:
    value = raw.get("layers_to_transform")
    layers = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if layers is None or layers == []:
        return None  # PEFT takes an empty list for all layers
    if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise AdapterRejected(f"layers_to_transform is {shown(value)}; it must be a layer number or a list of them")
    return frozenset(layers)
