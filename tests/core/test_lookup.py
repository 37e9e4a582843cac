"""What prompt lookup guesses, against a search of the whole text."""

from __future__ import annotations

import random

from engine.core.lookup import LONGEST, SHORTEST, PromptLookup


def searched(tokens: list[int], limit: int) -> tuple[int, ...]:
    """What followed the latest earlier place that ends in the same n tokens, for the largest n there is."""
    for n in range(LONGEST, SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:] and len(tokens) > n:
                return tuple(tokens[end : end + limit])
    return ()


def test_guesses_are_those_of_a_search_however_the_text_grows() -> None:
    rng = random.Random(0)
    for _ in range(300):
        prompt = [rng.randint(0, 2) for _ in range(rng.randint(1, 12))]
        outputs: list[int] = []
        lookup = PromptLookup(3)
        for _ in range(12):
            lookup.read(prompt, outputs)
            assert lookup.guess(prompt, outputs, 3) == searched(prompt + outputs, 3)
            outputs += [rng.randint(0, 2) for _ in range(rng.randint(1, 3))]


def test_right_guesses_grow_and_wrong_ones_shrink() -> None:
    text = [*range(100), 0, 1, 2]
    lookup = PromptLookup(16)
    lookup.read(text, [])
    sizes = []
    for right in (True, True, True, True, False, True):
        guess = lookup.guess(text, [], 64)
        sizes.append(len(guess))
        lookup.learn(len(guess), len(guess) if right else 1)
    assert sizes == [3, 6, 12, 16, 16, 2]


def test_no_more_is_guessed_than_there_is_room_for() -> None:
    lookup = PromptLookup(8)
    lookup.read([1, 2, 3, 1, 2], [])
    assert lookup.guess([1, 2, 3, 1, 2], [], 1) == (3,)
    assert lookup.guess([1, 2, 3, 1, 2], [], 0) == ()
    assert PromptLookup(8).guess([1], [], 5) == ()
