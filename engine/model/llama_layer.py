"""A decoder layer of the Llama kind, taken apart: seven linear layers, norms, and a rotation of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine.kv.backend import LayerCall
from engine.quant.linear import QuantLinear

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


@dataclass(slots=True)
class Observed:
    """What one layer was given and gave in the trial run."""

    name: str
    hidden: Tensor
    arguments: Mapping[str, Any]
    output: Any
    call: LayerCall | None  # of its attention
    num_heads: int  # query heads


class Norm(NamedTuple):
    weight: Tensor
    eps: float


@dataclass(slots=True)
class LayerParts:
    """A layer of the Llama kind, taken apart, by the keys of LINEARS and NORMS."""

    call: LayerCall  # of its attention
    num_heads: int  # query heads
    rotary_dims: int  # of a head
    dtype: torch.dtype  # of all weights and of the hidden states
    linears: dict[str, nn.Linear | QuantLinear]
    sites: dict[str, int]  # of the linears
    norms: dict[str, Norm]  # those there are


def rotated_alike(a: Observed, b: Observed) -> bool:
    return a.arguments["position_embeddings"] is b.arguments["position_embeddings"]


def take_apart(observed: Observed, module: nn.Module, site_of: Mapping[str, int]) -> LayerParts | None:
    """None: it has other parts, or uses them otherwise, than a layer of the Llama kind."""
    call = observed.call
    if not isinstance(observed.output, Tensor) or observed.output.dtype is not observed.hidden.dtype:
        return None
    if {name for name, _ in module.named_children()} != _PARTS or call is None:
        return None
    if call.softcap is not None or call.sinks is not None or not _is_rotation(observed):
        return None
    known = {*LINEARS.values(), *NORMS.values()}
    leaves = {name for name, part in module.named_modules() if _holds_weights(part)}
    linears = {key: part_of(module, name) for key, name in LINEARS.items()}
    found = {key: part for key, name in NORMS.items() if (part := part_of(module, name)) is not None}
    norms = {key: norm for key, part in found.items() if (norm := _norm(part)) is not None}
    if len(norms) < len(found):
        return None
    if getattr(linears["k"], "out_features", 0) != getattr(linears["v"], "out_features", 0):
        return None  # values are narrower than keys
    if leaves - known or not all(type(linear) in (nn.Linear, QuantLinear) for linear in linears.values()):
        return None
    sites = {key: site_of.get(f"{observed.name}.{name}", -1) for key, name in LINEARS.items()}
    if "input_norm" not in norms or "post_norm" not in norms or min(sites.values()) < 0:
        return None
    dtype = observed.hidden.dtype
    if any(p.dtype is not dtype for p in module.parameters()):
        return None
    rotary_dims = observed.arguments["position_embeddings"][0].shape[-1]
    return LayerParts(call, observed.num_heads, rotary_dims, dtype, linears, sites, norms)


def _is_rotation(observed: Observed) -> bool:
    """Whether the layer was given a cosine and a sine: others are given complex numbers, or nothing."""
    given = observed.arguments.get("position_embeddings")
    return isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) or next(module.parameters(recurse=False), None) is not None


def _norm(norm: nn.Module) -> Norm | None:
    """None: it has no weight per feature (OLMo's and NanoChat's have none), or no eps."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, int | float):
        return None
    return Norm(weight, float(eps))


def part_of(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module
