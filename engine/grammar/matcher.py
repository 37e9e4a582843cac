"""Matcher: where one answer stands in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_FORCED = 64  # tokens that are told to be certain, at a time


class Matcher:
    """The tokens of one answer so far, and which may come next. Used by one thread at a time.

    An answer that has ended (nothing but its end is possible, or an end-of-sequence token was taken) stays so.
    """

    def __init__(self, state: LLMatcher, mask_bytes: int) -> None:
        self._state = state
        self._mask_bytes = mask_bytes

    @property
    def is_over(self) -> bool:
        """Nothing may come any more."""
        return bool(self._state.is_stopped())

    def error(self) -> str | None:
        """Why nothing can be said of the next token: the grammar has become too large to follow."""
        return brief(self._state.get_error()) if self._state.is_error() else None

    def take(self, token_ids: Sequence[int]) -> int:
        """Take tokens in, up to the one that ends the answer. Returns: how many; fewer also if one does not fit."""
        return int(self._state.try_consume_tokens(list(token_ids))) if token_ids else 0

    def forced(self) -> tuple[int, ...]:
        """Tokens that the grammar leaves no other text for. A model may write that text in other tokens."""
        return () if self.is_over else tuple(self._state.compute_ff_tokens()[:MAX_FORCED])

    def fill(self, masks: NDArray[np.uint8], guesses: Sequence[int] = ()) -> None:
        """Which tokens may come next, and which behind each guess: rows of bits, the lowest first.

        masks: [1 + len(guesses), ceil(V / 8)]; rows behind a guess that does not fit stay as they are.
        """
        num_taken = 0
        for row, mask in enumerate(masks):
            if row:
                if self.is_over or self.take(guesses[row - 1 : row]) != 1:
                    break
                num_taken += 1
            bits = np.frombuffer(self._state.compute_bitmask(), dtype=np.uint8)
            mask[:] = bits[: self._mask_bytes]
            if self._state.is_error():
                break
        if num_taken:
            self._state.rollback(num_taken)


def brief(message: str) -> str:
    """The first line that says something, without what the library adds for its own developers."""
    line = next((line.strip() for line in message.splitlines() if line.strip()), "it cannot be followed")
    return line if len(line) <= 200 else f"{line[:200]}..."
