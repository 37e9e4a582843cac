"""What the tool's own library computes with a checkpoint, saved beside it. No other file of the project is imported."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

TOKEN_IDS = [7, 3, 250, 19, 4, 4, 91, 130, 55, 201, 0, 17, 32, 32, 99, 64]


@torch.no_grad()
def save_expected(folder: Path) -> None:
    """Logits after every token, in float32 where the library can: expected.safetensors."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="cpu", dtype=torch.float32, attn_implementation="eager"
    )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in (torch.float16, torch.bfloat16):  # it leaves Mixtral's router as it was
            tensor.data = tensor.data.float()
    ids = torch.tensor([TOKEN_IDS])
    logits = model.eval()(input_ids=ids, use_cache=False).logits[0].float()
    save_file({"token_ids": ids[0], "logits": logits.contiguous()}, folder / "expected.safetensors")
