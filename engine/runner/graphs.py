"""Decode steps as CUDA graphs: recorded once for each number of rows, replayed with other numbers in the same memory.

A decode step of a large model launches hundreds of kernels that take microseconds each; replaying them costs the host
one call. A graph is recorded for every row bucket, with LoRA and without; a step uses the smallest that has room, and
the rows that are left over are marked so that kernels skip them: KV slot -1, attention tiles and LoRA chunks without
rows. Which adapters a step uses is read from tables on the device, so adapters come and go without another recording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.kv.backend import AttentionInputs, cut_tiles
from engine.kv.triton_attention import TritonAttention
from engine.lora.triton_lora import TritonLora
from engine.model.attention import forward_logits
from engine.model.loader import LoadedModel
from engine.runner.inputs import StepInputs
from engine.to_device import upload

logger = logging.getLogger(__name__)

_SKIPPED_SLOT = -1
_WARM_UPS = 2  # before a recording: kernels are compiled and libraries take their workspaces then


class Recorder(Protocol):
    """Runs a function once and gives a function that repeats its device work."""

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]: ...


class CudaRecorder:
    """Records into CUDA graphs that share one pool of memory: only one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (adapters on their way to the device) may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


def buckets(max_rows: int) -> tuple[int, ...]:
    """Rows of the graphs, up to and including `max_rows`: 1, 2, 4, 8, then every 8, from 64 on every 16."""
    steps = (1, 2, 4, *range(8, 64, 8), *range(64, max_rows, 16))
    return (*(rows for rows in steps if rows < max_rows), max_rows)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What all graphs read. A graph of n rows reads the first n rows of each."""

    input_ids: Tensor  # [N]
    positions: Tensor  # [N]
    slots: Tensor  # [N]
    block_tables: Tensor  # [N, most blocks of a sequence]
    tiles: Tensor  # [N, 4] int32
    chunks: Tensor  # [N, 3] int32
    rows: Tensor  # [N]: 0, 1, ..

    @staticmethod
    def of(max_rows: int, max_blocks: int, device: torch.device) -> _Memory:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return _Memory(
            input_ids=zeros(max_rows),
            positions=zeros(max_rows),
            slots=zeros(max_rows),
            block_tables=zeros(max_rows, max_blocks),
            tiles=zeros(max_rows, 4, dtype=torch.int32),
            chunks=zeros(max_rows, 3, dtype=torch.int32),
            rows=torch.arange(max_rows, device=device),
        )

    def clear(self) -> None:
        """No row is anybody's."""
        self.slots.fill_(_SKIPPED_SLOT)
        self.tiles.zero_()
        self.chunks.zero_()


class DecodeGraphs:
    """The graphs of one model. Used by the step thread alone, on one stream."""

    def __init__(
        self,
        loaded: LoadedModel,
        backend: TritonAttention,
        lora: TritonLora | None,
        max_rows: int,
        max_blocks: int,
        recorder: Recorder,
    ) -> None:
        """`max_blocks`: of a sequence."""
        self._model, self._backend, self._lora, self._record = loaded.model, backend, lora, recorder
        self._buckets = buckets(max_rows)
        self._memory = _Memory.of(max_rows, max_blocks, loaded.device)
        self._logits: Tensor | None = None  # [N, V], of all graphs
        self._replays: dict[tuple[int, bool], Callable[[], Tensor]] = {}
        self._max_rank = 0 if lora is None else lora.max_rank  # of the recordings

    def record_all(self) -> bool:
        """Before the first step. False: the model does something that cannot be recorded, so there are no graphs."""
        try:
            # The largest first: the others find room in the memory that it took.
            for rows in reversed(self._buckets):
                for with_lora in (False, True) if self._lora is not None else (False,):
                    self._replay_of(rows, with_lora=with_lora)
        except RuntimeError as error:
            logger.warning("decode steps run without CUDA graphs: recording one failed: %s", error)
            return False
        return True

    def fits(self, inputs: StepInputs) -> bool:
        """Whether the step has one row of each sequence, all sampled, and not too many."""
        num_rows = len(inputs.samples)
        return num_rows == inputs.input_ids.shape[0] == len(inputs.attention.context_lengths) <= self._buckets[-1]

    def logits(self, inputs: StepInputs) -> Tensor:
        """Of a step that fits. Shapes: returns [rows, V], valid until the next call."""
        num_rows = len(inputs.samples)
        with_lora = self._lora is not None and self._lora.rows.table is not None
        if self._lora is not None and self._lora.max_rank != self._max_rank:
            # A larger rank than any before needs more scratch than the recordings have.
            self._max_rank = self._lora.max_rank
            self._replays = {key: replay for key, replay in self._replays.items() if not key[1]}
        rows = next(bucket for bucket in self._buckets if bucket >= num_rows)
        chunks = None if self._lora is None else self._lora.rows.table
        replay = self._replay_of(rows, with_lora=with_lora)
        self._load(inputs, rows, chunks)
        return replay()[:num_rows]

    def _load(self, inputs: StepInputs, rows: int, chunks: Tensor | None) -> None:
        memory, attention = self._memory, inputs.attention
        num_rows = len(inputs.samples)
        memory.input_ids[:num_rows].copy_(inputs.input_ids)
        memory.positions[:num_rows].copy_(inputs.positions)
        memory.slots[:rows].fill_(_SKIPPED_SLOT)
        memory.slots[:num_rows].copy_(attention.slot_mapping)
        width = attention.block_tables.shape[1]
        memory.block_tables[:num_rows, :width].copy_(attention.block_tables)
        tiles = [number for tile in cut_tiles(attention, range(num_rows), 1) for number in tile]
        tiles += [0] * (4 * (rows - num_rows))
        memory.tiles[:rows].copy_(upload(tiles, memory.tiles.device, torch.int32).view(rows, 4))
        if chunks is not None:
            memory.chunks[:rows].zero_()
            memory.chunks[: chunks.shape[0]].copy_(chunks)

    def _replay_of(self, rows: int, *, with_lora: bool) -> Callable[[], Tensor]:
        key = rows, with_lora
        if key not in self._replays:
            self._memory.clear()  # recording runs the step: what the last one left would be written once more
            self._replays[key] = self._record(self._step(rows, with_lora=with_lora))
        return self._replays[key]

    def _step(self, rows: int, *, with_lora: bool) -> Callable[[], Tensor]:
        memory = self._memory
        inputs = AttentionInputs(memory.slots[:rows], memory.block_tables[:rows], (), ())

        def step() -> Tensor:
            self._backend.plan_fixed(inputs, memory.tiles[:rows])
            if self._lora is not None:
                self._lora.set_fixed(memory.chunks[:rows] if with_lora else None)
            logits = forward_logits(
                self._model, memory.input_ids[:rows], memory.positions[:rows], memory.rows[:rows], self._backend
            )
            return self._put_away(logits)

        return step

    def _put_away(self, logits: Tensor) -> Tensor:
        """A graph keeps the memory of what it returns. Logits are large, so all graphs return the same."""
        if self._logits is None:
            self._logits = logits.new_empty((self._buckets[-1], logits.shape[1]))
        return self._logits[: logits.shape[0]].copy_(logits)
