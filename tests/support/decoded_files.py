"""What the tensors of a quantized checkpoint mean, from the descriptions of its formats: an oracle in float64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from engine.quant.weight import NF4_VALUES


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, sharded or not."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def fields(words: torch.Tensor, bits: int, count: int) -> np.ndarray:
    """The first `count` numbers of each row, the first of a word in its lowest bits."""
    unsigned = words.numpy().astype(np.int64) & 0xFFFFFFFF
    parts = [(unsigned >> (bits * i)) & ((1 << bits) - 1) for i in range(32 // bits)]
    return np.stack(parts, axis=-1).reshape(words.shape[0], -1)[:, :count]


def decode(tensors: dict[str, torch.Tensor], layer: str, config: dict) -> np.ndarray:
    """The weight of a layer, float64 [out, in]."""
    if config["quant_method"] == "bitsandbytes":
        return _decode_nf4(tensors, layer)
    scales = tensors[f"{layer}.weight_scale"].double().numpy()
    if config["format"] == "pack-quantized":
        bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
        _, in_features = tensors[f"{layer}.weight_shape"].tolist()
        codes = fields(tensors[f"{layer}.weight_packed"], bits, in_features) - (1 << (bits - 1))
    else:
        codes = tensors[f"{layer}.weight"].double().numpy()
    return codes * np.repeat(scales, codes.shape[1] // scales.shape[1], axis=1)


def _decode_nf4(tensors: dict[str, torch.Tensor], layer: str) -> np.ndarray:
    state = json.loads(bytes(tensors[f"{layer}.weight.quant_state.bitsandbytes__nf4"].tolist()))
    packed = tensors[f"{layer}.weight"].flatten().numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)  # the even column in the high half
    scales = np.repeat(tensors[f"{layer}.weight.absmax"].double().numpy(), state["blocksize"])
    return (np.array(NF4_VALUES)[codes] * scales).reshape(state["shape"])
