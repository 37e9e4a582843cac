"""What the model says of the tokens of a prompt, against transformers and PEFT: of any batch, chunk and adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import InvalidRequest
from engine.pooling import PromptScores, PromptToken, prompt_tokens
from tests.equality.conftest import Zoo
from tests.equality.oracle import block_bytes
from tests.support.tiny_model import reference_logits

ARCHITECTURES = ["llama", "gemma2", "qwen3", "gpt2", "mixtral"]
TOP = 3


def make_llm(base: Path, adapters: dict[str, Path] | None = None, **settings: Any) -> LLM:
    return LLM(base, adapters, **{"max_num_seqs": 8, "block_size": 4, "num_threads": 1, **settings})


def _check(base: Path, adapter: Path | None, prompt: list[int], told: tuple[PromptToken, ...]) -> None:
    limit = 5e-5  # float32 on both sides, of logits up to ten
    logprobs = reference_logits(base, adapter, prompt).float().log_softmax(-1)
    assert [one.token_id for one in told] == prompt[1:]
    for row, one in zip(logprobs[:-1], told, strict=True):
        assert abs(one.logprob - float(row[one.token_id])) < limit
        assert one.rank == int((row > row[one.token_id]).sum()) + 1
        values, _ = row.topk(TOP)
        assert len(one.top) == TOP
        for (token_id, logprob), value in zip(one.top, values.tolist(), strict=True):
            assert abs(logprob - value) < limit
            assert abs(logprob - float(row[token_id])) < limit


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_they_are_those_of_transformers_and_peft(arch: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base(arch)
    adapters = zoo.three_adapters(base) if arch in ("llama", "qwen3") else {}
    names = [None, *adapters, None, *adapters]
    asked = [prompt for prompt in prompts if len(prompt) > 1][: len(names)]
    told = make_llm(base, adapters).prompt_logprobs(asked, TOP, names[: len(asked)])
    for prompt, name, one in zip(asked, names, told, strict=False):
        _check(base, adapters[name] if name else None, prompt, one)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 8},
        {"pipeline_depth": 2, "block_size": 16},
        {"kv_cache_bytes": 24, "max_model_len": 80},  # blocks
    ],
    ids=str,
)
def test_no_chunk_neighbour_or_cached_prefix_changes_them(
    settings: dict[str, Any], zoo: Zoo, prompts: list[list[int]]
) -> None:
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    names = [None, *adapters, None, *adapters]
    if "kv_cache_bytes" in settings:
        settings = {**settings, "kv_cache_bytes": settings["kv_cache_bytes"] * block_bytes(base, 4)}
    llm = make_llm(base, adapters, **settings)
    for _ in range(2):  # again, when the prefix is cached
        for prompt, name, told in zip(prompts, names, llm.prompt_logprobs(prompts, TOP, names), strict=True):
            _check(base, adapters[name] if name else None, prompt, told)
        llm.generate(prompts, SamplingParams(max_tokens=3), names)
    assert llm.stats().total_prefix_hit_tokens > 0, "their blocks serve others"


def test_an_adapter_of_the_output_layer_counts(zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base("llama")
    adapter = zoo.adapter(base, "head", 77, rank=4, target_modules=["q_proj", "lm_head"])
    (told,) = make_llm(base, {"head": adapter}).prompt_logprobs([prompts[3]], TOP, "head")
    _check(base, adapter, prompts[3], told)


def test_one_token_has_nothing_said_of_it_and_bad_numbers_are_refused(zoo: Zoo) -> None:
    assert make_llm(zoo.base("llama")).prompt_logprobs([[65]]) == [()]
    for wrong in (-1, 21, True, "1"):
        with pytest.raises(InvalidRequest, match="prompt_logprobs"):
            PromptScores(top=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="numbers"):
        prompt_tokens(b"1234", PromptScores(), (1, 2, 3))
    assert torch.get_default_dtype() is torch.float32
