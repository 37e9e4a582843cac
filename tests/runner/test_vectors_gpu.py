"""Vectors and log-probabilities on a GPU are those of the CPU, beside decode steps that are recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.pooling import Pool
from tests.support.tiny_model import make_adapter, make_base

pytestmark = pytest.mark.gpu

PROMPTS = [list(range(1, 1 + length)) for length in (1, 5, 40, 100)]
NAMES = [None, "r4", None, "r4"]


def answers(llm: LLM) -> list[Any]:
    found: list[Any] = [
        output.embedding for pool in Pool for output in llm.embed(PROMPTS, NAMES, pool=pool, normalize=True)
    ]
    return [*found, *llm.next_token_logprobs(PROMPTS, [1, 2, 200], NAMES)]


def test_a_gpu_gives_the_vectors_of_the_cpu(tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "llama")
    adapters = {"r4": make_adapter(base, tmp_path / "r4", seed=4, rank=4, target_modules="all-linear")}
    on_cpu = answers(LLM(base, adapters, num_threads=1))
    llm = LLM(base, adapters, device="cuda", dtype="float32", max_num_seqs=8, max_num_batched_tokens=64)
    llm.generate(PROMPTS, SamplingParams(max_tokens=8, temperature=0.0), NAMES)  # with recorded steps in between
    for got, expected in zip(answers(llm), on_cpu, strict=True):
        assert got == pytest.approx(expected, abs=5e-3)
