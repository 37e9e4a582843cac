"""Answers of decisions as bodies: pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deployments.http.decisions.schema import ChoiceQuestion, PredicateQuestion, ScoreQuestion
from deployments.router.vectors import Answered


def answer(question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, found: Sequence[float]) -> dict[str, Any]:
    """`found`: the probability of each of its answers."""
    head = {"type": question.type, "name": question.name}
    if isinstance(question, PredicateQuestion):
        return {**head, "probability": found[0]}
    best = max(range(len(found)), key=found.__getitem__)
    if isinstance(question, ChoiceQuestion):
        values = [choice.value for choice in question.choices]
        each = [{"value": value, "probability": p} for value, p in zip(values, found, strict=True)]
        return {**head, "choice": values[best], "confidence": found[best], "probabilities": each}
    each = [
        {"value": value, "label": level.label, "probability": p}
        for value, (level, p) in enumerate(zip(question.levels, found, strict=True))
    ]
    score = math.fsum(value * p for value, p in enumerate(found))
    return {**head, "score": score, "confidence": found[best], "probabilities": each}


def usage(answered: Sequence[Answered]) -> dict[str, Any]:
    """What was read, over all prompts; of it what was read before. Nothing is written."""
    read = sum(one.num_prompt_tokens for one in answered)
    cached = sum(one.num_cached_tokens for one in answered)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cache_write_tokens": read - cached, "cached_tokens": cached},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read,
    }
