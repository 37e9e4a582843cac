"""Feeds hand-made plans to a TorchRunner, without a scheduler: the test decides which rows go into which step."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core.plan import (
    AdapterEvict,
    AdapterLoad,
    LoraSegment,
    RowOutput,
    SequenceSlice,
    SequenceStart,
    StepPlan,
    TokenRef,
)
from engine.model.loader import LoadedModel, load_model
from engine.request import SamplingParams
from engine.runner.inputs import SampledRow
from engine.runner.runner import TorchRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=None)


@dataclass
class DrivenSequence:
    """Progress of one sequence."""

    seq_id: int
    prompt: list[int]
    lora_slot: int = 0
    outputs: list[int] = field(default_factory=list)
    num_computed: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.outputs

    @property
    def num_left(self) -> int:
        """Rows until the next sample."""
        return len(self.tokens) - self.num_computed


class PlanDriver:
    """A runner, its free blocks in random order, and the logits that were sampled from.

    `logits[seq_id]` holds one row [V] for each output of the sequence.
    """

    def __init__(
        self, base: Path | LoadedModel, *, block_size: int = 4, num_blocks: int = 256, seed: int = 0, **settings: Any
    ) -> None:
        folder = str(base) if isinstance(base, Path) else "unused"
        self.config = EngineConfig(model=folder, block_size=block_size, num_threads=1, **settings).resolved()
        self.loaded = load_model(self.config) if isinstance(base, Path) else base
        self.runner = TorchRunner(self.loaded, self.config, num_blocks)
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.sequences: list[DrivenSequence] = []
        self.logits: dict[int, list[torch.Tensor]] = {}
        self.plan_id = 0
        self._starts: list[SequenceStart] = []
        sample = self.runner._sampler.sample

        def recording_sample(logits: torch.Tensor, rows: tuple[SampledRow, ...]) -> Any:
            for row, sampled in zip(logits, rows, strict=True):
                self.logits.setdefault(sampled.seq_id, []).append(row.clone())
            return sample(logits, rows)

        self.runner._sampler.sample = recording_sample  # type: ignore[method-assign]

    def add(self, prompt: Sequence[int], *, lora_slot: int = 0, params: SamplingParams = GREEDY) -> DrivenSequence:
        sequence = DrivenSequence(len(self.sequences), list(prompt), lora_slot)
        self.sequences.append(sequence)
        self._starts.append(SequenceStart(sequence.seq_id, tuple(prompt), (), params, seed=1, sample_index=0))
        return sequence

    def load_adapter(self, image: Any, slot: int) -> None:
        self.runner.add_adapter(image)
        self.submit_ops(AdapterLoad(image.key, slot))

    def submit_ops(self, *ops: AdapterLoad | AdapterEvict) -> Any:
        self.plan_id += 1
        return self.runner.submit(StepPlan(plan_id=self.plan_id, adapter_ops=ops)).result()

    def make_plan(
        self, work: Sequence[tuple[DrivenSequence, int]], refs: dict[int, TokenRef] | None = None
    ) -> StepPlan:
        """Rows of the given sequences; a slice that reaches the end of its tokens samples."""
        slices: list[SequenceSlice] = []
        segments: list[LoraSegment] = []
        row = 0
        for sequence, rows in work:
            end = sequence.num_computed + rows
            while len(sequence.blocks) * self.config.block_size < end:
                sequence.blocks.append(self.free.pop())
            tokens: list[int | TokenRef] = [*sequence.tokens[sequence.num_computed : end]]
            if refs and sequence.seq_id in refs:
                tokens[-1] = refs[sequence.seq_id]
            output = RowOutput.SAMPLE if end == len(sequence.tokens) else RowOutput.NONE
            slices.append(
                SequenceSlice(
                    seq_id=sequence.seq_id,
                    row_start=row,
                    token_ids=tuple(tokens),
                    position=sequence.num_computed,
                    block_table=tuple(sequence.blocks),
                    lora_slot=sequence.lora_slot,
                    output=output,
                    output_position=len(sequence.outputs),
                )
            )
            if sequence.lora_slot:
                segments.append(LoraSegment(row, row + rows, sequence.lora_slot))
            row += rows
        self.plan_id += 1
        starts, self._starts = tuple(self._starts), []
        return StepPlan(plan_id=self.plan_id, slices=tuple(slices), lora_segments=tuple(segments), starts=starts)

    def step(self, work: Sequence[tuple[DrivenSequence, int]]) -> None:
        plan = self.make_plan(work)
        result = self.runner.submit(plan).result()
        by_id = {s.seq_id: s for s, _ in work}
        for sequence, rows in work:
            sequence.num_computed += rows
        for sample in result.samples:
            assert sample.error is None, sample.error
            by_id[sample.seq_id].outputs.extend(sample.token_ids)

    def run(self, num_outputs: int, chunks: Sequence[int]) -> None:
        """Until every sequence has `num_outputs` tokens: each step gives sequence i its next chunk size in turn.

        A new sequence joins at every second step, so that prefill and decode mix.
        """
        step = 0
        while any(len(s.outputs) < num_outputs for s in self.sequences):
            joined = self.sequences[: step // 2 + 1]
            work = [
                (s, min(s.num_left, chunks[(step + s.seq_id) % len(chunks)]))
                for s in joined
                if len(s.outputs) < num_outputs
            ]
            if work:
                self.step(work)
            step += 1
