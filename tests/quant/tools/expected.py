"""What a tool's own library computes with its checkpoint, saved beside it. No other file of the project is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TOKEN_IDS = [7, 3, 250, 19, 4, 4, 91, 130, 55, 201, 0, 17, 32, 32, 99, 64]


@torch.no_grad()
def save_expected(folder: Path, model: Any) -> None:
    """Logits after every token, computed in float32: expected.safetensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):  # libraries leave some as they were
            tensor.data = tensor.data.float()
    ids = torch.tensor([TOKEN_IDS])
    logits = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    folder.mkdir(exist_ok=True)
    save_file({"token_ids": ids[0], "logits": logits.contiguous()}, folder / "expected.safetensors")
