"""What a sequence has said so far, and what repetition, presence and frequency penalties make of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.to_device import upload

_FIRST_ROWS = 4


def uses_history(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class TokenHistory:
    """A table with one row per sequence that uses penalties; it grows when more join and never shrinks.

    Memory: 5 bytes per token of the vocabulary and row.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # in the output
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # in the prompt or the output
        self._free: list[int] = []

    def open(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> int:
        """Take a row for a sequence; give it back with `close`."""
        with torch.inference_mode():  # as in every step: what is made inside could not be changed outside
            if not self._free:
                self._grow()
            row = self._free.pop()
            self._fill(row, prompt_token_ids, output_token_ids)
        return row

    def _fill(self, row: int, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> None:
        output = self._known(output_token_ids)
        counts = self._counts[row].zero_()
        counts.index_add_(0, output, torch.ones_like(output, dtype=counts.dtype))
        self._seen[row] = counts > 0
        self._seen[row, self._known(prompt_token_ids)] = True

    def close(self, row: int) -> None:
        self._free.append(row)

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """Count one more output token of each row. Shapes: [K], [K]."""
        self._counts[rows, token_ids] += 1
        self._seen[rows, token_ids] = True

    def penalise(
        self, logits: Tensor, at: Tensor, rows: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
    ) -> None:
        """Apply the penalties to rows `at` of the logits, in place; `rows` are theirs in this table.

        Shapes: logits [S, V], the others [K].
        """
        if logits.device.type != "cpu":  # all tokens: to count those seen would mean to wait for the device
            every = _penalised(
                logits[at], self._counts[rows], repetition[:, None], presence[:, None], frequency[:, None]
            )
            logits[at] = torch.where(self._seen[rows], every, logits[at])
            return
        seen = np.flatnonzero(self._seen[rows].numpy())
        k, token_ids = (torch.from_numpy(i) for i in np.divmod(seen, self._vocab_size))
        counts = self._counts[rows[k], token_ids]
        where = (at[k], token_ids)
        logits[where] = _penalised(logits[where], counts, repetition[k], presence[k], frequency[k])

    def _known(self, token_ids: Sequence[int]) -> Tensor:
        """Token ids within the vocabulary: a prompt may hold placeholders beyond it, which no logit belongs to."""
        return upload([i for i in token_ids if i < self._vocab_size], self._counts.device)

    def _grow(self) -> None:
        old = self._counts.shape[0]
        new = max(_FIRST_ROWS, old)
        self._counts = torch.cat((self._counts, self._counts.new_zeros((new, self._vocab_size))))
        self._seen = torch.cat((self._seen, self._seen.new_zeros((new, self._vocab_size))))
        self._free.extend(range(old, old + new))


def _penalised(logits: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor) -> Tensor:
    """Logits of tokens seen in the prompt or the output.

    repetition divides what is positive and multiplies what is not (CTRL, arXiv 1909.05858, as transformers does it);
    presence is subtracted from tokens of the output, frequency once per occurrence there (OpenAI's definition).
    """
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    penalised = repeated - frequency * counts - presence * (counts > 0)
    limit = torch.finfo(logits.dtype).max  # a tiny repetition penalty overflows; infinity is no logit
    return penalised.clamp_(-limit, limit)
