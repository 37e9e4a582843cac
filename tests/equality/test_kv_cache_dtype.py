"""The engine over a quantized KV cache: its texts are functions of the request alone, as over any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

from engine import LLM, EngineConfig, SamplingParams
from engine.assembly import load_parts
from engine.errors import ConfigError
from engine.model.loader import load_model
from engine.runner.memory import kv_shape
from tests.equality.conftest import Zoo
from tests.kv.quantized_oracle import round_rows
from tests.support.native import native_or_skip
from tests.support.plan_driver import PlanDriver
from tests.support.sizes import num_kv_blocks
from tests.support.tiny_model import reference_model

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=16, temperature=0.9, top_k=50, repetition_penalty=1.2, min_tokens=4)
SETTINGS: dict[str, Any] = {"max_num_seqs": 8, "block_size": 4, "num_threads": 1, "kv_cache_dtype": "int8"}
# Of one block of 4 tokens of the tiny model: 3 layers, keys and values, 2 heads of size 8 and a scale each, as 64s.
BLOCK_BYTES = 3 * 2 * -(-4 * 2 * (8 + 4) // 64) * 64


@pytest.fixture
def base(zoo: Zoo) -> Path:
    return zoo.base("llama")


def essence(llm: LLM, prompts: list[list[int]], names: list[str | None]) -> list[Any]:
    params = [replace(SAMPLED if i % 2 else GREEDY, seed=i) for i in range(len(prompts))]
    return [(output.token_ids, output.finish_reason) for output in llm.generate(prompts, params, names)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_do_not_depend_on_scheduling(zoo: Zoo, base: Path, prompts: list[list[int]], dtype: str) -> None:
    """Chunks, batches, blocks, prefix hits and preemption write the same rows, and read the same."""
    native_or_skip()
    adapters = zoo.three_adapters(base)
    names = [None, *adapters] * 2
    usual = essence(LLM(base, adapters, dtype=dtype, **SETTINGS), prompts, names)
    assert len({token_ids for token_ids, _ in usual}) == len(prompts)
    for settings in (
        {"max_num_batched_tokens": 8},
        {"block_size": 16, "enable_prefix_caching": False, "max_num_seqs": 1},
        {"adapter_memory": "pages", "pipeline_depth": 2},
        {"kv_cache_bytes": 40 * BLOCK_BYTES, "max_model_len": 96},
    ):
        llm = LLM(base, adapters, **{"dtype": dtype, **SETTINGS, **settings})
        assert essence(llm, prompts, names) == usual, settings
        assert (llm.stats().total_preemptions > 0) == ("kv_cache_bytes" in settings)
    # Asked again, most of each prompt is a prefix that was computed before.
    llm = LLM(base, adapters, dtype=dtype, **SETTINGS)
    assert [essence(llm, prompts, names) for _ in range(2)] == [usual] * 2
    assert llm.stats().total_prefix_hit_tokens > sum(map(len, prompts)) / 2


def test_samples_that_share_a_prompt_are_the_same_in_any_batch(base: Path, prompts: list[list[int]]) -> None:
    """Side by side they share its blocks, and copy the last, scales and all, to go on in it."""
    native_or_skip()
    params = replace(SAMPLED, n=3, seed=5)
    texts = []
    for settings in ({}, {"max_num_seqs": 1}, {"block_size": 1}):
        output = LLM(base, **{**SETTINGS, **settings}).generate([prompts[4]], params)[0]
        texts.append([sample.token_ids for sample in output.samples])
    assert len(set(texts[0])) == 3
    assert texts[1:] == texts[:1] * 2


def rounded_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: Any) -> Any:
    """transformers' attention over rows that the oracle has rounded, in float64."""
    quantization = module.config.kv_quantization
    keys, values = (round_rows(x, quantization).repeat_interleave(2, dim=1) for x in (k, v))
    out = functional.scaled_dot_product_attention(q.double(), keys, values, is_causal=True)
    return out.to(q.dtype).transpose(1, 2), None


AttentionInterface.register("rounded_kv", rounded_attention)


@pytest.mark.parametrize(
    ("kernels", "quantization"), [("native", "int8"), ("torch", "int8"), ("torch", "fp8"), ("triton", "int8")]
)
def test_logits_are_those_of_transformers_over_rounded_keys_and_values(
    zoo: Zoo, prompts: list[list[int]], kernels: str, quantization: str
) -> None:
    """A number between two codes may fall to either, so a logit may be off by more than sums are; 20 times as much as
    that is what the rounding itself does.
    """
    if kernels == "native":
        native_or_skip()
    if kernels == "triton":  # whose interpreter is slow
        base, prompt, chunks = zoo.base("llama", num_hidden_layers=1), prompts[3], (15,)
    else:
        base, prompt, chunks = zoo.base("llama"), prompts[6], (11, 5)
    driver = PlanDriver(base, kernels=kernels, kv_cache_dtype=quantization)
    driver.add(prompt)
    driver.run(1, chunks)
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="rounded_kv")
    model.config.kv_quantization = quantization
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1]
        plain = reference_model(base, None)(torch.tensor([prompt])).logits[0, -1]
    found = driver.logits[0][0]
    assert (found - expected).abs().max() * 20 < (plain - expected).abs().max()
    assert torch.equal(found.argmax(), plain.argmax())


def test_the_same_bytes_hold_more_tokens(base: Path) -> None:
    settings: dict[str, Any] = {"model": str(base), "block_size": 4, "max_model_len": 96}
    settings["kv_cache_bytes"] = 100 * BLOCK_BYTES + 5
    loaded = load_model(EngineConfig(model=str(base), max_model_len=96))
    config = EngineConfig(kv_cache_dtype="int8", **settings)
    assert kv_shape(loaded, config).block_bytes == BLOCK_BYTES
    assert num_kv_blocks(loaded, config) == 100
    plain = EngineConfig(**settings)
    assert num_kv_blocks(loaded, plain) == 50  # 3 x 2 x 4 x 2 x 8 elements of 4 bytes


def test_a_prefix_is_never_taken_from_a_cache_of_other_numbers(base: Path) -> None:
    namespaces = [
        load_parts(EngineConfig(model=str(base), kernels="torch", **settings)).cache_namespace
        for settings in ({}, {"kv_cache_dtype": "int8"}, {"kv_cache_dtype": "fp8"}, {"dtype": "bfloat16"})
    ]
    assert len(set(namespaces)) == 4


def test_fp8_is_refused_where_no_device_has_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp8' needs a GPU, and this is device='cpu': use 'int8'"):
        LLM(base, kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="kv_cache_dtype='fp4' is not one of 'auto', 'int8', 'fp8'"):
        LLM(base, kv_cache_dtype="fp4")
    loaded = replace(load_model(EngineConfig(model=str(base))), device=torch.device("cuda", 0))
    config = EngineConfig(model=str(base), kv_cache_dtype="fp8", device="cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(ConfigError, match=r"compute capability 9\.0 \(Hopper\) or later, and this one has 8\.9"):
        kv_shape(loaded, config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert kv_shape(loaded, config).quantization == "fp8"


def test_the_layers_of_a_quantized_cache_are_compiled_too(base: Path) -> None:
    native_or_skip()
    driver = PlanDriver(base, kernels="native", kv_cache_dtype="int8")
    kinds = [type(layer).__name__ for layer in driver.loaded.model.model.layers]
    assert kinds == ["NativeDecoder", "ComputedBefore", "ComputedBefore"]
