"""Calls that are answered by numbers: one vector each, many at once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from deployments.calls import Call, Fault, Refused
from deployments.router.streams import Backend, answer
from deployments.router.suspects import Suspects

T = TypeVar("T")

FULL_CODE = "queue_full"
FULL_PAUSE_S = 0.1
MAX_WAITS = 100  # in a row, for a queue that others keep full


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
    """What all jobs return, in their order; at most `most` run at a time. The first exception ends the others.

    A job that finds a full queue comes again when there is room, as long as others of these have got through or are on
    their way: who asks for much fills queues, and should not fail by that. From then on fewer run at a time.
    """
    results: dict[int, T] = {}
    waiting = deque(range(len(jobs)))
    running: dict[asyncio.Future[T], int] = {}
    limit, num_waits = float(most), 0
    try:
        while waiting or running:
            while waiting and len(running) < int(limit):
                index = waiting.popleft()
                running[asyncio.ensure_future(jobs[index]())] = index
            was_full = False
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = running.pop(task)
                try:
                    results[index] = task.result()
                except Refused as error:
                    if error.fault.code != FULL_CODE or not (running or results) or num_waits >= MAX_WAITS:
                        raise
                    waiting.appendleft(index)
                    limit, was_full = max(1.0, min(limit, len(running))), True
                else:
                    limit, num_waits = min(float(most), limit + 1 / limit), 0
            if was_full and not running:
                num_waits += 1
                await asyncio.sleep(FULL_PAUSE_S)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return [results[index] for index in range(len(jobs))]
