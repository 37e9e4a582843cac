"""How long a text a model's rotary embeddings were made for, and where their frequencies depend on its length.

By config.json as transformers reads it (`modeling_rope_utils.py`): one set of parameters, or one per type of layer.
docs/decisions/0021-frequencies-by-length.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_STRETCHED = ("linear", "dynamic", "proportional")  # `factor` times max_position_embeddings
_EXTENDED = ("yarn", "longrope")  # `factor` times the original length, where that is more


@dataclass(frozen=True, slots=True)
class LengthRule:
    """Texts of more than `original_tokens` have other frequencies.

    `is_one_switch`: one other set for all of them (longrope), so that a text which grows beyond is computed again. Else
    they change with every token (dynamic), and what is computed stays, as in transformers' own generation.
    """

    original_tokens: int
    is_one_switch: bool


def rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """One set, or one per type of layer."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def max_rope_tokens(text_config: Any) -> int | None:
    """The longest text that all layers can place; None: the config does not say."""
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        return None
    return min(_scaled(rope, int(positions)) for rope in rope_parameters(text_config))


def _scaled(rope: dict[str, Any], positions: int) -> int:
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if not isinstance(factor, int | float) or factor <= 1:
        return positions
    if kind in _STRETCHED:
        return int(factor * positions)
    if kind in _EXTENDED:
        return max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))
    return positions  # llama3: the config names the scaled length


def length_rule(text_config: Any, max_model_len: int) -> LengthRule | None:
    """None: no text of at most so many tokens has other frequencies than a short one."""
    originals = set()
    kinds = set()
    for rope in rope_parameters(text_config):
        kind = rope.get("rope_type")
        if kind in ("longrope", "dynamic"):
            positions = int(text_config.max_position_embeddings)
            original = positions if kind == "dynamic" else rope.get("original_max_position_embeddings") or positions
            originals.add(int(original))
            kinds.add(kind)
    if not originals or min(originals) >= max_model_len:
        return None
    return LengthRule(min(originals), is_one_switch=kinds == {"longrope"} and len(originals) == 1)
