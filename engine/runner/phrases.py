"""Bad words of several tokens: what a sequence said last, and which token may not follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.request import MAX_BAD_WORD_TOKENS
from engine.runner.choice import block_max
from engine.to_device import upload

WIDTH = MAX_BAD_WORD_TOKENS - 1
_FIRST_ROWS = 4
_NOTHING = -1  # in a tail, before the output begins
_ANYTHING = -2  # in a prefix, before the phrase begins


class OutputTails:
    """A table with the last `WIDTH` output tokens of each sequence that has such bad words; it grows, never shrinks.

    It lives on the device: the tokens of steps in flight are not known on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._tails = torch.full((0, WIDTH), _NOTHING, dtype=torch.int64, device=device)
        self._free: list[int] = []

    def open(self, output_token_ids: Sequence[int]) -> int:
        """Take a row for a sequence; give it back with `close`."""
        with torch.inference_mode():  # as in every step: what is made inside could not be changed outside
            if not self._free:
                old = len(self._tails)
                new = max(_FIRST_ROWS, old)
                self._tails = torch.cat((self._tails, self._tails.new_full((new, WIDTH), _NOTHING)))
                self._free.extend(range(old, old + new))
            row = self._free.pop()
            last = list(output_token_ids[-WIDTH:])
            self._tails[row] = upload([_NOTHING] * (WIDTH - len(last)) + last, self._tails.device)
        return row

    def close(self, row: int) -> None:
        self._free.append(row)

    def add(self, rows: Tensor, token_ids: Tensor) -> None:
        """One more output token of each row. Shapes: [K], [K]."""
        self._tails[rows] = torch.cat((self._tails[rows, 1:], token_ids[:, None]), dim=1)

    def of(self, rows: Tensor, width: int) -> Tensor:
        """The last `width` tokens of each row. Shapes: [N] -> [N, width]."""
        return self._tails[rows, WIDTH - width :]


class Phrases:
    """The bad words of several tokens of a batch, N in all. Shapes: each [N], `prefix` [N, W]."""

    def __init__(self, words: list[tuple[int, int, tuple[tuple[int, ...], ...]]], device: torch.device) -> None:
        """`words`: (row of the batch, row of its tail, bad words) of the rows that have such."""
        every = [(row, tail, word) for row, tail, of_row in words for word in of_row if len(word) > 1]
        self._width = max((len(word) - 1 for _, _, word in every), default=0)
        padded = [[_ANYTHING] * (self._width + 1 - len(word)) + list(word[:-1]) for _, _, word in every]
        self._prefix = upload([i for prefix in padded for i in prefix], device).view(len(every), self._width)
        self._tail = upload([tail for _, tail, _ in every], device)
        self._row = upload([row for row, _, _ in every], device)
        self._last = upload([word[-1] for _, _, word in every], device)

    def ban(self, logits: Tensor, tails: OutputTails) -> None:
        """Bans, in place, the tokens that would complete a phrase. Should nothing be left of a row, it stays as it was:
        a token must come."""
        where = (self._row, self._last)
        before = logits[where]
        said = tails.of(self._tail, self._width)
        completes = ((said == self._prefix) | (self._prefix == _ANYTHING)).all(-1)
        # A token that ends several phrases is banned by any of them: minus infinity stays what it is.
        logits.index_put_(where, torch.where(completes, -torch.inf, 0.0), accumulate=True)
        is_empty = block_max(logits).amax(-1) == -torch.inf
        logits.index_put_(where, torch.where(is_empty[self._row], before, logits[where]))
