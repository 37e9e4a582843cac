"""What cannot be served is refused at load, by the name of the layer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from engine.checkpoint.folder import resolve_max_model_len
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.model.attention import ATTENTION_NAME
from engine.model.capabilities import judge
from engine.model.loader import load_model
from engine.model.probe import Trace, probe
from tests.support.tiny_model import make_base, make_config

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


def write_model(folder: Path, model_type: str, **values: Any) -> EngineConfig:
    config = AutoConfig.for_model(model_type, **values)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return EngineConfig(model=str(folder))


def refusal(config: EngineConfig) -> str:
    with pytest.raises(ModelNotSupported) as caught:
        load_model(config)
    return str(caught.value)


def test_a_mamba_layer_is_refused_by_its_name(tmp_path: Path) -> None:
    config = write_model(tmp_path, "mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)
    assert "backbone.layers.0.mixer (MambaMixer)" in refusal(config)


def test_the_mamba_layer_of_a_hybrid_is_refused_by_its_name(tmp_path: Path) -> None:
    config = write_model(
        tmp_path, "jamba", **SMALL, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2,
        attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    assert "model.layers.0.mamba (JambaMambaMixer)" in refusal(config)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = write_model(tmp_path, "t5", vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    assert "T5Config" in refusal(config)
    assert "encoder-decoder" in refusal(config)


def test_values_narrower_than_keys_are_kept_as_wide_as_these(tmp_path: Path) -> None:
    config = write_model(
        tmp_path, "deepseek_v3", **SMALL, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, moe_intermediate_size=16,
    )  # fmt: skip
    assert load_model(config).capabilities.head_dim == 12


def test_values_wider_than_keys_are_refused_by_the_layer_s_name() -> None:
    model, trace = make_trace("llama")
    trace.attention[1] = replace(trace.attention[1], value_dim=2 * trace.attention[1].head_dim)
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.1\.self_attn.*values wider than keys"):
        judge(model, trace, 64)


def test_attention_that_does_not_use_the_registry_is_refused_by_the_layer_s_name(tmp_path: Path) -> None:
    config = write_model(tmp_path, "bloom", vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    message = refusal(EngineConfig(model=config.model, max_model_len=64))
    assert "BloomForCausalLM" in message or "transformer.h.0.self_attention (BloomAttention)" in message


def test_a_convolution_beside_attention_is_refused_by_its_name(tmp_path: Path) -> None:
    config = write_model(
        tmp_path, "lfm2", **SMALL, num_attention_heads=4, num_key_value_heads=2, layer_types=["conv", "full_attention"]
    )
    assert "model.layers.0.conv (Lfm2ShortConv)" in refusal(config)


def test_bidirectional_attention_is_refused_by_the_layer_s_name(tmp_path: Path) -> None:
    config = write_model(tmp_path, "bert", **SMALL, num_attention_heads=4, is_decoder=False)
    assert "bert.encoder.layer.0.attention.self (BertSelfAttention)" in refusal(config)


def make_trace(arch: str, **overrides: Any) -> tuple[nn.Module, Trace]:
    model = AutoModelForCausalLM.from_config(make_config(arch, **overrides), attn_implementation=ATTENTION_NAME).eval()
    return model, probe(model)


def test_a_module_that_carries_values_from_token_to_token_is_named() -> None:
    """Such as a token shift: it would need a state that nobody keeps between steps."""
    model = AutoModelForCausalLM.from_config(make_config("llama"), attn_implementation=ATTENTION_NAME).eval()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + torch.roll(x, 1, dims=1))
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.1\.mlp.* carries one token's values to another"):
        judge(model, probe(model), 64)


def test_a_mask_that_is_neither_causal_nor_a_window_is_refused() -> None:
    model, trace = make_trace("llama")
    object.__setattr__(trace.attention[1], "mask", lambda b, h, q, kv: (kv <= q) & (q // 32 == kv // 32))
    judge(model, trace, 32)  # chunks of 32 are causal attention as long as nothing is longer
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.1\.self_attn.*position 32 looking at 0"):
        judge(model, trace, 64)


def test_an_argument_that_the_backend_does_not_know_is_refused() -> None:
    model, trace = make_trace("llama")
    trace.attention[2].kwargs["position_bias"] = torch.ones(1)
    with pytest.raises(ModelNotSupported, match=r"model\.layers\.2\.self_attn.*'position_bias'"):
        judge(model, trace, 64)


def test_windows_caps_and_sinks_are_found_per_layer() -> None:
    gemma = judge(*make_trace("gemma2"), 256)
    assert [layer.sliding_window for layer in gemma.layers] == [5, None, 5, None]
    assert {layer.softcap for layer in gemma.layers} == {6.0}
    assert (gemma.num_kv_heads, gemma.head_dim, gemma.vocab_size) == (2, 8, 259)
    assert all(layer.has_sinks for layer in judge(*make_trace("gpt_oss"), 256).layers)


def test_the_probe_leaves_no_trace_in_the_model() -> None:
    model, _ = make_trace("gemma3")
    assert model.config._attn_implementation == ATTENTION_NAME
    assert not hasattr(model.config, "_chorus_recorder")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_max_model_len_is_what_the_model_was_made_for_unless_less_is_asked() -> None:
    config = make_config("llama")
    assert resolve_max_model_len(config, None) == 256
    assert resolve_max_model_len(config, 100) == 100
    with pytest.raises(ConfigError, match="max_model_len=257 is more than the 256"):
        resolve_max_model_len(config, 257)
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        resolve_max_model_len(AutoConfig.for_model("bloom"), None)


def test_what_is_no_local_checkpoint_is_refused_without_asking_a_hub(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a folder"):
        load_model(EngineConfig(model="gpt2"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="safetensors"):
        load_model(EngineConfig(model=str(tmp_path)))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter"):
        load_model(EngineConfig(model=str(tmp_path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "'awq'"),
        ({"model_type": "nonsuch"}, "nonsuch"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "nonsuch"}, "trust_remote_code|nonsuch"),
        ({"num_hidden_layers": 4}, r"lacks the weights of .* model\.layers\.3"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_says_why(change: dict, message: str, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelNotSupported, match=message):
        load_model(EngineConfig(model=str(base)))
