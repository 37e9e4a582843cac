"""Decoder layers that look like a Qwen 3 layer from outside and compute something else, each in one point.

What a kernel for layers of the Llama kind computes differs from these by that one point, as it would if a new
architecture had it: same parts, same names, other numbers. `right` is the layer itself, written down again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

ORIGINAL_MAX = 64  # a length that the config names, where position-dependent factors begin
EPS = 1e-6


def rotate_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + rotate_half(x) * sin


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1] // 2
    cos, sin = (part[..., :half].repeat_interleave(2, dim=-1) for part in (cos, sin))
    pairs = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    return x * cos + pairs * sin


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    dims = x.shape[-1] // 2
    return torch.cat((rotate_halves(x[..., :dims], cos[..., :dims], sin[..., :dims]), x[..., dims:]), dim=-1)


def keep(x: Tensor, positions: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer by its points; the defaults are the layer as it is."""

    residual: tuple[float, float] = (1.0, 1.0)  # of what attention and the MLP add
    norm_eps: tuple[float, float] = (1.0, 1.0)  # times what the two norms say
    norm_offset: float = 0.0
    head_norms: tuple[str, str] = ("q_norm", "k_norm")  # "": none
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate_halves
    theta: float | None = None  # None: the model's own angles
    query: Callable[[Tensor, Tensor], Tensor] = keep  # after rotation, [1, Hq, T, D], positions [T]
    value: Callable[[Tensor, Tensor], Tensor] = keep
    attended: Callable[[Tensor, Tensor], Tensor] = keep  # before the output projection, [1, T, Hq * D]
    bias_of: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    activation: Callable[[Tensor], Tensor] = functional.silu
    swapped: bool = False
    up_clamp: float | None = None
    input: Callable[[Tensor, Tensor], Tensor] = keep
    output: Callable[[Tensor, Tensor], Tensor] = keep
    order: str = "pre"  # pre, parallel (the MLP reads attention's norm), bare (no norm before the MLP), post

    def norm(self, norm: Any, x: Tensor, factor: float = 1.0) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon * factor).rsqrt()
        return (wide * scale * (self.norm_offset + norm.weight.float())).to(x.dtype)

    def linear(self, part: Any, name: str, x: Tensor) -> Tensor:
        linear = getattr(part, name)
        if name in self.bias_of or linear.bias is None:
            return linear(x)
        return linear(x) - linear.bias  # through the module: probes look there

    def attention(
        self, attn: Any, x: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], **kwargs: Any
    ) -> Tensor:
        cos, sin = (part.unsqueeze(1) for part in angles)
        if self.theta is not None:
            frequencies = self.theta ** -(torch.arange(0, attn.head_dim, 2) / attn.head_dim)
            both = (positions[:, None] * frequencies).repeat(1, 2)
            cos, sin = both.cos()[None, None].to(x.dtype), both.sin()[None, None].to(x.dtype)
        q, k, v = (
            self.linear(attn, name, x).view(*x.shape[:-1], -1, attn.head_dim) for name in ("q_proj", "k_proj", "v_proj")
        )
        q, k = (y if not name else attn.get_submodule(name)(y) for name, y in zip(self.head_norms, (q, k), strict=True))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = self.query(self.rotate(q, cos, sin), positions), self.rotate(k, cos, sin)
        attend = AttentionInterface()[attn.config._attn_implementation]
        mixed, _ = attend(attn, q, k, self.value(v, positions), None, scaling=attn.scaling, **kwargs)
        return self.linear(attn, "o_proj", self.attended(mixed.flatten(2), positions))

    def mlp(self, mlp: Any, x: Tensor) -> Tensor:
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        if self.swapped:
            gate, up = up, gate
        if self.up_clamp is not None:
            up = up.clamp(-self.up_clamp, self.up_clamp)
        return mlp.down_proj(self.activation(gate) * up)

    def forward(self, layer: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        positions, angles = kwargs["position_ids"][0], kwargs["position_embeddings"]
        rest = {name: value for name, value in kwargs.items() if name.startswith(("attention_backend", "chorus"))}
        x = self.input(hidden_states, positions)
        before = x if self.order == "post" else self.norm(layer.input_layernorm, x, self.norm_eps[0])
        x = x + self.residual[0] * self.attention(layer.self_attn, before, positions, angles, **rest)
        if self.order == "post":
            x = self.norm(layer.input_layernorm, x)
        after = {"parallel": before, "bare": x, "post": x}.get(self.order)
        if after is None:
            after = self.norm(layer.post_attention_layernorm, x, self.norm_eps[1])
        x = x + self.residual[1] * self.mlp(layer.mlp, after)
        if self.order == "post":
            x = self.norm(layer.post_attention_layernorm, x)
        return self.output(x, positions)


def _beyond(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Llama 4's and Ministral 3's factor of queries, 1 below ORIGINAL_MAX."""

    def scale(q: Tensor, positions: Tensor) -> Tensor:
        factor = 1 + beta * torch.log1p((positions // ORIGINAL_MAX).float())
        return q * factor[:, None].to(q.dtype)

    return scale


def _from(start: int, factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, positions: torch.where((positions >= start)[:, None], factor * x, x)


def _cap(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, _: limit * torch.tanh(x / limit)


RIGHT = Layer()
WRONG: dict[str, Layer] = {
    "residual scaled": Layer(residual=(0.22, 0.22)),
    "residual of attention scaled a little": Layer(residual=(0.99, 1.0)),
    "residual of the mlp scaled": Layer(residual=(1.0, 1.02)),
    "eps of the input norm": Layer(norm_eps=(10.0, 1.0)),
    "eps of the second norm": Layer(norm_eps=(1.0, 10.0)),
    "norm with 1 + weight": Layer(norm_offset=1.0),
    "no norm of query heads": Layer(head_norms=("", "k_norm")),
    "norms of heads swapped": Layer(head_norms=("k_norm", "q_norm")),
    "other theta": Layer(theta=10100.0),
    "neighbours rotated": Layer(rotate=rotate_neighbours),
    "half of a head rotated": Layer(rotate=rotate_part),
    "nothing rotated": Layer(rotate=lambda x, cos, sin: x),
    "softmax scale": Layer(query=lambda q, _: 1.05 * q),
    "query factor by position": Layer(query=_beyond(1.0)),
    "small query factor by position": Layer(query=_beyond(0.1)),
    "values scaled at the end": Layer(value=_from(200, 1.25)),
    "queries clamped": Layer(query=lambda q, _: q.clamp(-3, 3)),
    "values clamped": Layer(value=lambda v, _: v.clamp(-8, 8)),
    "softcap of what attention gives": Layer(attended=_cap(50.0)),
    "bias of queries dropped": Layer(bias_of=("k_proj", "v_proj", "o_proj")),
    "bias of the output dropped": Layer(bias_of=("q_proj", "k_proj", "v_proj")),
    "gelu": Layer(activation=functional.gelu),
    "gelu by tanh": Layer(activation=lambda x: functional.gelu(x, approximate="tanh")),
    "sigmoid of 1.702 x": Layer(activation=lambda x: x * torch.sigmoid(1.702 * x)),
    "gate and up swapped": Layer(swapped=True),
    "up clamped": Layer(up_clamp=7.0),
    "gate clamped": Layer(activation=lambda x: functional.silu(x.clamp(max=7.0))),
    "embedding multiplier": Layer(input=lambda x, _: 1.01 * x),
    "output scaled": Layer(output=lambda x, _: 0.98 * x),
    "output scaled far away": Layer(output=_from(ORIGINAL_MAX, 0.9)),
    "attention and mlp in parallel": Layer(order="parallel"),
    "no norm before the mlp": Layer(order="bare"),
    "norms after": Layer(order="post"),
}


def plant(layers: nn.ModuleList, kinds: list[Layer]) -> None:
    """Give each layer of a loaded model one of the kinds."""
    for layer, kind in zip(layers, kinds, strict=True):
        layer.forward = MethodType(
            lambda self, hidden_states, kind=kind, **kw: kind.forward(self, hidden_states, **kw), layer
        )
