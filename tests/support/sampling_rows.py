"""Rows of every temperament for the sampler's tests, drawn from a seeded generator."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from engine.request import SamplingParams
from tests.support.sampling_oracle import Row

_CHOICES: dict[str, list[Any]] = {
    "min_tokens": [0, 0, 3],
    "temperature": [0.0, 0.3, 0.7, 1.0, 2.0],
    "top_k": [0, 0, 1, 5, 50, 300, 2000, 10**6],
    "top_p": [1.0, 1.0, 1e-9, 0.5, 0.9, 0.99, 0.9999],
    "min_p": [0.0, 0.0, 0.05, 0.5, 1.0],
    "typical_p": [1.0, 1.0, 0.2, 0.9, 0.9999],
    "repetition_penalty": [1.0, 1.0, 1.3, 0.8],
    "presence_penalty": [0.0, 0.0, 1.0, -2.0],
    "frequency_penalty": [0.0, 0.0, 0.5],
    "ignore_eos": [False, True],
    "logprobs": [None, None, 0, 5],
}


def random_row(rng: random.Random, vocab_size: int, logits: list[float]) -> Row:
    def some(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(rng.randrange(most)))

    values = {name: rng.choice(values) for name, values in _CHOICES.items()}
    bias = {i: rng.choice([-100.0, 5.0]) for i in some(3)}
    output = some(6)
    if vocab_size > 8:
        values |= {"stop_token_ids": some(3), "bad_words_token_ids": _bad_words(rng, output, some)}
        values["allowed_token_ids"] = rng.choice([None, None, (*range(9), *some(40))])
    params = SamplingParams(max_tokens=None, logit_bias=bias, **values)
    return Row(
        logits=logits,
        params=params,
        seed=rng.getrandbits(64),
        sample_index=rng.randrange(4),
        prompt=some(9),
        output=output,
        eos=(0, 1) if vocab_size > 8 else (),
    )


def _bad_words(
    rng: random.Random, output: tuple[int, ...], some: Callable[[int], tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """Some of one token, some of several; many of these follow what was said last, and one or two end alike."""
    behind = [(*output[len(output) - n :], i) for n in range(1, len(output) + 1) for i in some(3)]
    others = [word for word in (some(3), some(4), some(4)) if word]
    return rng.choice([(), (), tuple(others), (*behind, *others)])


def random_batch(rng: random.Random, vocab_size: int, num_rows: int) -> list[Row]:
    """Rows of very different temperaments; half of the batches have bfloat16's many ties."""
    torch.manual_seed(rng.getrandbits(32))
    logits = torch.randn(num_rows, vocab_size) * torch.tensor([rng.choice([0.1, 1.0, 3.0, 10.0])])
    if rng.random() < 0.5:
        logits = logits.bfloat16().float()
    return [random_row(rng, vocab_size, row) for row in logits.tolist()]
