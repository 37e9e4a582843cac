"""Driving the sampler the way the runner does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.core.plan import Sample, SequenceStart
from engine.native.library import NativeLibrary
from engine.request import SamplingParams
from engine.runner.inputs import SampledRow
from engine.runner.sampler import Sampler
from tests.support.sampling_oracle import Row


def start_of(seq_id: int, row: Row) -> SequenceStart:
    return SequenceStart(
        seq_id=seq_id,
        prompt_token_ids=row.prompt,
        output_token_ids=row.output,
        params=row.params,
        seed=row.seed,
        sample_index=row.sample_index,
    )


def row_of(seq_id: int, output_position: int, row: int = 0) -> SampledRow:
    return SampledRow(row=row, seq_id=seq_id, output_position=output_position, lora_slot=0)


def sample(
    rows: Sequence[Row], order: Sequence[int] | None = None, library: NativeLibrary | None = None
) -> list[Sample]:
    """Start every row as sequence 0, 1, ... and sample once; the result is in the order of `rows`."""
    order = list(range(len(rows))) if order is None else list(order)
    logits = logits_of([rows[i] for i in order])
    sampler = Sampler(logits.shape[1], "cpu", rows[0].eos, library)
    for seq_id, row in enumerate(rows):
        sampler.start(start_of(seq_id, row))
    step = sampler.sample(logits, tuple(row_of(i, len(rows[i].output), at) for at, i in enumerate(order)))
    assert all(s.error or s.token_ids == (t,) for s, t in zip(step.samples, step.token_ids.tolist(), strict=True))
    by_sequence = {s.seq_id: s for s in step.samples}
    return [by_sequence[i] for i in range(len(rows))]


def logits_of(rows: Sequence[Row]) -> Tensor:
    return torch.stack([torch.as_tensor(row.logits, dtype=torch.float32) for row in rows])


def one(
    logits: Sequence[float], *, output: tuple[int, ...] = (), eos: tuple[int, ...] = (), **params: object
) -> Sample:
    """The sample of a single row."""
    row = Row(logits, SamplingParams(max_tokens=None, **params), output=output, eos=eos)  # type: ignore[arg-type]
    return sample([row])[0]


def drawn(logits: list[float], draws: int = 400, output: tuple[int, ...] = (), **params: object) -> set[int]:
    """Tokens that ever come out."""
    made = SamplingParams(max_tokens=None, **params)  # type: ignore[arg-type]
    return {s.token_ids[0] for s in sample([Row(logits, made, seed=seed, output=output) for seed in range(draws)])}


def greedy(logits: list[float], **params: object) -> int:
    return one(logits, temperature=0.0, **params).token_ids[0]  # type: ignore[arg-type]
