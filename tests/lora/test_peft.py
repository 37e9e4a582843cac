"""The same adapter through PEFT and through our layers gives the same outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.linear import LoraEmbedding, LoraLinear
from engine.lora.storage import BorrowedStorage
from tests.support.lora_images import pack, spec_of


class Scaled(nn.Embedding):
    """Gemma's kind of embedding."""

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__(num_embeddings, width)
        self.embed_scale = torch.tensor(width**0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.scaled = Scaled(13, 12)
        self.up = nn.Linear(12, 20)
        self.conv = Conv1D(12, 20)
        self.head = nn.Linear(12, 13, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.scaled(ids)
        return self.head(x + self.conv(torch.tanh(self.up(x))))


SITES = (
    LinearSite(index=0, name="embed", in_features=13, out_features=12, kind="embedding"),
    LinearSite(index=1, name="scaled", in_features=13, out_features=12, kind="embedding"),
    LinearSite(index=2, name="up", in_features=12, out_features=20, layer=0),
    LinearSite(index=3, name="conv", in_features=20, out_features=12, layer=0),
    LinearSite(index=4, name="head", in_features=12, out_features=13, layer=0),
)
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "rank and alpha of its own": {"r": 2, "lora_alpha": 3, "rank_pattern": {"up": 5}, "alpha_pattern": {"conv": 7}},
}


def weights_of(peft_model: nn.Module) -> dict[int, tuple[np.ndarray, np.ndarray, float]]:
    weights = {}
    for site in SITES:
        layer = peft_model.get_submodule(f"base_model.model.{site.name}")
        scaling = layer.scaling["default"]
        if site.kind == "embedding":
            a, b = layer.lora_embedding_A["default"].T, layer.lora_embedding_B["default"].T
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight.T
        weights[site.index] = (a.detach().float().numpy(), b.detach().float().numpy(), scaling)
    return weights


# PEFT turns the flag around for Conv1D, and says so.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_outputs_equal_pefts(name: str, dtype: str, tolerance: float) -> None:
    torch.manual_seed(1)
    ours, base = Tiny().to(getattr(torch, dtype)), Tiny().to(getattr(torch, dtype))
    base.load_state_dict(ours.state_dict())
    config = LoraConfig(
        target_modules=[s.name for s in SITES], init_lora_weights=False, fan_in_fan_out=False, **CONFIGS[name]
    )
    theirs = get_peft_model(base, config).eval().to(getattr(torch, dtype))
    batch = LoraBatch()
    batch.bind(3, BorrowedStorage().load(pack("k", spec_of(SITES, dtype), weights_of(theirs))))
    for site in SITES:
        kind = LoraEmbedding if site.kind == "embedding" else LoraLinear
        setattr(ours, site.name, kind(getattr(ours, site.name), site, batch))
    ids = torch.randint(0, 13, (1, 17))
    batch.set((LoraSegment(5, 17, 3),))
    with torch.inference_mode():
        expected, found = theirs(ids), ours(ids)
        with theirs.disable_adapter():
            plain = theirs(ids)
    scale = expected.abs().max()
    assert (found[:, 5:] - expected[:, 5:]).abs().max() <= tolerance * scale
    assert torch.equal(found[:, :5], plain[:, :5])
    assert (expected - plain).abs().max() > 0.1 * scale, "the adapter must matter for this to prove anything"
