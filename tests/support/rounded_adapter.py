"""A PEFT adapter whose weights are those of another, rounded as images of codes round them: by a formula of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def round_adapter(source: Path, target: Path) -> Path:
    """Write `target`, an adapter like `source`, whose numbers are whole steps: 127 to the largest of each rank."""
    if not target.exists():
        target.mkdir()
        shutil.copy(source / "adapter_config.json", target)
        tensors = load_file(source / "adapter_model.safetensors")
        for name in tensors:
            if "lora_" in name:  # PEFT saves the base's embeddings too
                # A is [rank, in], of linear layers and of embeddings; B is [out, rank].
                tensors[name] = _round(tensors[name], 0 if "lora_A" in name or "embedding_A" in name else 1)
        save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def _round(tensor: Tensor, rank_axis: int) -> Tensor:
    exact = tensor.double()
    step = (exact.abs().amax(dim=1 - rank_axis, keepdim=True) / 127).float().double()
    codes = torch.where(step > 0, (exact / step).round(), 0.0)
    return (codes * step).float()
