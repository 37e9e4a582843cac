"""Prompt lookup: guesses of the next tokens, copied from where the text said the same before.

What a model repeats (a quotation, a name, code it edits) it has read already. If the last few tokens stood earlier in
prompt or output, what followed them there is likely to follow again. The guess costs rows in the next step; whether it
was right is seen in the same step, so text never changes (Saxena, "Prompt Lookup Decoding", 2023; the check is that of
speculative decoding, arXiv 2211.17192, with the random number of each position fixed beforehand).
"""

from __future__ import annotations

from collections.abc import Sequence as Tokens

LONGEST, SHORTEST = 4, 2  # tokens that must agree
_FIRST_GUESS = 3  # tokens; the limit then follows what was right


class PromptLookup:
    """The n-grams of one sequence, and how many tokens are worth guessing.

    Invariant: `_ends` knows every n-gram that ends before the last token, by where its latest occurrence ended.
    """

    __slots__ = ("_ends", "_limit", "_max_tokens", "_tokens")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._limit = min(_FIRST_GUESS, max_tokens)
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def guess(self, prompt: Tokens[int], outputs: Tokens[int], max_tokens: int) -> tuple[int, ...]:
        """At most `max_tokens` tokens that may follow. `prompt` and `outputs` have only grown since the last call."""
        known = len(self._tokens)
        start = len(prompt)
        self._tokens += [*prompt[known:], *outputs[max(0, known - start) :]]
        for end in range(max(1, known), len(self._tokens)):
            for n in range(SHORTEST, LONGEST + 1):
                if n <= end:
                    self._ends[tuple(self._tokens[end - n : end])] = end
        limit = min(self._limit, max_tokens)
        for n in range(min(LONGEST, len(self._tokens) - 1), SHORTEST - 1, -1):
            at = self._ends.get(tuple(self._tokens[-n:]))
            if at is not None:
                return tuple(self._tokens[at : at + limit])
        return ()

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Guess more after a guess that was right to its end, fewer after one that was not."""
        if num_right == num_guessed:
            self._limit = min(self._max_tokens, 2 * num_guessed)
        else:
            self._limit = num_right + 1
