"""The first look at logits: compiled and in torch it says the same, also of rows that are not finite."""

from __future__ import annotations

import math
import random

import pytest
import torch

from engine.request import SamplingParams
from engine.runner.sampler import Sampler
from engine.runner.scan import scan
from tests.support import sampling_oracle
from tests.support.native import native_or_skip
from tests.support.sampling import row_of, sample, start_of
from tests.support.sampling_oracle import Row
from tests.support.sampling_rows import random_batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 15, 64, 65, 300, 5000])
def test_values_and_maxima_are_those_of_torch(dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    stand_in = torch.zeros(vocab_size)
    for as_float in (False, True):
        found = scan(logits.clone(), stand_in, native_or_skip(), as_float=as_float)
        expected = scan(logits.clone(), stand_in, None, as_float=as_float)
        assert torch.equal(found.values.float(), expected.values)
        assert torch.equal(found.blocks, expected.blocks)
        assert found.finite is expected.finite is None
        assert found.values.dtype is torch.float32 or not as_float


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [0, 63, 64, 129])
def test_a_row_that_is_not_finite_is_found_and_replaced(dtype: torch.dtype, bad: float, column: int) -> None:
    logits = torch.randn(3, 130).to(dtype)
    logits[1, column] = bad
    stand_in = -torch.arange(130, dtype=torch.float32)
    found = scan(logits, stand_in, native_or_skip(), as_float=True)
    assert found.finite is not None
    assert found.finite.tolist() == [True, False, True]
    assert torch.equal(found.values[1], stand_in)
    assert found.blocks[1].tolist() == [0.0, -64.0, -128.0]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.0, "logit_bias": {7: 3.0}},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_are_chosen(params: dict[str, object], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(9, 700, generator=torch.Generator().manual_seed(1))).to(dtype)
    chosen = []
    for library in (None, native_or_skip()):
        sampler = Sampler(700, library=library)
        for i in range(9):
            sampler.start(start_of(i, Row([], SamplingParams(max_tokens=None, **params), seed=i)))  # type: ignore[arg-type]
        chosen.append(sampler.sample(logits.clone(), tuple(row_of(i, 0) for i in range(9))).samples)
    assert chosen[0] == chosen[1]


@pytest.mark.parametrize("vocab_size", [1, 63, 65, 300, 4099])
def test_any_mixture_of_parameters_equals_the_float64_oracle(vocab_size: int) -> None:
    forgiven = 0
    for num_rows in (1, 17, 30):
        rows = random_batch(random.Random(vocab_size + num_rows), vocab_size, num_rows)
        for row, found in zip(rows, sample(rows, library=native_or_skip()), strict=True):
            expected, slack = sampling_oracle.token(row)
            if found.token_ids != (expected,):
                assert slack < 1e-6, row.params
                forgiven += 1
    assert forgiven <= 1
