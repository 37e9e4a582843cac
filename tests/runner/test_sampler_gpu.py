"""The sampler on a GPU chooses what it chooses on the CPU."""

from __future__ import annotations

import random

import pytest
import torch

from engine.core.plan import Sample
from engine.runner.sampler import Sampler
from tests.support.sampling import logits_of, row_of, start_of
from tests.support.sampling_oracle import Row, token
from tests.support.sampling_rows import random_batch

pytestmark = pytest.mark.gpu


def steps(rows: list[Row], device: str) -> list[tuple[Sample, ...]]:
    sampler = Sampler(len(rows[0].logits), device, rows[0].eos)
    for seq_id, row in enumerate(rows):
        sampler.start(start_of(seq_id, row))
    made = []
    for step in range(3):  # the second and third see what the first one counted
        slices = tuple(row_of(i, len(row.output) + step) for i, row in enumerate(rows))
        made.append(sampler.sample(logits_of(rows).to(device), slices))
    return [step.samples for step in made]


@pytest.mark.parametrize("vocab_size", [65, 300, 4099])
def test_tokens_are_those_of_the_cpu(vocab_size: int) -> None:
    rows = random_batch(random.Random(vocab_size), vocab_size, 30)
    for on_gpu, on_cpu in zip(steps(rows, "cuda"), steps(rows, "cpu"), strict=True):
        for row, gpu, cpu in zip(rows, on_gpu, on_cpu, strict=True):
            if gpu.token_ids != cpu.token_ids:
                assert token(row)[1] < 1e-6, row.params


def test_logits_that_are_not_finite_fail_their_row_alone() -> None:
    rows = random_batch(random.Random(1), 300, 4)
    logits = logits_of(rows).cuda()
    logits[2, 7] = torch.nan
    sampler = Sampler(300, "cuda", rows[0].eos)
    for seq_id, row in enumerate(rows):
        sampler.start(start_of(seq_id, row))
    step = sampler.sample(logits, tuple(row_of(i, len(row.output)) for i, row in enumerate(rows)))
    assert [s.error is None for s in step.samples] == [True, True, False, True]
