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


class ScaledRMSNorm(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


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


@pytest.mark.parametrize(
    "module", [MLP(40, nn.GELU()), ScaledRMSNorm(40), nn.LayerNorm(40), LlamaRMSNorm(40).half()], ids=str
)
def test_what_computes_something_else_is_left_alone(module: nn.Module) -> None:
    model = nn.Sequential(module)
    assert fuse(model, native_or_skip(), torch.float32) == 0
    assert model[0] is module
