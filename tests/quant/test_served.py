"""A quantized model with mixed adapters says what transformers says with the weights that its codes mean, and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from engine import LLM
from tests.support.mixed_adapters import check_served, make_adapters
from tests.support.quantized_files import make_twins
from tests.support.rounding_oracle import rounded_model
from tests.support.tiny_model import make_base

SIZES: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 264}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"quantization": "int4", "quantize_lm_head": True}),
        ("qwen2", {"quantization": "int8", "quantize_lm_head": True, "quantize_embeddings": True}),
        ("mixtral", {"quantization": "nf4"}),
        ("gpt2", {"quantization": "int4"}),
    ],
)
def test_a_model_rounded_at_load_with_four_adapters(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "vocab_size": 264} if arch == "gpt2" else SIZES
    base = make_base(arch, tmp_path / "base", **sizes)
    lm_head, embeddings = (bool(settings.get(name)) for name in ("quantize_lm_head", "quantize_embeddings"))
    rounded_model(base, settings["quantization"], lm_head=lm_head, embeddings=embeddings).save_pretrained(
        tmp_path / "dense"
    )
    check_served(base, tmp_path / "dense", make_adapters(base, tmp_path), **settings)


@pytest.mark.parametrize("arch", ["qwen2", "mixtral"])
def test_a_quantized_checkpoint_with_four_adapters(arch: str, tmp_path: Path) -> None:
    base = make_base(arch, tmp_path / "base", **SIZES)
    twins = make_twins(base, tmp_path)
    check_served(twins.quantized, twins.dense, make_adapters(base, tmp_path))


def test_adapters_may_reach_quantized_embeddings_and_head(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", **SIZES)
    settings = {"quantization": "int8", "quantize_lm_head": True, "quantize_embeddings": True}
    rounded_model(base, "int8", lm_head=True, embeddings=True).save_pretrained(tmp_path / "dense")
    targets = ["embed_tokens", "lm_head", "q_proj", "down_proj"]
    # PEFT writes the table into an adapter that reaches it, and takes it from there.
    adapters = make_adapters(tmp_path / "dense", tmp_path, target_modules=targets)
    check_served(base, tmp_path / "dense", adapters, **settings)


def test_the_dense_twin_is_not_the_base(tmp_path: Path) -> None:
    """Else the tests above would pass with weights that nobody quantized."""
    base = make_base("llama", tmp_path / "base", **SIZES)
    original = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    changed = rounded_model(base, "int4")
    weight, rounded = (model.model.layers[0].mlp.up_proj.weight for model in (original, changed))
    assert 0.05 < (weight - rounded).norm() / weight.norm() < 0.2


def test_the_engine_tells_what_its_quantized_layers_weigh(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", num_key_value_heads=4, num_attention_heads=4, **SIZES)
    num_weights = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    num_scales = 2 * (5 * 64 + 2 * 96)  # an output channel each
    stats = LLM(base, quantization="int8").stats()
    assert (stats.quantized_bytes, stats.quantized_16bit_bytes) == (num_weights + 4 * num_scales, 2 * num_weights)
    assert LLM(base).stats().quantized_bytes == 0
