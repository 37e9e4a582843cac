"""Adapters copied to a GPU beside the step, and the layers that multiply with them there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.core.plan import LoraSegment
from engine.lora.batch import LoraBatch
from engine.lora.linear import LoraLinear
from engine.lora.reference import lora_linear
from engine.lora.storage import DeviceStorage
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of

pytestmark = pytest.mark.gpu


def test_adapters_copied_while_the_stream_is_busy_are_whole() -> None:
    torch.manual_seed(0)
    sites, storage, batch = linear_sites((512, 768)), DeviceStorage("cuda"), LoraBatch()
    base = nn.Linear(512, 768, device="cuda")
    x, slots = torch.randn(40, 512, device="cuda"), {}
    with torch.inference_mode():
        for slot in range(1, 9):
            for _ in range(50):
                base(x)
            weights = storage.load(pack(f"adapter-{slot}", spec_of(sites), random_weights(sites, slot, seed=slot)))
            batch.bind(slot, weights)
            slots[slot] = weights[0]
        copied: tuple[str, ...] = ()
        while len(copied) < 8:
            copied += storage.copied()
        segments = tuple(LoraSegment(4 * i, 4 * i + 1 + i % 4, i + 1) for i in range(8))
        batch.set(segments)
        expected = lora_linear(base(x), x, segments, slots)
        found = LoraLinear(base, sites[0], batch)(x)
    assert copied == tuple(f"adapter-{slot}" for slot in range(1, 9))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    storage.close()
