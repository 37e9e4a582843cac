"""What attention needs of a step, and the protocol of everything that computes it over the paged KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kv.storage import KVStorage


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Where the rows of a step belong: query_starts[s] .. query_starts[s+1] - 1 are the last rows of sequence s."""

    slot_mapping: torch.Tensor  # [T] int64: KV slot each row is written to
    block_tables: torch.Tensor  # [S, max blocks] int64, padded with block 0, rows contiguous
    query_starts: tuple[int, ...]  # S + 1
    context_lengths: tuple[int, ...]  # S: tokens of the sequence, those of this step included


def cut_tiles(inputs: AttentionInputs, sequences: Iterable[int], max_rows: int) -> list[tuple[int, int, int, int]]:
    """The rows of some sequences as kernels take them: sequence, first row, rows, position of the first row."""
    starts, contexts = inputs.query_starts, inputs.context_lengths
    return [
        (s, row, min(max_rows, starts[s + 1] - row), contexts[s] - starts[s + 1] + row)
        for s in sequences
        for row in range(starts[s], starts[s + 1], max_rows)
    ]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one attention layer asks for, besides q, k and v."""

    index: int  # layer of the storage
    scaling: float
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: torch.Tensor | None = None  # [Hq]: logits that take part in the softmax and add nothing (gpt-oss)


class AttentionBackend(Protocol):
    """Causal attention of a step's rows over the cache. `plan` once per step, then `run` once per layer."""

    storage: KVStorage

    def plan(self, inputs: AttentionInputs) -> None:
        """Take a step's metadata; valid until the next call."""
        ...

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        """Write k and v to their slots, then attend.

        Shapes: q [T, Hq, D]; k, v [T, Hk, D]; returns [T, Hq, D] in q's dtype.
        """
        ...
