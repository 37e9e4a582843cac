"""The sampler's budget against what it makes: every tensor of a step is counted while it is alive.

On the meta device, so that it takes the path of a GPU, at sizes that no test could hold.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine.core.plan import SequenceStart
from engine.grammar.compiler import Grammars
from engine.grammar.spec import GrammarSpec
from engine.request import SamplingParams
from engine.runner.inputs import SampledRow
from engine.runner.sampler import Sampler
from engine.runner.sampler_memory import HISTORY_BYTES, ONCE_BYTES, Use, sampled_row_bytes
from engine.text.tokenizer import Tokenizer
from tests.support.peak_memory import PeakMemory
from tests.support.tiny_model import make_tokenizer

# What CUDA's sort of rows takes beside what it returns: keys, and pairs of indices and rows, twice.
WORKSPACES = {"sort": 24}
NAMES: dict[str, tuple[dict[str, Any], set[Use]]] = {
    "greedy": ({"temperature": 0.0}, {"greedy"}),
    "temperature": ({"temperature": 1.0}, {"temperature"}),
    "top_p": ({"temperature": 1.0, "top_p": 0.9}, {"filters"}),
    "top_k": ({"temperature": 1.0, "top_k": 50}, {"filters"}),
    "min_p": ({"temperature": 1.0, "min_p": 0.1}, {"filters"}),
    "typical_p": ({"temperature": 1.0, "typical_p": 0.5}, {"filters"}),
    "bad words": ({"temperature": 0.0, "bad_words_token_ids": ((3,), (4, 5))}, {"greedy"}),
    "allowed": ({"temperature": 0.0, "allowed_token_ids": tuple(range(900))}, {"greedy"}),
    "grammar": ({"temperature": 0.0, "grammar": GrammarSpec("json_object")}, {"greedy"}),
    "presence": ({"temperature": 0.0, "presence_penalty": 0.5}, {"penalties"}),
    "repetition": ({"temperature": 0.0, "repetition_penalty": 1.5}, {"penalties"}),
    "logprobs": ({"temperature": 0.0, "logprobs": 5}, {"logprobs"}),
    "top_p and logprobs": ({"temperature": 1.0, "top_p": 0.9, "logprobs": 5}, {"filters", "logprobs"}),
    "everything": (
        {
            "temperature": 1.0, "top_p": 0.9, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.2, "logprobs": 20,
            "min_tokens": 5, "logit_bias": {3: 1.0}, "typical_p": 0.5, "bad_words_token_ids": ((3,), (4, 5)),
        },
        {"filters", "penalties", "logprobs"},
    ),
}  # fmt: skip
SHAPES = [(1, 32000), (64, 49152), (256, 128256), (8, 1000)]
GREEDY: dict[str, Any] = {"temperature": 0.0}


def peak_of_a_step(params: list[dict[str, Any]], vocab_size: int, dtype: torch.dtype) -> int:
    """Bytes, the logits themselves included, the tables of penalties not."""
    sampler = Sampler(vocab_size, "meta", (1,), grammars=Grammars(Tokenizer(make_tokenizer()), vocab_size, (258,)))
    for i, fields in enumerate(params):
        sampler.start(SequenceStart(i, (1, 2, 3), (), SamplingParams(**fields), seed=1, sample_index=0))
    rows = tuple(SampledRow(i, i, 0, 0) for i in range(len(params)))
    with PeakMemory(workspaces=WORKSPACES) as memory:
        logits = torch.empty(len(params), vocab_size, dtype=dtype, device="meta")
        sampled = sampler.sample(logits, rows)
    assert sampled.token_ids.shape == (len(params),)
    return memory.peak_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "vocab_size"), SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_no_less_than_the_peak_and_no_more_than_half_as_much_again(
    name: str, num_rows: int, vocab_size: int, dtype: torch.dtype
) -> None:
    fields, uses = NAMES[name]
    peak = peak_of_a_step([fields] * num_rows, vocab_size, dtype)
    once = ONCE_BYTES * vocab_size
    budget = num_rows * sampled_row_bytes(vocab_size, dtype.itemsize, uses, mixed=False) + once
    assert peak <= budget
    if vocab_size > 4096:  # below, what every row takes however few tokens there are counts most
        assert budget - once <= 1.5 * peak


@pytest.mark.parametrize("others", NAMES)
def test_the_budget_of_a_start_holds_steps_of_any_mixture(others: str) -> None:
    """Rows of one kind are taken out of the step's logits, which stay."""
    num_rows, vocab_size = 64, 49152
    params = [NAMES["everything"][0], *[NAMES[others][0]] * (num_rows - 2), GREEDY]
    assert peak_of_a_step(params, vocab_size, torch.float32) <= num_rows * sampled_row_bytes(vocab_size, 4)


def test_the_tables_of_penalties_are_counted_while_they_grow() -> None:
    vocab_size, params = 32000, SamplingParams(presence_penalty=0.5)
    sampler = Sampler(vocab_size, "meta")
    with PeakMemory() as memory:
        for i in range(64):
            sampler.start(SequenceStart(i, (1, 2, 3), (), params, seed=1, sample_index=0))
    tables = 64 * HISTORY_BYTES * vocab_size
    assert tables <= memory.now_bytes <= 1.1 * tables
    # The old and the new ones are there together, but no step's logits meanwhile.
    assert memory.peak_bytes <= tables + 64 * sampled_row_bytes(vocab_size, 4)


def test_tensors_that_end_no_longer_count() -> None:
    with PeakMemory() as memory:
        first = torch.ones(1000)
        del first
        second = torch.ones(500)
        view = second[:10].view(2, 5)
        assert memory.now_bytes == 2000
        del second
        assert memory.now_bytes == 2000  # a view holds it
        del view
    assert (memory.now_bytes, memory.peak_bytes) == (0, 4000)
