"""The sampler against its meaning in float64, one row at a time; and rows that never feel each other."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.request import SamplingParams
from engine.runner.sampler import Sampler
from tests.support import sampling_oracle
from tests.support.sampling import logits_of, row_of, sample, start_of
from tests.support.sampling_oracle import Row
from tests.support.sampling_rows import random_batch

# One vocabulary on each side of every size the sampler distinguishes (blocks of 64, shortlists above 4096).
VOCABULARIES = [1, 2, 63, 64, 65, 300, 4096, 4099]


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_any_mixture_of_parameters_equals_the_float64_oracle(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    forgiven = 0
    for num_rows in (1, 2, 17, 30):
        rows = random_batch(rng, vocab_size, num_rows)
        for row, found in zip(rows, sample(rows), strict=True):
            expected, slack = sampling_oracle.token(row)
            if found.token_ids != (expected,):
                assert slack < 1e-6, row.params
                forgiven += 1
    assert forgiven <= 1  # a draw within 1e-6 of another token: about one in ten thousand


@pytest.mark.parametrize("vocab_size", [65, 4099])
def test_the_sample_of_a_row_depends_on_no_other_row_and_no_order(vocab_size: int) -> None:
    rng = random.Random(7)
    rows = random_batch(rng, vocab_size, 24)
    together = sample(rows)
    shuffled = sample(rows, order=rng.sample(range(24), 24))
    alone = [sample([row])[0] for row in rows]
    assert [s.token_ids for s in together] == [s.token_ids for s in shuffled] == [s.token_ids for s in alone]
    assert [s.logprobs for s in together] == [s.logprobs for s in shuffled]
    assert [s.logprobs for s in together] == [s.logprobs for s in alone]


def frequencies(logits: list[float], **params: Any) -> torch.Tensor:
    """How often each token comes in 20,000 draws: 500 seeds at 40 positions."""
    made = SamplingParams(max_tokens=None, **params)
    sampler = Sampler(len(logits))
    for seed in range(500):
        sampler.start(start_of(seed, Row(logits, made, seed=seed)))
    tokens = []
    for position in range(40):
        step = sampler.sample(torch.tensor(logits).repeat(500, 1), tuple(row_of(i, position) for i in range(500)))
        tokens.append(step.token_ids)
    return torch.bincount(torch.cat(tokens), minlength=len(logits)).double()


@pytest.mark.parametrize("params", [{}, {"temperature": 0.6}, {"top_k": 70}, {"temperature": 1.5, "top_p": 0.999999}])
def test_frequencies_follow_the_softmax(params: dict[str, Any]) -> None:
    """A chi-square test on 20,000 draws with fixed seeds: the outcome is the same on every run."""
    torch.manual_seed(3)
    logits = torch.randn(70) * 1.5
    observed = frequencies(logits.tolist(), **params)
    expected = 20_000 * torch.softmax(logits.double() / params.get("temperature", 1.0), dim=0)
    large = expected >= 5  # the rule of thumb for the test to hold
    if not large.all():
        observed = torch.cat((observed[large], observed[~large].sum()[None]))
        expected = torch.cat((expected[large], expected[~large].sum()[None]))
    degrees = len(expected) - 1
    chi_square = float(((observed - expected) ** 2 / expected).sum())
    assert chi_square < degrees + 3.3 * (2 * degrees) ** 0.5  # about one in a thousand


def test_tokens_that_filters_drop_are_never_drawn() -> None:
    logits = [2.0, 1.0, 0.0, -1.0, -9.0]
    assert (frequencies(logits, top_k=2) > 0).tolist() == [True, True, False, False, False]
    assert (frequencies(logits, top_p=0.8) > 0).tolist() == [True, True, False, False, False]
    assert (frequencies(logits, min_p=0.1) > 0).tolist() == [True, True, True, False, False]


def test_a_shortlist_that_is_too_short_is_drawn_up_again() -> None:
    """Flat logits over a large vocabulary: the nucleus has thousands of tokens, far more than the first shortlist."""
    torch.manual_seed(5)
    logits = (torch.randn(6000) * 0.1).tolist()
    for top_p in (0.5, 0.9, 0.9999):
        for seed in range(8):
            row = Row(logits, SamplingParams(top_p=top_p), seed=seed)
            assert sample([row])[0].token_ids == (sampling_oracle.token(row)[0],)


def test_choosing_reads_nothing_back_from_the_device() -> None:
    """On a device whose tensors have no values, whoever asked for one would fail: no step waits for the one before."""
    rows = random_batch(random.Random(1), 4099, 30)
    sampler = Sampler(4099, "meta", rows[0].eos)
    for seq_id, row in enumerate(rows):
        sampler.start(start_of(seq_id, row))
    for step in range(2):
        sampled = tuple(row_of(i, len(row.output) + step) for i, row in enumerate(rows))
        assert sampler.sample(logits_of(rows).to("meta"), sampled).token_ids.shape == (30,)
