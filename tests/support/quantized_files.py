"""Checkpoints of tiny models in GPTQ's layout, with random codes; and the same weights in float32, for transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP_SIZE = 32
CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": GROUP_SIZE,
    "sym": False,
    "desc_act": False,
    "checkpoint_format": "gptq_v2",
}
Change = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Twins:
    """Two folders with the same weights."""

    quantized: Path
    dense: Path


def make_twins(
    base: Path,
    folder: Path,
    *,
    transposed: bool = False,
    lm_head: bool = False,
    change: Change | None = None,
) -> Twins:
    """Give every layer of `base` random codes, lm_head too if asked for.

    `transposed`: its weights are stored [in, out]. `change` is done to the quantized tensors before they are written.
    """
    tensors = load_file(base / "model.safetensors")
    dense, stored = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(5)
    for name, weight in tensors.items():
        if is_layer(name) or (lm_head and name == "lm_head.weight"):
            shape = weight.shape[::-1] if transposed else weight.shape
            parts, value = random_layer(*shape, generator)
            dense[name] = (value.t() if transposed else value).contiguous()
            del stored[name]
            stored |= {name.replace("weight", suffix): tensor for suffix, tensor in parts.items()}
    if change is not None:
        change(stored)
    twins = Twins(folder / "quantized", folder / "dense")
    write(base, twins.dense, dense)
    write(base, twins.quantized, stored, CONFIG)
    return twins


def is_layer(name: str) -> bool:
    """Of the decoder's layers: no norm, no router, no table, no bias."""
    parts = name.split(".")
    return parts[-1] == "weight" and any(c.isdigit() for c in name) and not ("norm" in name or parts[-2] in _OTHERS)


_OTHERS = ("gate", "ln_1", "ln_2")


def random_layer(out_features: int, in_features: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by suffix, and the weight that they mean: scale * (code - zero)."""
    groups = in_features // GROUP_SIZE
    codes = torch.randint(0, 16, (out_features, in_features), generator=generator)
    zeros = torch.randint(5, 11, (groups, out_features), generator=generator)
    scales = ((torch.rand((groups, out_features), generator=generator) + 0.5) * 0.4 / in_features**0.5).half()
    spread = [side.repeat_interleave(GROUP_SIZE, dim=0).t() for side in (scales.double(), zeros.double())]
    weight = (spread[0] * (codes.double() - spread[1])).float()
    parts = {"qweight": _words(codes.t()), "qzeros": _words(zeros.t()).t().contiguous(), "scales": scales}
    return parts, weight


def _words(nibbles: Tensor) -> Tensor:
    """Eight to a word along the first dimension, the first in the lowest bits. Shapes: [8 n, m] -> int32 [n, m]."""
    words = sum(nibbles[i::8] << (4 * i) for i in range(8))
    return torch.as_tensor(words).to(torch.int32)  # the highest bit becomes the sign


def write(base: Path, folder: Path, tensors: dict[str, Tensor], quantization: dict[str, object] | None = None) -> None:
    """Everything of `base`, but these tensors in two shards, cut in the middle of a layer's."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    middle = next((i for i in range(len(names) // 2, len(names)) if names[i].endswith("qzeros")), len(names) // 2)
    files = {"model-1.safetensors": names[:middle], "model-2.safetensors": names[middle:]}
    for file, members in files.items():
        save_file({name: tensors[name].contiguous() for name in members}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, members in files.items() for name in members}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
