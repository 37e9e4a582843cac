"""Prompt lookup: guesses of the next tokens, copied from where the text said the same before.

What a model repeats (a quotation, a name, code it edits) it has read already. If the last few tokens stood earlier in
prompt or output, what followed them there is likely to follow again. The guess costs rows in the next step; whether it
was right is seen in the same step, so text never changes (Saxena, "Prompt Lookup Decoding", 2023; the check is that of
speculative decoding, arXiv 2211.17192, with the random number of each position fixed beforehand).

The text is taken into the index in small pieces, from its beginning on: no step pays for the length of a prompt.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Tokens

LONGEST, SHORTEST = 4, 2  # tokens that must agree
READ_TOKENS = 1024  # taken into the indices of all sequences in a step
MIN_READ_TOKENS = 16  # of each of them
MAX_PLACES = 64  # that are looked at for one guess, the latest first
_FIRST_GUESS = 3  # tokens; the limit then follows what was right


class PromptLookup:
    """Where pairs of tokens stood in one sequence, and how many tokens are worth guessing.

    Invariant: the index knows every pair that ends at or before `num_read`, by where it ended last, and for each of
    those places the one before it. `num_read` is less than the number of tokens: what follows a place is known.
    """

    __slots__ = ("_before", "_last", "_limit", "_max_tokens")

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._limit = min(_FIRST_GUESS, max_tokens)
        self._last: dict[int, int] = {}  # a pair -> where it ended last
        self._before = array("l", (0, 0))  # by place: where its pair ended before; 0: nowhere

    @property
    def num_read(self) -> int:
        return len(self._before) - 1

    def read(self, prompt: Tokens[int], outputs: Tokens[int], max_tokens: int = READ_TOKENS) -> None:
        """Take in at most `max_tokens` more. `prompt` and `outputs` have only grown since the last call."""
        num_prompt = len(prompt)
        start = len(self._before)
        stop = min(start + max_tokens, num_prompt + len(outputs))
        if stop <= start:
            return
        cut = max(start - SHORTEST, 0)
        tokens = [*prompt[cut:stop], *outputs[max(0, cut - num_prompt) : max(0, stop - num_prompt)]]
        last, before = self._last, self._before
        former = tokens[start - SHORTEST - cut]
        for end in range(start, stop):
            token = tokens[end - 1 - cut]
            pair = former << 64 | token
            before.append(last.get(pair, 0))
            last[pair] = end
            former = token

    def guess(self, prompt: Tokens[int], outputs: Tokens[int], max_tokens: int) -> tuple[int, ...]:
        """At most `max_tokens` tokens that may follow: those after the place that agrees in the most tokens."""
        num_prompt = len(prompt)
        num_tokens = num_prompt + len(outputs)
        if num_tokens <= SHORTEST:
            return ()

        def between(start: int, stop: int) -> list[int]:
            return [*prompt[start:stop], *outputs[max(0, start - num_prompt) : max(0, stop - num_prompt)]]

        longest = min(LONGEST, num_tokens - 1)
        ending = between(num_tokens - longest, num_tokens)
        place = self._last.get(ending[-2] << 64 | ending[-1], 0)
        best, most = 0, 0
        for _ in range(MAX_PLACES):
            if not place or most == longest:
                break
            found = between(max(0, place - longest), place)
            num_equal = SHORTEST
            while num_equal < len(found) and found[-num_equal - 1] == ending[-num_equal - 1]:
                num_equal += 1
            if num_equal > most:
                best, most = place, num_equal
            place = self._before[place]
        return tuple(between(best, best + min(self._limit, max_tokens))) if best else ()

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Guess more after a guess that was right to its end, fewer after one that was not."""
        if num_right == num_guessed:
            self._limit = min(self._max_tokens, 2 * num_guessed)
        else:
            self._limit = num_right + 1
