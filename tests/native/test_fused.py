"""Norms and gated MLPs: what is swapped gives the original's numbers, what it would not is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.model.fused import NativeGatedMLP, NativeRMSNorm, fuse
from tests.support.native import deviation, native_or_skip

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


class MLP(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.down_proj = nn.Linear(3 * width, width)
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherRMSNorm(LlamaRMSNorm):
    """LlamaRMSNorm, but for one point that usual rows hardly show."""

    def __init__(self, width: int, point: str) -> None:
        super().__init__(width)
        self.point = point

    def forward(self, x: Tensor) -> Tensor:
        eps, clamp = self.variance_epsilon, None
        if self.point == "eps":
            eps *= 10
        elif self.point == "clamp":
            clamp = 5000.0
        wide = x.float() if clamp is None else x.float().clamp(-clamp, clamp)
        mean = wide.square().mean(-1, keepdim=True)
        scale = 1 / (mean.sqrt() + eps) if self.point == "eps outside" else (mean + eps).rsqrt()
        if self.point == "ceiling":
            scale = scale.clamp(max=500.0)
        weight = {"half": 0.5 + self.weight, "no weight": 1.0}.get(self.point, self.weight)
        factor = {"scaled": 1.5, "scaled a little": 1.001}.get(self.point, 1.0)
        return (factor * weight * (wide * scale)).to(x.dtype)


class CappedMLP(MLP):
    """The same, but beyond a limit that usual rows do not reach."""

    def __init__(self, width: int, point: str) -> None:
        super().__init__(width, nn.SiLU())
        self.point = point

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.point == "up":
            up = up.clamp(-10, 10)
        elif self.point == "gate":
            gate = gate.clamp(max=10.0)
        elif self.point == "swapped":
            gate, up = up, gate
        elif self.point == "small":
            up = torch.where(up.abs() < 1e-3, 0.0, up)
        y = self.down_proj(self.act_fn(gate) * up)
        return (
            1000 * torch.tanh(y / 1000) if self.point == "output" else y - self.down_proj.bias * (self.point == "bias")
        )


NORM_POINTS = ("eps", "eps outside", "clamp", "ceiling", "half", "no weight", "scaled", "scaled a little")
MLP_POINTS = ("up", "gate", "swapped", "small", "output", "bias")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("width", [1, 7, 16, 100, 576])
def test_a_norm_is_that_of_transformers(dtype: torch.dtype, norm_class: type[nn.Module], width: int) -> None:
    original = norm_class(width)
    original.weight.normal_()
    original = original.to(dtype)
    model = nn.Sequential(original)
    assert fuse(model, native_or_skip(), dtype) == 1
    assert isinstance(model[0], NativeRMSNorm)
    for shape in ((1, width), (1, 9, width), (2, 3, 5, width), (100, width)):
        x = 5 * torch.randn(shape).to(dtype)
        assert model(x).shape == x.shape
        assert deviation(model(x), original(x)) <= TOLERANCE[dtype]


def test_a_norm_given_another_dtype_does_what_it_did() -> None:
    original = LlamaRMSNorm(32).bfloat16()
    model = nn.Sequential(original)
    fuse(model, native_or_skip(), torch.bfloat16)
    x = torch.randn(3, 32)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gated_mlp_is_that_of_transformers(dtype: torch.dtype) -> None:
    original = MLP(40, nn.SiLU()).to(dtype)
    model = nn.Sequential(original)
    assert fuse(model, native_or_skip(), dtype) == 1
    assert isinstance(model[0], NativeGatedMLP)
    assert dict(model.named_modules())["0.up_proj"] is original.up_proj  # as LoRA sites are named
    for rows in (1, 30, 200):
        x = torch.randn(1, rows, 40).to(dtype)
        assert deviation(model(x), original(x)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("point", ["norm of Llama", *NORM_POINTS])
def test_a_norm_that_differs_in_one_point_is_left_alone(point: str, dtype: torch.dtype) -> None:
    norm = OtherRMSNorm(40, point)
    norm.weight.normal_()
    model = nn.Sequential(norm.to(dtype))
    assert fuse(model, native_or_skip(), dtype) == (point == "norm of Llama")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("point", ["mlp of Llama", *MLP_POINTS])
def test_an_mlp_that_differs_in_one_point_is_left_alone(point: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(CappedMLP(40, point).to(dtype))
    assert fuse(model, native_or_skip(), dtype) == (point == "mlp of Llama")


@pytest.mark.parametrize(
    "module",
    [MLP(40, nn.GELU()), MLP(40, nn.GELU("tanh")), MLP(40, nn.Mish()), nn.LayerNorm(40), LlamaRMSNorm(40).half()],
    ids=str,
)
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert fuse(model, native_or_skip(), torch.float32) == 0
    assert model[0] is module
