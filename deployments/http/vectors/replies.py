"""Bodies of answers that are made of vectors.

A list of vectors is written piece by piece, with room for others in between: two thousand vectors of a large model are
millions of numbers, and a whole second of the event loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from deployments.router.vectors import Vectors

_AT_ONCE = 1 << 15  # numbers: some ten milliseconds


def written(vector: bytes, encoding: str | None) -> bytes:
    """A vector as JSON: numbers, or the bytes of its float32 numbers in base64.

    Nine digits tell every float32 from its neighbours.
    """
    if encoding == "base64":
        return b'"' + base64.b64encode(vector) + b'"'
    numbers = np.frombuffer(vector, "<f4").tolist()
    return ("[" + "%.9g," * len(numbers))[:-1].encode() % tuple(numbers) + b"]"


def usage(vectors: Vectors) -> dict[str, int]:
    count = vectors.num_prompt_tokens
    return {"prompt_tokens": count, "total_tokens": count}


async def listed(
    head: dict[str, Any], vectors: Vectors, encoding: str | None, kind: Literal["embedding", "pooling"]
) -> bytes:
    """`head` with the vectors as `data`, each an object of `kind`, and the usage."""
    field = "embedding" if kind == "embedding" else "data"
    pieces = [json.dumps(head)[:-1].encode(), b',"data":[']
    num_written = 0
    for index, one in enumerate(vectors.answers):
        before = f'{"," if index else ""}{{"object":"{kind}","index":{index},"{field}":'
        pieces += (before.encode(), written(one.vector, encoding), b"}")
        num_written += len(one.vector) // 4
        if num_written > _AT_ONCE:
            num_written = 0
            await asyncio.sleep(0)
    return b"".join([*pieces, b'],"usage":', json.dumps(usage(vectors)).encode(), b"}"])


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


def cosines(first: Sequence[bytes], second: Sequence[bytes]) -> list[float]:
    """Of the angle between each two vectors (one of `first` with all, or as many): 0 where one of them is zero."""
    a, b = (np.frombuffer(b"".join(side), "<f4").reshape(len(side), -1) for side in (first, second))
    lengths = np.linalg.norm(a.astype(np.float64), axis=1) * np.linalg.norm(b.astype(np.float64), axis=1)
    products = np.einsum("ij,ij->i", np.broadcast_to(a, b.shape), b, dtype=np.float64)
    found: list[float] = np.where(lengths > 0, products / np.where(lengths > 0, lengths, 1.0), 0.0).tolist()
    return found
