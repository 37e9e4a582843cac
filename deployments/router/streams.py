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

from deployments.calls import Call, Fault, Refused, StreamItem
from engine.request import FinishReason, OutputDelta

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
MAX_FULL_REPLICAS = 3  # that are asked before a caller hears of full queues: overload must not multiply calls
_FULL_CODE = "queue_full"
_LOST_CODES = frozenset({"engine_dead"})


class ReplicaLost(Exception):
    """The replica that served a request is gone; what it had sent stays valid."""


class _ReplicaFull(Exception):
    """The queue of the replica that was chosen is full, or it drains; another may have room."""


class Backend(Protocol):
    """The replicas, as a router sees them."""

    def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """Items of one call. Closing it aborts the call. Raises: ReplicaLost; Refused when all queues are full."""
        ...

    async def ping(self) -> None:
        """Returns when some replica answered. Raises: Refused when it cannot serve."""
        ...

    async def stats(self) -> list[dict[str, object]]:
        """What each replica says of itself."""
        ...


async def answer(backend: Backend, call: Call, *, max_resumes: int) -> AsyncGenerator[OutputDelta]:
    """The deltas of `call`, moving to another replica when one is full, or lost (at most `max_resumes` times).

    Raises: Refused, with the fault that a replica named, or `replica_lost`.
    """
    progress: dict[int, list[int]] = {call.sample_index + i: [] for i in range(call.params.n)}
    replica = ""
    try:
        async with aclosing(backend.stream(call)) as items:
            async for item in items:
                replica = item.replica
                call = replace(call, adapter_version=item.adapter_version or call.adapter_version)
                if item.fault is not None and item.fault.code in _LOST_CODES:
                    raise ReplicaLost(item.fault.message)
                if item.fault is not None and item.fault.code == _FULL_CODE and _may_try_another(call, replica):
                    raise _ReplicaFull(item.fault.message)
                if item.fault is not None:
                    raise Refused(item.fault)
                for delta in item.deltas:
                    _refuse_failed(delta)
                    progress[delta.sample_index].extend(delta.token_ids)
                    if delta.finish_reason is not None:
                        del progress[delta.sample_index]
                    yield delta
        if progress:
            raise ReplicaLost(f"the stream of request {call.request_id} ended before its samples {sorted(progress)}")
        return
    except _ReplicaFull as error:
        logger.info("request %s tries another replica than %s: %s", call.request_id, replica, error)
    except ReplicaLost as error:
        if not progress:
            return  # only the end of the stream was lost
        if max_resumes == 0:
            message = "the replicas that served this request were lost too often; send it again"
            raise Refused(Fault(code="replica_lost", message=message)) from error
        logger.warning("request %s goes on elsewhere, samples %s: %s", call.request_id, sorted(progress), error)
        max_resumes -= 1
        await asyncio.sleep(min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** len(call.avoid)))
    calls = _continuations(call, progress, replica)
    async with aclosing(merge([answer(backend, c, max_resumes=max_resumes) for c in calls])) as deltas:
        async for _, delta in deltas:
            yield delta


def _may_try_another(call: Call, replica: str) -> bool:
    """Replicas to avoid are ranked last: one that comes again means that there is no other."""
    has_reader = bool(call.resumed_output_token_ids)
    return replica not in call.avoid and (has_reader or len(call.avoid) + 1 < MAX_FULL_REPLICAS)


def _refuse_failed(delta: OutputDelta) -> None:
    if delta.finish_reason is FinishReason.ERROR:
        error = delta.error
        code, message = (error.code, error.message) if error else ("request_failed", "the sequence failed")
        raise Refused(Fault(code=code, message=message))
    if delta.finish_reason is FinishReason.ABORT:
        raise Refused(Fault(code="request_failed", message="the server gave up this request; send it again"))


def _continuations(call: Call, progress: dict[int, list[int]], replica: str) -> list[Call]:
    """What is left of `call`: itself if nothing was produced, else one call per unfinished sample."""
    # A new id each time: an unreachable replica may still be running the old one.
    attempt = len(call.avoid) + 1
    call = replace(call, avoid=(*call.avoid, replica), request_id=f"{call.request_id.partition('~')[0]}~{attempt}")
    if len(progress) == call.params.n and not any(progress.values()):
        return [call]
    return [
        replace(
            call,
            request_id=f"{call.request_id}.{index}",
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
