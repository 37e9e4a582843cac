"""Models whose every layer has a window keep the blocks in sight and no others, and say what transformers says."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.core.block_pool import NULL_BLOCK
from engine.core.plan import StepPlan
from engine.runner.runner import TorchRunner
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy, block_bytes

WINDOW = 7  # of the tiny mistral
GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


def texts_of(prompts: list[list[int]], outputs: Any) -> list[Text]:
    return [Text(tuple(p), o.token_ids) for p, o in zip(prompts, outputs, strict=True)]


def long_prompts(seed: int = 0) -> list[list[int]]:
    """Of none to eight windows."""
    rng = random.Random(seed)
    return [[rng.randrange(60, 120) for _ in range(length)] for length in (3, 7, 8, 20, 33, 49, 60)]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    seen: list[StepPlan] = []
    submit = TorchRunner.submit

    def record(self: TorchRunner, plan: StepPlan) -> Any:
        seen.append(plan)
        return submit(self, plan)

    monkeypatch.setattr(TorchRunner, "submit", record)
    return seen


def make_llm(zoo: Zoo, arch: str = "mistral", **settings: Any) -> LLM:
    return LLM(
        zoo.base(arch),
        **{"max_num_seqs": 4, "block_size": 4, "num_threads": 1, "max_num_batched_tokens": 8, **settings},
    )


def most_live(plans: list[StepPlan]) -> int:
    return max(sum(block != NULL_BLOCK for block in piece.block_table) for plan in plans for piece in plan.slices)


def in_sight(block_size: int, rows: int, depth: int = 1) -> int:
    return -(-(WINDOW - 1 + depth * rows) // block_size) + 1


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_texts_of_many_windows_are_those_of_transformers(
    zoo: Zoo, plans: list[StepPlan], block_size: int, depth: int
) -> None:
    prompts = long_prompts()
    llm = make_llm(zoo, block_size=block_size, pipeline_depth=depth)
    assert_greedy(zoo.base("mistral"), None, texts_of(prompts, llm.generate(prompts, GREEDY)))
    assert most_live(plans) <= in_sight(block_size, rows=8, depth=depth) < 100 // block_size
    assert llm.stats().free_blocks == llm.stats().num_blocks


def test_int8_pages_drop_the_same_blocks(zoo: Zoo, plans: list[StepPlan]) -> None:
    """Rounded numbers differ from those of transformers; those of a cache that keeps its blocks they equal."""
    prompts = long_prompts(1)
    dropping = make_llm(zoo, kv_cache_dtype="int8").generate(prompts, GREEDY)
    assert most_live(plans) <= in_sight(4, rows=8)
    whole = make_llm(zoo, kv_cache_dtype="int8", block_size=64, max_num_batched_tokens=64).generate(prompts, GREEDY)
    same = [a.token_ids[:12] == b.token_ids[:12] for a, b in zip(dropping, whole, strict=True)]
    assert all(same), same


@pytest.mark.parametrize("caching", [True, False])
def test_a_cache_of_little_more_than_a_window_holds_texts_of_any_length(
    zoo: Zoo, plans: list[StepPlan], caching: bool
) -> None:
    """Sequences are preempted and begin anew; none could be held whole."""
    base, num_blocks = zoo.base("mistral"), 8
    llm = make_llm(
        zoo, kv_cache_bytes=num_blocks * block_bytes(base, 4), max_model_len=120, enable_prefix_caching=caching
    )
    prompts = long_prompts(2)
    assert_greedy(base, None, texts_of(prompts, llm.generate(prompts, replace(GREEDY, max_tokens=50))))
    assert llm.stats().total_preemptions > 0
    assert max(map(len, (piece.block_table for plan in plans for piece in plan.slices))) > 3 * num_blocks


def test_prefix_hits_and_guesses_and_forks_across_windows(zoo: Zoo, plans: list[StepPlan]) -> None:
    llm, base = make_llm(zoo), zoo.base("mistral")
    prompts = [long_prompts(3)[-1], long_prompts(3)[-1], [*long_prompts(3)[-1][:45], 70, 71, 72]]
    for _ in range(2):
        outputs = llm.generate(prompts, replace(GREEDY, prompt_lookup_num_tokens=3))
        assert_greedy(base, None, texts_of(prompts, outputs))
    assert llm.stats().total_prefix_hit_tokens >= 56 + 56 + 44  # of the second time alone
    sampled = replace(GREEDY, temperature=1.0, seed=3, n=3)
    (alone,), together = make_llm(zoo).generate([prompts[0]], sampled), llm.generate([prompts[0]] * 2, sampled)
    said = [[sample.token_ids for sample in output.samples] for output in (alone, *together)]
    assert said[0] == said[1] == said[2]
    assert len(set(said[0])) == 3
    assert any(plan.block_copies for plan in plans)
    assert most_live(plans) <= in_sight(4, rows=8)


@pytest.mark.parametrize("arch", ["gemma2", "gpt_oss"])
def test_a_model_with_a_layer_that_sees_everything_keeps_all_blocks(zoo: Zoo, plans: list[StepPlan], arch: str) -> None:
    prompts = long_prompts(4)
    llm = make_llm(zoo, arch)
    assert_greedy(zoo.base(arch), None, texts_of(prompts, llm.generate(prompts, replace(GREEDY, max_tokens=20))))
    assert not any(NULL_BLOCK in piece.block_table for plan in plans for piece in plan.slices)
