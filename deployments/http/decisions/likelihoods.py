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


class TooManyPlaces(Exception):
    """Answers part at more places than were allowed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place behind the prompt, and the tokens with which answers go on there."""

    path: Tokens
    token_ids: Tokens


class Answers:
    """The answers of one question: a tree of their tokens, root first; no answer is the beginning of another."""

    def __init__(self, answers: Sequence[Tokens], end: Tokens, most: int) -> None:
        """Each has `end` behind it where one of them is the beginning of another: it would always be likelier.

        Raises: ValueError if two are the same to the model, or one is nothing; TooManyPlaces if there are more than
        `most`, before they are all looked at.
        """
        if not all(answers) or len(set(answers)) < len(answers):
            raise ValueError("two answers are the same tokens to this model; word them otherwise")
        self._answers = tuple(answers)
        self._grow(most)
        if any(node in self._children for node in self._ends):
            self._answers = tuple(answer + end for answer in answers)
            self._grow(most)
            if any(node in self._children for node in self._ends):
                raise ValueError("one answer goes on where another ends; word them otherwise")
        self._start, self._shared = 0, 0  # the node where they part first, and how many tokens lead there
        while len(self._children[self._start]) == 1:
            (self._start,) = self._children[self._start].values()
            self._shared += 1

    def _grow(self, most: int) -> None:
        self._children: dict[int, dict[int, int]] = {}  # of each node that has some, by token
        self._ends: list[int] = []  # the node of each answer
        num_nodes = 0
        for answer in self._answers:
            node = 0
            for token_id in answer:
                children = self._children.get(node)
                if children is None:
                    if len(self._children) - len(answer) > most:  # a beginning that all share makes no places
                        raise TooManyPlaces
                    children = self._children[node] = {}
                if token_id not in children:
                    num_nodes += 1
                    children[token_id] = num_nodes
                node = children[token_id]
            self._ends.append(node)

    def places(self) -> tuple[Place, ...]:
        """The first before those behind it."""
        found, waiting = [], [(self._start, self._answers[0][: self._shared])]
        for node, path in waiting:
            children = self._children[node]
            found.append(Place(path, tuple(children)))
            waiting += [(child, (*path, token_id)) for token_id, child in children.items() if child in self._children]
        return tuple(found)

    def probabilities(self, logprobs: Sequence[Sequence[float]]) -> tuple[float, ...]:
        """Of each answer, that it is this one of them. `logprobs`: of the tokens of each place, in their order."""
        sums = {self._start: 0.0}
        waiting = [self._start]
        for node, values in zip(waiting, logprobs, strict=False):
            for child, value in zip(self._children[node].values(), values, strict=True):
                sums[child] = sums[node] + value
                if child in self._children:
                    waiting.append(child)
        found = [sums[node] for node in self._ends]
        best = max(found)
        weights = [math.exp(value - best) for value in found]
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights)
