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

from deployments.calls import RESERVED_CODE, STOPPED_CODE, Call, Fault, Refused, StreamItem
from deployments.losses import Meaning
from deployments.router.suspects import Run, Suspects
from engine.request import FinishReason, OutputDelta

logger = logging.getLogger("ray.serve")

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
LAST_ALONE_PAUSE_S = 0.5  # less than `deployments.replica.alone.DRAIN_LEASE_S`
MAX_FULL_REPLICAS = 3  # that are asked before a caller hears of full queues: overload must not multiply calls
MAX_AVOIDED = 16
MAX_WAITS = 34  # a minute, for a replica that serves one request alone
_FULL_CODE = "queue_full"
_LOST_CODES = {"engine_dead": Meaning.DIED, STOPPED_CODE: Meaning.KILLED}


class ReplicaLost(Exception):
    """The replica that served a request is gone; what it had sent stays valid.

    `meaning` is one of `deployments.losses.LOST`. `death` tells this death from others ("": not known).
    """

    def __init__(self, message: str, *, meaning: Meaning = Meaning.DIED, death: str = "") -> None:
        super().__init__(message)
        self.meaning = meaning
        self.death = death


class _ReplicaFull(Exception):
    """The queue of the replica that was chosen is full, or it drains; another may have room."""


class _ReplicaReserved(Exception):
    """The replica that was chosen serves one request alone for a while."""


class Backend(Protocol):
    """The replicas, as a router sees them."""

    def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """Items of one call. Closing it aborts the call. Raises: ReplicaLost; Refused when all queues are full."""
        ...

    async def ping(self) -> None:
        """Returns when some replica answered. Raises: Refused when it cannot serve."""
        ...

    async def stats(self) -> list[dict[str, object]]:
        """What each replica says of itself; of one that says nothing in time its id and, as `missing`, why."""
        ...


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
            attempt = _Attempt(call)
            is_reserved = False
            try:
                async with aclosing(_one_replicas(backend, attempt, suspects)) as deltas:
                    async for delta in deltas:
                        yield delta
                asked.is_well = True
                return
            except _ReplicaFull as error:
                logger.info("request %s tries another replica than %s: %s", call.request_id, attempt.replica, error)
            except _ReplicaReserved as error:
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


class _Attempt:
    """What became of one call on one replica."""

    def __init__(self, call: Call) -> None:
        self.call = call  # with the adapter version that the replica named
        self.replica = ""
        self.is_alone = False  # it was to be served with nothing beside it
        self.progress: dict[int, list[int]] = {call.sample_index + i: [] for i in range(call.params.n)}

    def take(self, item: StreamItem) -> None:
        """Raises: ReplicaLost, _ReplicaFull, _ReplicaReserved, Refused."""
        self.replica = item.replica
        self.call = replace(self.call, adapter_version=item.adapter_version or self.call.adapter_version)
        fault = item.fault
        if fault is None:
            return
        if fault.code in _LOST_CODES:
            raise ReplicaLost(fault.message, meaning=_LOST_CODES[fault.code])
        if fault.code == _FULL_CODE and _may_try_another(self.call, item.replica):
            raise _ReplicaFull(fault.message)
        if fault.code == RESERVED_CODE:
            raise _ReplicaReserved(fault.message)
        raise Refused(fault)


async def _one_replicas(backend: Backend, attempt: _Attempt, suspects: Suspects) -> AsyncGenerator[OutputDelta]:
    """The deltas that one replica sends.

    Raises: ReplicaLost, also for a stream that ends early; _ReplicaFull, _ReplicaReserved, Refused.
    """
    async with suspects.run(attempt.call) as (run, call):
        attempt.is_alone = run.is_alone
        num_waits = 0
        while True:
            try:
                async with aclosing(_deltas(backend.stream(call), attempt, run, suspects)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except _ReplicaReserved:
                if not run.is_alone:
                    raise
                # It has its turn, and the replica that it asked takes no others: soon it is the only one there.
                await asyncio.sleep(min(LAST_ALONE_PAUSE_S, _pause_s(num_waits)))
                num_waits += 1
            except ReplicaLost as error:
                if error.meaning is Meaning.KILLED and suspects.hung(run):
                    error.meaning = Meaning.DIED
                if error.meaning is Meaning.DIED:
                    await _blame(run, error, suspects, is_told=bool(attempt.progress))
                raise


async def _deltas(
    stream: AsyncGenerator[StreamItem], attempt: _Attempt, run: Run, suspects: Suspects
) -> AsyncGenerator[OutputDelta]:
    progress = attempt.progress
    async with aclosing(stream) as items:
        async for item in items:
            suspects.heard_from(run, item.replica)
            attempt.take(item)
            for delta in item.deltas:
                _refuse_failed(delta)
                progress[delta.sample_index].extend(delta.token_ids)
                suspects.brought(run, len(delta.token_ids))
                if delta.finish_reason is not None:
                    del progress[delta.sample_index]
                yield delta
    if progress:
        message = f"the stream of request {attempt.call.request_id} ended before its samples {sorted(progress)}"
        raise ReplicaLost(message, meaning=Meaning.AWAY)


async def _blame(run: Run, error: ReplicaLost, suspects: Suspects, *, is_told: bool) -> None:
    """Raises: Refused (`request_ends_replicas`), if `is_told`: a caller that has its whole answer needs no error."""
    suspects.died(run, error.death)
    await asyncio.sleep(FIRST_PAUSE_S)  # until the others that were there have heard of it
    try:
        suspects.judge(run, error.death)
    except Refused as refused:
        logger.error("request on replica %s is not tried again: %s", run.replica, refused)
        if is_told:
            raise refused from error


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


def _continuations(attempt: _Attempt, *, is_reserved: bool) -> list[Call]:
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
