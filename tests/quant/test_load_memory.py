"""What loading takes at its peak: the weights that are kept, and a file of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.support.load_memory import measure
from tests.support.quantized_files import make_twins

pytestmark = pytest.mark.slow

# Of 88 M weights, nearly all of them in layers: pages of libraries that are first used now are small beside them.
CONFIG = LlamaConfig(
    hidden_size=1024, intermediate_size=2816, num_hidden_layers=7, vocab_size=264, num_key_value_heads=8,
    num_attention_heads=16, max_position_embeddings=128,
)  # fmt: skip
SLACK_BYTES = 24 << 20  # code that is used first, and what the probing forward computed


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory") / "base"
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="40MB")
    return folder


def test_a_quantized_checkpoint_is_read_layer_by_layer(base: Path, tmp_path: Path) -> None:
    single = tmp_path / "single"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(single, max_shard_size="1GB")
    figures = measure(make_twins(single, tmp_path).quantized)
    print(figures)
    assert figures["peak_bytes"] < figures["kept_bytes"] + figures["largest_shard_bytes"] + SLACK_BYTES
    assert figures["after_bytes"] < figures["kept_bytes"] + SLACK_BYTES
