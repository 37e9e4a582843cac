"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

EMBEDDING_REQUEST: dict[str, Any] = {"model": "upper", "input": ["One base", "many voices"], "encoding_format": "float"}
EMBEDDING_ANSWER: dict[str, Any] = {
    "id": "embd-6f1c",
    "object": "list",
    "created": 1796083200,
    "model": "upper",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.0123, -0.0456]}],
    "usage": {"prompt_tokens": 19, "total_tokens": 19},
}
POOLING_REQUEST: dict[str, Any] = {"model": "upper", "input": "One base"}
POOLING_ANSWER: dict[str, Any] = {
    "id": "pool-6f1c",
    "object": "list",
    "created": 1796083200,
    "model": "upper",
    "data": [{"object": "pooling", "index": 0, "data": [0.0123, -0.0456]}],
    "usage": {"prompt_tokens": 8, "total_tokens": 8},
}
SCORE_REQUEST: dict[str, Any] = {"model": "upper", "text_1": "One base", "text_2": ["many voices", "one voice"]}
SCORE_ANSWER: dict[str, Any] = {
    "id": "score-6f1c",
    "object": "list",
    "created": 1796083200,
    "model": "upper",
    "data": [{"index": 0, "object": "score", "score": 0.87}],
    "usage": {"prompt_tokens": 28, "total_tokens": 28},
}
RERANK_REQUEST: dict[str, Any] = {
    "model": "upper",
    "query": "One base",
    "documents": ["many voices", "one voice"],
    "top_n": 1,
}
RERANK_ANSWER: dict[str, Any] = {
    "id": "rerank-6f1c",
    "model": "upper",
    "results": [{"index": 1, "document": {"text": "one voice"}, "relevance_score": 0.91}],
    "usage": {"prompt_tokens": 28, "total_tokens": 28},
}
