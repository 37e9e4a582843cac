"""What `python -m engine.quantize` writes, decoded value by value and loaded by what is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.quant.formats import read_scheme
from tests.support.decoded_files import decode, tensors_in

METHODS = ("int8", "int8-dynamic", "int4", "nf4", "fp8")
# Of normal weights: half a step of 127 in 3.2 sigma; 0.103 of int4 and 0.092 of nf4 in groups of 64 or 128; three bits
# of mantissa in fp8. A wrong order of codes, sign or scale leaves an error of about 1.
LARGEST_ERROR = {"int8": 0.012, "int8-dynamic": 0.012, "int4": 0.13, "nf4": 0.12, "fp8": 0.04}


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_holds_every_layer_in_few_bits_and_all_else_as_it_was(
    method: str, arch: str, base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model, out = base(arch), tmp_path / "out"
    assert run(model, out, "--method", method)[0] == 0
    before, after = tensors_in(model), tensors_in(out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    scheme = read_scheme(config, {})
    layers = [name.removesuffix(".weight") for name in before if is_layer(name)]
    assert len(layers) == (2 * (4 + 3 * 4) if arch == "mixtral" else 2 * 7)
    for layer in layers:
        exact = before[f"{layer}.weight"].double().numpy()
        decoded = decode(after, layer, config)
        assert np.linalg.norm(decoded - exact) / np.linalg.norm(exact) < LARGEST_ERROR[method]
        stored = {name.removeprefix(layer + "."): t for name, t in after.items() if name.startswith(layer + ".")}
        assert scheme.is_quantized(layer, stored.keys())
        stored.pop("bias", None)
        served = scheme.read(layer, exact.shape[1], exact.shape[0], stored)
        np.testing.assert_allclose(served.dequantize().numpy(), decoded, rtol=1e-6, atol=0)
        assert served.activations == {"int8-dynamic": "int8", "fp8": "fp8"}.get(method)
    kept = {name for name in before if not is_layer(name)}
    assert all(torch.equal(before[name], after[name]) for name in kept)
    of_layers = {name for name in after if any(name.startswith(layer + ".") for layer in layers)}
    assert after.keys() == kept | of_layers
    routers = ["model.layers.1.block_sparse_moe.gate"] if arch == "mixtral" else []
    assert not any(scheme.is_quantized(name, {"weight"}) for name in ["lm_head", *routers])


def is_layer(name: str) -> bool:
    return name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight"))


@pytest.mark.parametrize("method", METHODS)
def test_a_tied_head_gets_codes_of_its_own_and_the_embedding_stays(
    method: str, base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model, out = base("qwen2"), tmp_path / "out"
    assert run(model, out, "--method", method, "--lm-head")[0] == 0
    before, after = tensors_in(model)["model.embed_tokens.weight"], tensors_in(out)
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert torch.equal(after["model.embed_tokens.weight"], before)
    decoded = decode(after, "lm_head", config["quantization_config"])
    exact = before.double().numpy()
    assert np.linalg.norm(decoded - exact) / np.linalg.norm(exact) < LARGEST_ERROR[method]


def test_tokenizer_and_generation_config_come_along_and_a_tokens_ids_stay(
    base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    model, out = base("llama"), tmp_path / "out"
    assert run(model, out, "--method", "int8")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_in(out).keys()
    assert {path.name for path in out.glob("*.safetensors")} == set(index.values())
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_group_size_that_was_asked_for_is_used(
    base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    assert run(base("llama"), tmp_path / "out", "--method", "int4", "--group-size", 16)[0] == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert tensors_in(tmp_path / "out")["model.layers.1.mlp.down_proj.weight_scale"].shape == (64, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_stored_in_the_dtype_of_the_model_and_codes_are_chosen_for_them(
    dtype: torch.dtype, base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """Weights of 1e-4 in float16 need scales below its least normal number."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base("llama"), dtype=torch.float32)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e-3)
    model.to(dtype).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(base("llama")).save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--method", "int8")[0] == 0
    after, layer = tensors_in(tmp_path / "out"), "model.layers.0.mlp.up_proj"
    assert after[f"{layer}.weight_scale"].dtype == dtype
    exact = tensors_in(tmp_path / "model")[f"{layer}.weight"].double().numpy()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    decoded = decode(after, layer, config)
    assert np.linalg.norm(decoded - exact) / np.linalg.norm(exact) < LARGEST_ERROR["int8"]


def test_the_gate_of_shared_experts_stays_as_a_router_does(run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64}
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=8, num_key_value_heads=2, shared_expert_intermediate_size=64, **sizes, **experts
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    assert run(tmp_path / "model", tmp_path / "out", "--method", "int8")[0] == 0
    before, after = tensors_in(tmp_path / "model"), tensors_in(tmp_path / "out")
    gates = [f"model.layers.0.mlp.{name}" for name in ("gate", "shared_expert_gate")]
    assert all(torch.equal(after[f"{gate}.weight"], before[f"{gate}.weight"]) for gate in gates)
    assert "model.layers.0.mlp.shared_expert.up_proj.weight_packed" in after
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert set(gates) <= set(report["kept"])
