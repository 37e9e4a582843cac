"""A model quantized at load computes what transformers does with weights rounded by the formulas."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.footprint import measure
from engine.config import EngineConfig, Quantization
from engine.errors import ConfigError, ModelNotSupported
from engine.model.loader import LoadedModel, load_model
from engine.quant.embedding import QuantEmbedding
from engine.quant.linear import QuantLinear
from tests.support.rounding_oracle import input_rounding, rounded_model
from tests.support.tiny_model import make_base

METHODS: tuple[Quantization, ...] = ("int8", "int8-dynamic", "int4", "nf4", "fp8")
IDS = torch.tensor([[7, 3, 250, 19, 4, 4, 91, 130, 55, 201, 0, 17]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def base_of(root: Path, arch: str) -> Path:
    """Widths of two and three groups of 32, so that a layer has several and no layer is too small."""
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    if arch == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2}
    if arch == "qwen3_moe":
        sizes |= {"moe_intermediate_size": 32}
    if arch == "gemma3":
        sizes |= {"layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    return make_base(arch, root / arch, **sizes)


def load(base: Path, method: Quantization | None, **settings: Any) -> LoadedModel:
    return load_model(EngineConfig(model=str(base), quantization=method, dtype="float32", **settings))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    model.config._attn_implementation = "eager"
    logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral", "mixtral", "gpt2"])
def test_logits_are_those_of_rounded_weights(root: Path, arch: str, method: Quantization) -> None:
    with_both = arch in ("qwen2", "gpt2")  # whose embeddings and output layer are one table
    check(base_of(root, arch), method, lm_head=with_both, embeddings=with_both)


@pytest.mark.parametrize(
    ("arch", "method", "lm_head", "embeddings"),
    [
        ("gemma3", "nf4", True, True),  # its embeddings are scaled
        ("qwen2", "int4", True, False),  # the table stays beside the codes made of it
        ("llama", "fp8", False, True),
        ("qwen3_moe", "int4", True, False),  # with a layer that has no experts
    ],
)
def test_embeddings_and_head_are_each_rounded_if_asked_for(
    root: Path, arch: str, method: Quantization, lm_head: bool, embeddings: bool
) -> None:
    check(base_of(root, arch), method, lm_head=lm_head, embeddings=embeddings)


def check(base: Path, method: Quantization, *, lm_head: bool, embeddings: bool) -> None:
    """Tolerances, relative to the largest logit: 1e-5 for sums in float32; one of many weights that lies halfway
    between two of int8's steps may get either (6e-4 seen); and so may inputs where they are rounded, then all that
    follows from them differs (1.5e-2 seen; where they are not rounded, 3e-2 and more)."""
    got = logits_of(load(base, method, quantize_lm_head=lm_head, quantize_embeddings=embeddings).model)
    expected = logits_of(rounded_model(base, method, lm_head=lm_head, embeddings=embeddings))
    tolerance = 2e-2 if input_rounding(method) else 2e-3 if method == "int8" else 1e-5
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


def test_a_table_that_nobody_needs_in_16_bits_is_gone(root: Path) -> None:
    model = load(base_of(root, "qwen2"), "int4", quantize_lm_head=True, quantize_embeddings=True).model
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    assert all(parameter.dim() == 1 for parameter in model.parameters())  # norms and biases


def test_a_model_keeps_its_sites_and_its_adapters_images_but_not_its_cache(root: Path) -> None:
    base = base_of(root, "qwen2")
    plain, int8 = load(base, None), load(base, "int8", quantize_lm_head=True, quantize_embeddings=True)
    assert int8.sites == plain.sites
    assert int8.image_spec().digest == plain.image_spec().digest
    others = [load(base, "int8"), load(base, "int8", quantize_lm_head=True), load(base, "nf4")]
    assert len({loaded.cache_namespace for loaded in (plain, int8, *others)}) == 5


def test_bytes_of_layers_are_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = load(base_of(root, "llama"), "int8").model
    footprint = measure(model)
    weights = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # two layers: q, o; k, v; gate, up, down
    scales = 4 * 2 * (2 * 64 + 2 * 32 + 2 * 96 + 64)
    assert footprint is not None
    assert (footprint.num_bytes, footprint.num_bytes_16bit) == (weights + scales, 2 * weights)
    assert footprint.num_layers == {"int8": 14}
    assert str(footprint) in caplog.text
    assert measure(load(base_of(root, "llama"), None).model) is None


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("qwen2", {"quantize_embeddings": True}, "quantize_lm_head"),
        ("gpt_oss", {}, r"model\.layers\.0\.mlp\.experts .*has_bias"),
    ],
)
def test_what_cannot_be_quantized_is_refused_by_name(
    root: Path, arch: str, settings: dict[str, bool], message: str
) -> None:
    with pytest.raises((ConfigError, ModelNotSupported), match=message):
        load(base_of(root, arch), "int4", **settings)


def test_layers_that_no_group_divides_stay_and_are_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base("llama", root / "odd", hidden_size=64, intermediate_size=72, num_hidden_layers=1)
    model = load(base, "int4").model
    assert isinstance(model.model.layers[0].mlp.down_proj, torch.nn.Linear)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert "model.layers.0.mlp.down_proj" in caplog.text
    assert isinstance(load(base, "int8").model.model.layers[0].mlp.down_proj, QuantLinear)
