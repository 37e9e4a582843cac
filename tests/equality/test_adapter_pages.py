"""Adapters in pages of the KV cache say what transformers and PEFT say, however little room they share with sequences.

On the CPU, where pages are asked for: the policy, the layout and the copies are those of a GPU.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, EngineConfig, SamplingParams
from engine.engine import Engine
from engine.errors import AdapterTooLarge, ConfigError
from engine.lora.copier import HostPages
from engine.lora.pages import lay_out
from engine.request import Request
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy, block_bytes

GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)


def check(
    llm: LLM, base: Path, adapters: dict[str, Path], prompts: list[list[int]], params: SamplingParams = GREEDY
) -> None:
    names = ([None, *adapters] * len(prompts))[: len(prompts)]
    for _ in range(2):  # the second time from what the first has left resident and cached
        for output in llm.generate(prompts, params, names):
            assert len(output.token_ids) == params.max_tokens
            folder = adapters[output.adapter] if output.adapter else None
            assert_greedy(base, folder, [Text(output.prompt_token_ids, output.token_ids)])
    assert llm.stats().total_load_waits == 0


@pytest.mark.parametrize(
    ("kernels", "block_size", "pipeline_depth"), [("auto", 1, 2), ("torch", 4, 2), ("auto", 16, 1)]
)
def test_text_is_that_of_peft(
    kernels: str, block_size: int, pipeline_depth: int, zoo: Zoo, prompts: list[list[int]]
) -> None:
    """Blocks of one token are smaller than most tensors of these adapters; those of sixteen hold several."""
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    llm = LLM(
        base, adapters, adapter_memory="pages", kernels=kernels, block_size=block_size, pipeline_depth=pipeline_depth,
        num_threads=1, max_num_seqs=8,
    )  # fmt: skip
    engine = llm._engine
    runs = [run for image in llm._images.values() for run in lay_out(image.manifest, engine._page_bytes).runs]
    assert (max(runs) > 1) == (block_size == 1)
    check(llm, base, adapters, prompts)
    assert llm.stats().adapter_pages == sum(runs)


@pytest.mark.parametrize(("kernels", "block_size"), [("auto", 1), ("auto", 16), ("torch", 4)])
@pytest.mark.parametrize("arch", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_what_was_left_in_a_page_is_never_read(
    arch: str, kernels: str, block_size: int, zoo: Zoo, prompts: list[list[int]]
) -> None:
    """Bytes of an adapter read as KV, or of KV as an adapter, may be NaN, and 0 * NaN is NaN."""
    base = zoo.base(arch)
    adapters = zoo.three_adapters(base)
    llm = LLM(
        base, adapters, adapter_memory="pages", kernels=kernels, block_size=block_size, num_threads=1, max_num_seqs=8
    )
    llm._engine._runner._storage.data.fill_(float("nan"))  # type: ignore[attr-defined]
    check(llm, base, adapters, prompts)


@pytest.mark.parametrize("arch", ["gpt2", "gemma2"])
def test_text_of_other_architectures_is_that_of_peft(arch: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base(arch)
    adapters = zoo.three_adapters(base)
    llm = LLM(base, adapters, adapter_memory="pages", block_size=4, num_threads=1, max_num_seqs=8)
    check(llm, base, adapters, prompts)


@pytest.mark.parametrize("floor_pages", [0, 12])
def test_text_is_that_of_peft_where_sequences_and_adapters_fight_for_pages(
    floor_pages: int, zoo: Zoo, prompts: list[list[int]]
) -> None:
    base = zoo.base("llama")
    adapters = {name: zoo.adapter(base, name, seed, rank=4) for seed, name in enumerate("abc", start=40)}
    page = block_bytes(base, 4)
    probe = LLM(base, adapters, adapter_memory="pages", block_size=4, num_threads=1)
    num_pages = max(sum(lay_out(image.manifest, page).runs) for image in probe._images.values())
    per_sequence = 24
    llm = LLM(
        base, adapters, adapter_memory="pages", block_size=4, num_threads=1, max_num_seqs=8, max_model_len=96,
        kv_cache_bytes=page * (1 + per_sequence + num_pages + num_pages // 2),
        min_adapter_bytes=floor_pages * page, pipeline_depth=2,
    )  # fmt: skip
    check(llm, base, adapters, prompts, replace(GREEDY, max_tokens=30))
    stats = llm.stats()
    assert stats.total_adapter_evictions > 0
    assert stats.total_preemptions > 0
    assert stats.adapter_pages + stats.free_blocks == stats.num_blocks


def test_a_cache_too_small_for_a_sequence_and_the_floor_is_refused_at_start(zoo: Zoo) -> None:
    base = zoo.base("llama")
    page = block_bytes(base, 4)
    sizes: dict[str, Any] = {"kv_cache_bytes": 30 * page, "max_model_len": 96, "block_size": 4}
    with pytest.raises(ConfigError, match="needs 35, with the null block and 10 for adapters"):
        LLM(base, adapter_memory="pages", min_adapter_bytes=10 * page, **sizes)
    LLM(base, adapter_memory="pages", min_adapter_bytes=5 * page, **sizes)


def test_an_adapter_that_finds_no_pages_is_refused_before_anything_runs(zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    page = block_bytes(base, 4)
    llm = LLM(base, adapters, adapter_memory="pages", kv_cache_bytes=27 * page, max_model_len=96, block_size=4)
    with pytest.raises(AdapterTooLarge, match=r"pages, but adapter_bytes is 2 pages; raise .* kv_cache_bytes"):
        llm.generate(prompts, GREEDY, "r8")


def test_no_step_waits_for_a_copy_that_does_not_end(
    zoo: Zoo, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is held back by a gate while all other sequences run to their end."""
    gate, begun = threading.Event(), threading.Event()
    put = HostPages.put

    def held_back(self: HostPages, index: int, num_bytes: int, dst: int) -> None:
        begun.set()
        assert gate.wait(60)
        put(self, index, num_bytes, dst)

    monkeypatch.setattr(HostPages, "put", held_back)
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    images = LLM(base, adapters, adapter_memory="pages", num_threads=1)._images
    config = EngineConfig(model=str(base), adapter_memory="pages", num_threads=1, block_size=4)
    engine = Engine(config)
    key = images["r4"].key
    cold = Request(request_id="cold", prompt_token_ids=tuple(prompts[2]), params=GREEDY, seed=0, adapter=key)
    engine.add_request(cold, images["r4"])
    for i in range(4):
        engine.add_request(Request(request_id=f"base{i}", prompt_token_ids=tuple(prompts[i]), params=GREEDY, seed=0))
    texts: dict[str, list[int]] = {}
    while sum(len(text) for text in texts.values()) < 4 * 16:
        for update in engine.step():
            texts.setdefault(update.request_id, []).extend(update.token_ids)
    assert begun.is_set()
    assert "cold" not in texts
    assert engine.stats().total_steps >= 16
    assert engine.stats().total_load_waits == 0
    gate.set()
    while engine.has_work:
        for update in engine.step():
            texts.setdefault(update.request_id, []).extend(update.token_ids)
    assert_greedy(base, adapters["r4"], [Text(tuple(prompts[2]), tuple(texts["cold"]))])
    assert engine.stats().total_load_waits == 0
