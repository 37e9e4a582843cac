"""What models of real shapes need, counted on the meta device: no weight exists."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from engine.runner.sampler_memory import HISTORY_BYTES, sampled_row_bytes
from engine.sizing.room import MIB, Needs

SHAPES: dict[str, Any] = {
    "135m": LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "0.5b": Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True,
    ),
    "8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "7b-32k": MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32000, max_position_embeddings=32768, tie_word_embeddings=False,
    ),
    "70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
}  # fmt: skip


@lru_cache
def needs_of(name: str, *, bits: int = 16, gpu: bool = False) -> Needs:
    config = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    in_linears = sum(m.weight.numel() for m in linears)
    head_dim = config.hidden_size // config.num_attention_heads
    return Needs(
        weight_bytes=2 * (model.num_parameters() - in_linears) + in_linears * bits // 8,
        context_tokens=config.max_position_embeddings,
        block_size=16,
        block_bytes=16 * config.num_hidden_layers * 2 * config.num_key_value_heads * head_dim * 2,
        rank_bytes=2 * sum(sum(m.weight.shape) for m in linears),
        row_bytes=2 * (8 * config.hidden_size + 4 * config.intermediate_size) + 8 * config.hidden_size,
        sampled_row_bytes=sampled_row_bytes(config.vocab_size, 4),
        sequence_bytes=HISTORY_BYTES * config.vocab_size,
        sequence_token_bytes=2,
        fixed_bytes=1280 * MIB if gpu else 0,
    )
