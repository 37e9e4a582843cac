"""Checkpoints as llm-compressor writes them: python compressors.py FOLDER NAME...

Runs in .venv-llmcompressor, which has a transformers of its own. FOLDER/bases has the models to quantize.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from expected import save_expected
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM


def group(bits: int, *, symmetric: bool = True) -> dict[str, Any]:
    weights = QuantizationArgs(num_bits=bits, group_size=32, strategy="group", symmetric=symmetric)
    return {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}}


def preset(name: str) -> dict[str, Any]:
    return {"targets": "Linear", "scheme": name}


FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llmcompressor-llama-w4a16": ("llama", group(4)),
    "llmcompressor-mixtral-w4a16-asymmetric": ("mixtral", group(4, symmetric=False)),
    "llmcompressor-mistral-w8a16": ("mistral", group(8)),
    "llmcompressor-qwen2-w8a8": ("qwen2", preset("W8A8")),
    "llmcompressor-mistral-fp8-dynamic": ("mistral", preset("FP8_DYNAMIC")),
}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        arch, how = FILES[name]
        # No library loads a Mixtral that was quantized with transformers 5: as it is before it is saved, in float32.
        dtype = torch.float32 if arch == "mixtral" else torch.bfloat16
        model = AutoModelForCausalLM.from_pretrained(folder / "bases" / arch, dtype=dtype)
        oneshot(model=model, recipe=[QuantizationModifier(ignore=["lm_head", r"re:.*mlp\.gate$"], **how)])
        if arch == "mixtral":
            save_expected(folder / name, model)
        model.save_pretrained(folder / name, save_compressed=True)
        if arch != "mixtral":
            save_expected(folder / name, AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FILES))
