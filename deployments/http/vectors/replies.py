"""Bodies of answers that are made of vectors: pure."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from deployments.router.vectors import Vectors
from engine.pooling import as_floats


def written(vector: bytes, encoding: str | None) -> list[float] | str:
    """A vector as JSON has it: numbers, or the bytes of its float32 numbers in base64."""
    return base64.b64encode(vector).decode() if encoding == "base64" else list(as_floats(vector))


def usage(vectors: Vectors) -> dict[str, int]:
    count = vectors.num_prompt_tokens
    return {"prompt_tokens": count, "total_tokens": count}


def embeddings(head: dict[str, Any], vectors: Vectors, encoding: str | None) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": index, "embedding": written(one.vector, encoding)}
        for index, one in enumerate(vectors.answers)
    ]
    return {**head, "data": data, "usage": usage(vectors)}


def pooled(head: dict[str, Any], vectors: Vectors, encoding: str | None) -> dict[str, Any]:
    data = [
        {"object": "pooling", "index": index, "data": written(one.vector, encoding)}
        for index, one in enumerate(vectors.answers)
    ]
    return {**head, "data": data, "usage": usage(vectors)}


def scores(head: dict[str, Any], vectors: Vectors, values: Sequence[float]) -> dict[str, Any]:
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(values)]
    return {**head, "data": data, "usage": usage(vectors)}


def ranking(
    head: dict[str, Any], vectors: Vectors, values: Sequence[float], documents: Sequence[str] | None, top_n: int
) -> dict[str, Any]:
    """The best first, of equals the earlier; `documents`: as they are shown, None: they are not."""
    order = sorted(range(len(values)), key=lambda index: -values[index])[: top_n or None]
    results: list[dict[str, Any]] = []
    for index in order:
        shown = {} if documents is None else {"document": {"text": documents[index]}}
        results.append({"index": index, **shown, "relevance_score": values[index]})
    return {**head, "results": results, "usage": usage(vectors)}


def cosine(first: bytes, second: bytes) -> float:
    """Of the angle between two vectors: 1 where they point the same way, 0 where one is zero."""
    a, b = as_floats(first), as_floats(second)
    length = math.sqrt(math.fsum(x * x for x in a) * math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / length if length else 0.0
