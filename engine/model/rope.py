"""Rotary embeddings whose frequencies depend on a text's length, row by row.

transformers chooses them for a whole batch, by its largest position. In a step whose rows belong to many texts each row
has those that transformers would have for its text alone. docs/decisions/0021-frequencies-by-length.md
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_KINDS = ("longrope", "dynamic")


class RowLengths:
    """Tokens of the text that each row of the step belongs to, for all rotary embeddings of one model."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # [T] int64; None: of each row those up to itself


def install_row_lengths(model: nn.Module) -> RowLengths:
    """From here on the model's rotary embeddings go by the lengths that are set in the result."""
    lengths = RowLengths()
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        named = kinds.values() if isinstance(kinds, dict) else (kinds,)
        if any(kind in _KINDS for kind in named) and hasattr(module, "config"):
            module.forward = MethodType(_forward_by(lengths, module), module)
    return lengths


def _forward_by(lengths: RowLengths, module: nn.Module) -> Any:
    original = inspect.unwrap(type(module).forward)  # without what chooses by the largest position

    @torch.no_grad()
    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
        kind = self.rope_type if layer_type is None else self.rope_type[layer_type]
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        if kind not in _KINDS:
            return original(self, x, position_ids, **kwargs)
        tokens = position_ids[0] + 1 if lengths.tokens is None else lengths.tokens
        name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        kept = getattr(self, name)
        setattr(self, name, _frequencies(self, kind, tokens, layer_type))  # [T, D / 2], as [1, T, 1] of positions needs
        try:
            return original(self, x, position_ids, **kwargs)
        finally:
            setattr(self, name, kept)

    return forward


def _frequencies(module: Any, kind: str, tokens: Tensor, layer_type: str | None) -> Tensor:
    """Shapes: tokens [T]; returns float32 [T, D / 2]."""
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    if kind == "dynamic":
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, tokens.device, seq_len=tokens[:, None], **kwargs)
        return frequencies
    parameters = module.config.rope_parameters
    limit = (parameters if layer_type is None else parameters[layer_type])["original_max_position_embeddings"]
    prefix = "" if layer_type is None else f"{layer_type}_"
    long = getattr(module, f"{prefix}long_inv_freq", None)
    if long is None:
        long, _ = ROPE_INIT_FUNCTIONS[kind](module.config, tokens.device, seq_len=limit + 1, **kwargs)
        setattr(module, f"{prefix}long_inv_freq", long)
    short = getattr(module, f"{prefix}original_inv_freq").to(tokens.device)
    return torch.where(tokens[:, None] > limit, long.to(tokens.device), short)
