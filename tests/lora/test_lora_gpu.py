"""Adapters copied to a GPU beside the step, and the layers that multiply with them there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.core.plan import LoraSegment
from engine.lora.batch import LoraBatch
from engine.lora.copier import Copier, CudaPages, Pacer
from engine.lora.linear import LoraLinear
from engine.lora.pages import lay_out
from engine.lora.reference_lora import lora_linear
from engine.lora.storage import PagedStorage
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of
from tests.support.waiting import patience

pytestmark = pytest.mark.gpu

PAGE_BYTES = 4096


def test_adapters_copied_while_the_stream_is_busy_are_whole() -> None:
    torch.manual_seed(0)
    sites, batch = linear_sites((512, 768)), LoraBatch()
    buffer = torch.zeros(100 * PAGE_BYTES, dtype=torch.uint8, device="cuda")
    storage = PagedStorage(buffer, PAGE_BYTES, Copier(CudaPages(buffer, staging_bytes=6000), Pacer(None)))
    first_page = 1
    base = nn.Linear(512, 768, device="cuda")
    x, slots = torch.randn(40, 512, device="cuda"), {}
    with torch.inference_mode():
        for slot in range(1, 9):
            for _ in range(50):
                base(x)
            image = pack(f"adapter-{slot}", spec_of(sites), random_weights(sites, slot, seed=slot))
            end_page = first_page + sum(lay_out(image.manifest, PAGE_BYTES).runs)
            weights = storage.load(image, tuple(range(first_page, end_page)))
            first_page = end_page
            batch.bind(slot, weights)
            slots[slot] = weights[0]
        copied: tuple[str, ...] = ()
        for _ in patience("eight adapters to be copied"):
            copied += storage.copied()
            if len(copied) >= 8:
                break
        segments = tuple(LoraSegment(4 * i, 4 * i + 1 + i % 4, i + 1) for i in range(8))
        batch.set(segments)
        expected = lora_linear(base(x), x, segments, slots)
        found = LoraLinear(base, sites[0], batch)(x)
    assert copied == tuple(f"adapter-{slot}" for slot in range(1, 9))
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    storage.close()
