"""Probabilities of answers of several tokens, by the places where they part. Pure.

The log-likelihood of an answer is the sum of those of its tokens, each behind the prompt and the tokens before it. What
all answers begin with alike counts for none of them. So a question costs one row for each place at which answers have
parted and go on, and one for all answers of one token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    """A place behind the prompt, and the tokens with which answers go on there."""

    path: Tokens
    token_ids: Tokens


def told_apart(answers: Sequence[Tokens], end: Tokens) -> tuple[Tokens, ...]:
    """`answers`, each with `end` behind it where one of them is the beginning of another: it would always be likelier.

    Raises: ValueError if two are the same to the model, or one is nothing.
    """
    if not all(answers) or len(set(answers)) < len(answers):
        raise ValueError("two answers are the same tokens to this model; word them otherwise")
    known = set(answers)
    clash = any(answer[:length] in known for answer in answers for length in range(1, len(answer)))
    ended = tuple(answer + end for answer in answers) if clash else tuple(answers)
    if clash and any(answer[:length] in set(ended) for answer in ended for length in range(1, len(answer))):
        raise ValueError("one answer goes on where another ends; word them otherwise")
    return ended


def branches(answers: Sequence[Tokens]) -> tuple[Branch, ...]:
    """The places of a question, the first before those behind it. No answer is the beginning of another."""
    shared = 0
    while len({answer[: shared + 1] for answer in answers}) == 1:
        shared += 1
    found: dict[Tokens, dict[int, None]] = {}
    for answer in answers:
        for length in range(shared, len(answer)):
            found.setdefault(answer[:length], {})[answer[length]] = None
    ordered = sorted(found, key=len)
    return tuple(Branch(path, tuple(found[path])) for path in ordered)


def probabilities(
    answers: Sequence[Tokens], places: Sequence[Branch], logprobs: Sequence[Sequence[float]]
) -> tuple[float, ...]:
    """Of each answer, that it is this one of them. `logprobs`: of the tokens of each place."""
    known = {
        (*place.path, token_id): value
        for place, values in zip(places, logprobs, strict=True)
        for token_id, value in zip(place.token_ids, values, strict=True)
    }
    shared = len(places[0].path)
    sums = [math.fsum(known[answer[: length + 1]] for length in range(shared, len(answer))) for answer in answers]
    best = max(sums)
    weights = [math.exp(value - best) for value in sums]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
