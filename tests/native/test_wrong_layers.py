"""A layer that looks like one of the Llama kind and computes something else is not compiled, a right one is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.model.loader import LoadedModel, load_model
from engine.model.probe import probe
from tests.support.native import native_or_skip
from tests.support.plan_driver import PlanDriver
from tests.support.tiny_model import make_base
from tests.support.wrong_layers import ORIGINAL_MAX, RIGHT, WRONG, Layer, plant

KINDS = {"right": RIGHT, **WRONG, "right at the end": RIGHT}
WITHOUT_BIASES = {name: kind for name, kind in KINDS.items() if "bias" not in name}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_or_skip()
    return tmp_path_factory.mktemp("wrong")


def load(base: Path, dtype: str, massive: float, kinds: dict[str, Layer]) -> LoadedModel:
    """Planted. With `massive`, the trial's first token has one channel as large as real models have there."""
    loaded = load_model(EngineConfig(model=str(base), dtype=dtype, num_threads=1))
    model: Any = loaded.model
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] = massive
    plant(model.model.layers, list(kinds.values()))
    return replace(loaded, uses=probe(model).uses)


@pytest.mark.parametrize(
    ("dtype", "massive", "has_biases"),
    [
        ("float32", 0.0, True),
        ("float32", 2000.0, False),
        ("bfloat16", 0.0, False),
        ("bfloat16", 2000.0, True),
    ],
)
def test_only_right_layers_are_compiled(dtype: str, massive: float, has_biases: bool, bases: Path) -> None:
    kinds = KINDS if has_biases else WITHOUT_BIASES
    base = make_base(
        "qwen3",
        bases / f"qwen3-{has_biases}",
        num_hidden_layers=len(kinds),
        attention_bias=has_biases,
        floor_scale=ORIGINAL_MAX,
    )
    driver = PlanDriver(load(base, dtype, massive, kinds), dtype=dtype, kernels="native")
    model: Any = driver.loaded.model
    names = [type(layer).__name__ for layer in model.model.layers]
    compiled = {kind for kind, name in zip(kinds, names, strict=True) if name in ("NativeDecoder", "ComputedBefore")}
    assert compiled == {"right", "right at the end"}
