"""A quantized checkpoint computes what transformers does with the same weights in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoint.footprint import measure
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.model.loader import LoadedModel, load_model
from tests.support.quantized_files import Twins, make_twins
from tests.support.tiny_model import make_base

IDS = torch.tensor([[7, 3, 250, 19, 4, 4, 91, 130, 55, 201, 0, 17]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


def twins_of(root: Path, arch: str, **how: Any) -> Twins:
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 264}
    if arch == "gpt2":
        sizes, how = {"n_embd": 64, "n_layer": 2}, {"transposed": True}
    if arch == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 32}
    folder = root / "-".join([arch, *how])
    if not folder.exists():
        make_twins(make_base(arch, folder / "base", **sizes), folder, **how)
    return Twins(folder / "quantized", folder / "dense")


def load(folder: Path, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(folder), **{"dtype": "float32", **settings}))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    model.config._attn_implementation = "eager"
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize(
    ("arch", "how"),
    [
        ("llama", {}),
        ("llama", {"lm_head": True}),
        ("qwen2", {}),
        ("mistral", {}),
        ("mixtral", {}),
        ("qwen3_moe", {}),
        ("gpt2", {}),
    ],
)
def test_logits_are_those_of_the_weights_that_the_codes_mean(root: Path, arch: str, how: dict[str, bool]) -> None:
    twins = twins_of(root, arch, **how)
    loaded = load(twins.quantized)
    dense = AutoModelForCausalLM.from_pretrained(twins.dense, dtype=torch.float32, local_files_only=True)
    expected = logits_of(dense.eval())
    assert (logits_of(loaded.model) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert loaded.sites == load(twins.dense).sites


def test_every_expert_counts_as_layers(root: Path) -> None:
    footprint = measure(load(twins_of(root, "mixtral").quantized).model)
    assert footprint is not None
    assert footprint.num_layers == {"int4": 2 * (4 + 4 * 3)}


def test_a_float16_checkpoint_becomes_bfloat16_on_the_cpu(root: Path) -> None:
    """The compiled kernels know no float16. What is asked for is done."""
    folder = twins_of(root, "llama").quantized
    config = json.loads((folder / "config.json").read_text())
    before = (folder / "config.json").read_text()
    try:
        (folder / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
        assert load(folder, dtype="auto").dtype is torch.bfloat16
        assert load(folder, dtype="float16").dtype is torch.float16
    finally:
        (folder / "config.json").write_text(before)


def test_what_is_quantized_is_not_quantized_again(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantization='int8'.*gptq"):
        load(twins_of(root, "llama").quantized, quantization="int8")


def test_a_bias_of_zeros_that_the_model_does_not_have_is_no_error_but_another_is(root: Path, tmp_path: Path) -> None:
    """Some tools write zeros for every layer."""
    base = make_base("llama", tmp_path / "base", num_hidden_layers=1, hidden_size=64, intermediate_size=96)

    def with_bias(value: float) -> Path:
        bias = {"model.layers.0.mlp.up_proj.bias": torch.full((96,), value)}
        return make_twins(base, tmp_path / str(value), change=lambda tensors: tensors.update(bias)).quantized

    load(with_bias(0.0))
    with pytest.raises(ModelNotSupported, match=r"up_proj\.bias .*is not zero"):
        load(with_bias(0.5))
