"""Answers that survive their replica: a cut-off stream goes on elsewhere, with nothing lost and nothing repeated.

A replica whose queue is full is passed over in the same way: what a router knows of load is up to a poll period old.
A request that is re-sent carries the tokens that its caller already has (`resumed_output_token_ids`), the seed that the
router drew and the adapter version that the first item named. The samples of one prompt are resumed one by one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Generic, Protocol, Self, TypeVar

from deployments.calls import RESERVED_CODE, Call, Fault, Refused
from deployments.losses import Meaning
from deployments.router.attempt import Attempt, ReplicaFull, ReplicaReserved, deltas_of
from deployments.router.attempt import Backend as Backend
from deployments.router.attempt import ReplicaLost as ReplicaLost
from deployments.router.suspects import Suspects
from engine.request import OutputDelta

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
MAX_AVOIDED = 16
MAX_WAITS = 34  # a minute, for a replica that serves one request alone


async def answer(
    backend: Backend, call: Call, *, max_resumes: int, suspects: Suspects | None = None
) -> AsyncGenerator[OutputDelta]:
    """The deltas of `call`, moving to another replica when one is full, or lost.

    It moves at most `max_resumes` times, those not counted for which somebody stopped a replica. `suspects` is what the
    router knows of requests that end replicas; without it, of this one alone.

    Raises: Refused, with the fault that a replica named, `replica_lost`, or `request_ends_replicas`.
    """
    suspects = suspects or Suspects()
    num_tries = num_waits = 0
    with suspects.asked(call) as asked:
        while True:
            attempt = Attempt(call)
            is_reserved = False
            try:
                async with aclosing(deltas_of(backend, attempt, suspects, asked.fingerprint)) as deltas:
                    async for delta in deltas:
                        yield delta
                asked.is_well = True
                return
            except ReplicaFull as error:
                logger.info("request %s tries another replica than %s: %s", call.request_id, attempt.replica, error)
            except ReplicaReserved as error:
                if num_waits >= MAX_WAITS and not _must_wait(call):
                    raise Refused(Fault(code=RESERVED_CODE, message=str(error))) from error
                logger.info("request %s waits or goes elsewhere than %s: %s", call.request_id, attempt.replica, error)
                await asyncio.sleep(_pause_s(num_waits))
                num_waits += 1
                is_reserved = True
            except ReplicaLost as error:
                if not attempt.progress:
                    return  # only the end of the stream was lost
                max_resumes = _resumes_left(max_resumes, error)
                ids = sorted(attempt.progress)
                logger.warning("request %s goes on elsewhere, samples %s: %s", call.request_id, ids, error)
                await asyncio.sleep(_pause_s(num_tries))
            num_tries += 1
            calls = _continuations(attempt, is_reserved=is_reserved)
            if len(calls) > 1:
                break
            (call,) = calls
        rest = [answer(backend, c, max_resumes=max_resumes, suspects=suspects) for c in calls]
        async with aclosing(merge(rest)) as merged:
            async for _, delta in merged:
                yield delta
        asked.is_well = True


def _resumes_left(max_resumes: int, error: ReplicaLost) -> int:
    if error.meaning is Meaning.KILLED:
        return max_resumes  # whoever stops replicas may stop as many as they like
    if max_resumes == 0:
        message = "the replicas that served this request were lost too often; send it again"
        raise Refused(Fault(code="replica_lost", message=message)) from error
    return max_resumes - 1


def _pause_s(tries: int) -> float:
    return min(LAST_PAUSE_S, FIRST_PAUSE_S * (1 << min(tries, 10)))


def _must_wait(call: Call) -> bool:
    """For as long as it takes, once somebody has begun to read the answer."""
    return bool(call.resumed_output_token_ids)


def _continuations(attempt: Attempt, *, is_reserved: bool) -> list[Call]:
    """What is left of a call: itself if nothing was produced, else one call per unfinished sample."""
    call, progress = attempt.call, attempt.progress
    # A new id each time: an unreachable replica may still be running the old one.
    name, _, number = call.request_id.partition("~")
    name = f"{name}~{int(number.partition('.')[0] or 0) + 1}"
    # A call that must be alone makes the replica drain that it asked: it asks that one again.
    tried = () if attempt.is_alone and is_reserved else (attempt.replica,)
    avoid = tuple(dict.fromkeys((*call.avoid, *tried)))[-MAX_AVOIDED:]
    call = replace(call, avoid=avoid, request_id=f"{name}.{call.sample_index}")
    if len(progress) == call.params.n and not any(progress.values()):
        return [call]
    return [
        replace(
            call,
            request_id=f"{name}.{index}",
            params=replace(call.params, n=1),
            sample_index=index,
            resumed_output_token_ids=call.resumed_output_token_ids + tuple(token_ids),
        )
        for index, token_ids in sorted(progress.items())
    ]


class Primed(Generic[T]):
    """A stream whose first item is there already, so that a refusal came before anything was answered.

    An object, not a generator: closing a generator that never ran would not close what it reads from.
    """

    def __init__(self, first: T, stream: AsyncGenerator[T]) -> None:
        self._waiting = [first]
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return self._waiting.pop() if self._waiting else await anext(self._stream)

    async def aclose(self) -> None:
        self._waiting.clear()
        await self._stream.aclose()


class Stream(Protocol[T_co]):
    """What `merge` reads: an async generator or a `Primed`."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    async def aclose(self) -> None: ...


async def primed(stream: AsyncGenerator[T]) -> Primed[T]:
    """Waits for the first item of `stream`. Raises: what the stream raises; it is closed then."""
    try:
        return Primed(await anext(stream), stream)
    except BaseException:
        await stream.aclose()
        raise


async def all_primed(streams: Sequence[AsyncGenerator[T]]) -> list[Primed[T]]:
    """All of `streams` primed at once, or none: the first refusal closes the others and is raised."""
    if len(streams) == 1:  # as nearly always: waited for here, a task would only carry it
        return [await primed(streams[0])]
    tasks = [asyncio.ensure_future(primed(stream)) for stream in streams]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Primed):
                await outcome.aclose()
        raise


async def merge(streams: Sequence[Stream[T]]) -> AsyncGenerator[tuple[int, T]]:
    """Items of all `streams` as they come, each with the index of its stream.

    The first exception ends it; leaving it closes all streams.
    """
    if len(streams) == 1:
        (alone,) = streams
        try:
            async for item in alone:
                yield 0, item
        finally:
            await alone.aclose()
        return
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(maxsize=2 * len(streams))
    tasks = [asyncio.ensure_future(_pump(index, stream, queue)) for index, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            got = await queue.get()
            if got is None:
                running -= 1
            elif isinstance(got, Exception):
                raise got
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _pump(index: int, stream: Stream[T], queue: asyncio.Queue[tuple[int, T] | Exception | None]) -> None:
    try:
        async for item in stream:
            await queue.put((index, item))
    except Exception as error:
        await queue.put(error)
    else:
        await queue.put(None)
