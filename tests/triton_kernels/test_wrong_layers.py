"""A layer that looks like one of the Llama kind and computes something else is not run by the GPU's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model.loader import load_model
from tests.support.plan_driver import PlanDriver
from tests.support.tiny_model import make_base
from tests.support.triton_device import DEVICE
from tests.support.wrong_layers import ORIGINAL_MAX, RIGHT, WRONG, plant

FEW = ("eps of the second norm", "small query factor by position")


# The interpreter multiplies bfloat16 wrongly: the 16-bit type here is float16.
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        ("float32", FEW),
        pytest.param("float16", FEW, marks=pytest.mark.slow),
        pytest.param("float32", tuple(WRONG), marks=pytest.mark.slow),
    ],
)
def test_only_right_layers_are_fused(dtype: str, names: tuple[str, ...], tmp_path: Path) -> None:
    kinds = {"right": RIGHT, **{name: WRONG[name] for name in names}}
    base = make_base(
        "qwen3",
        tmp_path / "qwen3",
        num_hidden_layers=len(kinds),
        attention_bias=True,
        floor_scale=ORIGINAL_MAX,
        head_dim=16,
    )
    loaded = load_model(EngineConfig(model=str(base), dtype=dtype, device=DEVICE.type))
    model: Any = loaded.model
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] = 2000.0
    plant(model.model.layers, list(kinds.values()))
    PlanDriver(loaded, kernels="triton", dtype=dtype)
    names_of = {kind: type(layer).__name__ for kind, layer in zip(kinds, model.model.layers, strict=True)}
    assert {kind for kind, name in names_of.items() if name != "Qwen3DecoderLayer"} == {"right"}
