"""A request and an answer of the demo, for /docs. A test asks the request and compares the answer's fields."""

from __future__ import annotations

from typing import Any

REQUEST: dict[str, Any] = {
    "model": "upper",
    "input": "I was charged twice for the same subscription.",
    "questions": [
        {"type": "predicate", "name": "refund", "instructions": "The customer should get money back."},
        {
            "type": "choice",
            "name": "topic",
            "instructions": "What is it about?",
            "choices": [{"value": "billing"}, {"value": "technical", "description": "errors and outages"}],
        },
        {
            "type": "score",
            "name": "urgency",
            "instructions": "How urgent is it?",
            "levels": [{"label": "low"}, {"label": "high", "description": "today"}],
        },
    ],
}
ANSWER: dict[str, Any] = {
    "answers": [
        {"type": "predicate", "name": "refund", "probability": 0.93},
        {
            "type": "choice",
            "name": "topic",
            "choice": "billing",
            "confidence": 0.97,
            "probabilities": [
                {"value": "billing", "probability": 0.97},
                {"value": "technical", "probability": 0.03},
            ],
        },
        {
            "type": "score",
            "name": "urgency",
            "score": 0.4,
            "confidence": 0.6,
            "probabilities": [
                {"value": 0, "label": "low", "probability": 0.6},
                {"value": 1, "label": "high", "probability": 0.4},
            ],
        },
    ],
    "model": "upper",
    "usage": {
        "input_tokens": 310,
        "input_tokens_details": {"cache_write_tokens": 220, "cached_tokens": 90},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 310,
    },
}
