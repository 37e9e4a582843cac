"""Calls that are answered by numbers: one vector each, many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from deployments.calls import Call, Fault, Refused
from deployments.router.streams import Backend, answer
from deployments.router.suspects import Suspects

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answered:
    """The numbers of one prompt (float32, little-endian), and what it cost."""

    vector: bytes
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Vectors:
    """What became of the prompts of one HTTP request, in their order."""

    request_id: str
    answers: tuple[Answered, ...]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(one.num_prompt_tokens for one in self.answers)

    @property
    def num_cached_tokens(self) -> int:
        return sum(one.num_cached_tokens for one in self.answers)


async def vector_of(backend: Backend, call: Call, max_resumes: int, suspects: Suspects) -> Answered:
    """Raises: Refused."""
    vector: bytes | None = None
    num_cached = 0
    async with aclosing(answer(backend, call, max_resumes=max_resumes, suspects=suspects)) as deltas:
        async for delta in deltas:
            vector = delta.vector if delta.vector is not None else vector
            num_cached = max(num_cached, delta.num_cached_tokens)
    if vector is None:  # a replica of a release that knows no vectors
        raise Refused(Fault(code="request_failed", message="no vector came; send the request again"))
    return Answered(vector, len(call.prompt_token_ids), num_cached)


async def at_once(jobs: Sequence[Callable[[], Awaitable[T]]], most: int) -> list[T]:
    """What all jobs return, in their order; at most `most` run at a time. The first exception ends the others."""
    results: dict[int, T] = {}
    waiting = iter(enumerate(jobs))
    tasks = [asyncio.ensure_future(_work(waiting, results)) for _ in range(min(most, len(jobs)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results[index] for index in range(len(jobs))]


async def _work(waiting: Iterator[tuple[int, Callable[[], Awaitable[T]]]], results: dict[int, T]) -> None:
    for index, job in waiting:
        results[index] = await job()
