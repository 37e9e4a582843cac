"""Adapters in eight bits say what PEFT says with the same rounded weights, on every path that adapters take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, EngineConfig, SamplingParams
from engine.assembly import load_parts
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy
from tests.support.rounded_adapter import round_adapter

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
EVERYTHING = {  # all kinds of sites, scalings and ranks, of one base
    "r1": {"rank": 1},
    "r8 rank-stabilized": {"rank": 8, "use_rslora": True},
    "r64": {"rank": 64},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 3, "down_proj": 17}, "alpha_pattern": {"q_proj": 3}},
    "embedding and head": {"rank": 5, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
}


def adapters_of(zoo: Zoo, base: Path, features: dict[str, dict[str, Any]]) -> dict[str, Path]:
    return {
        name: zoo.adapter(base, name.replace(" ", "_"), seed, **arguments)
        for seed, (name, arguments) in enumerate(features.items(), start=60)
    }


def check(llm: LLM, base: Path, adapters: dict[str, Path], prompts: list[list[int]]) -> None:
    """Every adapter, and the base, in every step; against PEFT with the rounded weights."""
    names = [None, *adapters]
    names = [names[i % len(names)] for i in range(max(len(names), len(prompts)))]
    for output in llm.generate([prompts[i % len(prompts)] for i in range(len(names))], GREEDY, names):
        rounded = None
        if output.adapter:
            source = adapters[output.adapter]
            rounded = round_adapter(source, source.with_name(source.name + ".rounded"))
        assert len(output.token_ids) == GREEDY.max_tokens
        assert_greedy(base, rounded, [Text(output.prompt_token_ids, output.token_ids)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernels": "torch"},
        {"adapter_memory": "pages", "block_size": 1, "pipeline_depth": 2},
        {"adapter_memory": "pages", "block_size": 16, "kernels": "torch"},
    ],
    ids=str,
)
def test_mixed_adapters_say_what_peft_says(settings: dict[str, Any], zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base("llama")
    adapters = adapters_of(zoo, base, EVERYTHING)
    llm = LLM(base, adapters, adapter_dtype="int8", num_threads=1, max_num_seqs=8, **settings)
    check(llm, base, adapters, prompts[:6])


@pytest.mark.parametrize(("arch", "embedding"), [("gpt2", "wte"), ("gemma3", "embed_tokens")])
def test_other_architectures_say_what_peft_says(arch: str, embedding: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    """Conv1D, whose weights are stored the other way round, and embeddings that the base scales."""
    base = zoo.base(arch)
    adapters = adapters_of(zoo, base, {"r4": {"rank": 4}, "embedding": {"rank": 6, "target_modules": [embedding]}})
    llm = LLM(base, adapters, adapter_dtype="int8", num_threads=1, max_num_seqs=8)
    check(llm, base, adapters, prompts[:3])


def test_keys_and_values_behind_an_adapter_in_eight_bits_are_kept_apart_from_those_in_sixteen(zoo: Zoo) -> None:
    base = str(zoo.base("llama"))
    engines = [load_parts(EngineConfig(model=base, kernels="torch", adapter_dtype=dtype)) for dtype in ("auto", "int8")]
    assert engines[0].cache_namespace != engines[1].cache_namespace
    assert engines[0].image_spec.digest != engines[1].image_spec.digest


def test_where_four_adapters_found_room_in_bfloat16_seven_do_in_int8(zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base("llama")
    adapters = {f"a{i}": zoo.adapter(base, f"room{i}", i, rank=16) for i in range(7)}
    settings: dict[str, Any] = {"dtype": "bfloat16", "num_threads": 1, "max_num_seqs": 2}
    (num_bytes,) = {image.num_bytes for image in LLM(base, adapters, **settings)._images.values()}
    evictions, resident = {}, {}
    for adapter_dtype in ("auto", "int8"):
        llm = LLM(base, adapters, adapter_dtype=adapter_dtype, adapter_bytes=4 * num_bytes, **settings)
        for _ in range(2):
            llm.generate([prompts[0]] * 7, replace(GREEDY, max_tokens=2), list(adapters))
        evictions[adapter_dtype] = llm.stats().total_adapter_evictions
        resident[adapter_dtype] = len(llm.stats().resident_adapters)
    assert resident == {"auto": 4, "int8": 7}
    assert evictions["auto"] > 0
    assert evictions["int8"] == 0
