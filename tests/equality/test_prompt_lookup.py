"""Guesses of prompt lookup change the number of steps and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, FinishReason, SamplingParams
from engine.errors import InvalidRequest
from tests.equality.conftest import Zoo

DEMO = Path(__file__).parents[2] / "demo" / "base"
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
# Three letters at random: the last few were there before, and what followed is right one time in three.
LETTERS = dict.fromkeys((65, 66, 67), 20.0)
SAMPLED = replace(GREEDY, temperature=0.9, top_k=50, top_p=0.95, logit_bias=LETTERS, min_tokens=4)
NUM_GUESSES = 6


def make_llm(base: Path, adapters: dict[str, Path] | None = None, **settings: Any) -> LLM:
    return LLM(
        base, adapters, **{"max_num_seqs": 8, "block_size": 4, "num_threads": 1, "max_model_len": 128, **settings}
    )


def essence(outputs: Any) -> list[Any]:
    return [(output.token_ids, output.text, output.finish_reason) for output in outputs]


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_guessing_ahead_changes_no_token_and_no_logprob(kind: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    params = replace({"greedy": GREEDY, "sampled": SAMPLED}[kind], seed=5, logprobs=2)
    # Text that repeats itself: what comes next is guessed often, and often wrongly.
    asked = [(prompt * 4)[:40] for prompt in prompts]
    names = [[None, *adapters][i % (1 + len(adapters))] for i in range(len(asked))]
    plain = make_llm(base, adapters).generate(asked, params, names)
    num_right = 0
    for pipeline_depth, max_num_batched_tokens in ((1, 1024), (2, 1024), (1, 12)):
        settings = {"pipeline_depth": pipeline_depth, "max_num_batched_tokens": max_num_batched_tokens}
        llm = make_llm(base, adapters, **settings)
        guessed = llm.generate(asked, replace(params, prompt_lookup_num_tokens=NUM_GUESSES), names)
        assert essence(guessed) == essence(plain)
        for one, other in zip(guessed, plain, strict=True):
            assert one.logprobs is not None
            assert other.logprobs is not None
            assert [item.token_id for item in one.logprobs] == [item.token_id for item in other.logprobs]
            for a, b in zip(one.logprobs, other.logprobs, strict=True):
                assert abs(a.logprob - b.logprob) < 1e-4
        stats = llm.stats()
        assert stats.total_guessed_tokens > stats.total_guessed_right_tokens
        num_right += stats.total_guessed_right_tokens
    assert num_right > 0, "where prompts leave few rows it may be none"


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(DEMO, num_threads=1, enable_prefix_caching=False)


def steps_of(llm: LLM, messages: str, **params: Any) -> tuple[Any, int]:
    before = llm.stats().total_steps
    asked = SamplingParams(**{"max_tokens": 64, "temperature": 0.0, **params})
    (output,) = llm.chat([{"role": "user", "content": messages}], asked)
    return output, llm.stats().total_steps - before


def test_a_model_that_repeats_what_it_read_takes_half_the_steps_or_less(demo: LLM) -> None:
    plain, plain_steps = steps_of(demo, "over the lazy dog they went")
    guessed, guessed_steps = steps_of(demo, "over the lazy dog they went", prompt_lookup_num_tokens=8)
    assert guessed.text == plain.text == "over the lazy dog they went"
    assert guessed_steps <= plain_steps / 2


def test_a_stop_string_inside_right_guesses_ends_the_text_where_it_would(demo: LLM) -> None:
    for stop in ("lazy", "dog t", "went"):
        plain, _ = steps_of(demo, "over the lazy dog they went", stop=stop)
        guessed, _ = steps_of(demo, "over the lazy dog they went", stop=stop, prompt_lookup_num_tokens=8)
        assert (guessed.text, guessed.token_ids) == (plain.text, plain.token_ids)
        assert guessed.finish_reason is plain.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("max_tokens", [1, 2, 5, 13])
def test_length_is_kept_to_the_token(demo: LLM, max_tokens: int) -> None:
    output, _ = steps_of(demo, "over the lazy dog they went", max_tokens=max_tokens, prompt_lookup_num_tokens=8)
    assert len(output.token_ids) == max_tokens
    assert output.finish_reason is FinishReason.LENGTH


def test_guesses_and_penalties_exclude_each_other() -> None:
    with pytest.raises(InvalidRequest, match="prompt_lookup_num_tokens: 4 cannot be combined with repetition"):
        SamplingParams(prompt_lookup_num_tokens=4, repetition_penalty=1.1)
    with pytest.raises(InvalidRequest, match=r"value 65 is outside \[0, 64\]"):
        SamplingParams(prompt_lookup_num_tokens=65)
