"""One call on one replica: what came of it, and whose doing it was when the replica was lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from deployments.calls import RESERVED_CODE, STOPPED_CODE, UNREAD_CODE, Call, Fault, Refused, StreamItem
from deployments.losses import Meaning
from deployments.router.suspects import Run, Suspects
from engine.request import FinishReason, OutputDelta

logger = logging.getLogger("ray.serve")

HEARSAY_S = 0.05  # after a death all that were there have heard of it
FIRST_ALONE_PAUSE_S = 0.05
LAST_ALONE_PAUSE_S = 0.5  # less than `deployments.replica.alone.DRAIN_LEASE_S`
MAX_FULL_REPLICAS = 3  # that are asked before a caller hears of full queues: overload must not multiply calls
_FULL_CODE = "queue_full"
_LOST_CODES = {"engine_dead": Meaning.DIED, STOPPED_CODE: Meaning.KILLED, UNREAD_CODE: Meaning.AWAY}


class ReplicaLost(Exception):
    """The replica that served a request is gone; what it had sent stays valid.

    `meaning` is one of `deployments.losses.LOST`. `death` tells this death from others ("": not known).
    """

    def __init__(self, message: str, *, meaning: Meaning = Meaning.DIED, death: str = "") -> None:
        super().__init__(message)
        self.meaning = meaning
        self.death = death


class ReplicaFull(Exception):
    """The queue of the replica that was chosen is full, or it drains; another may have room."""


class ReplicaReserved(Exception):
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


class Attempt:
    """What became of one call on one replica."""

    def __init__(self, call: Call) -> None:
        self.call = call  # with the adapter version that the replica named
        self.replica = ""
        self.is_alone = False  # it was to be served with nothing beside it
        self.progress: dict[int, list[int]] = {call.sample_index + i: [] for i in range(call.params.n)}

    def take(self, item: StreamItem) -> None:
        """Raises: ReplicaLost, ReplicaFull, ReplicaReserved, Refused."""
        self.replica = item.replica
        if item.adapter_version and item.adapter_version != self.call.adapter_version:
            self.call = replace(self.call, adapter_version=item.adapter_version)
        fault = item.fault
        if fault is None:
            return
        if fault.code in _LOST_CODES:
            raise ReplicaLost(fault.message, meaning=_LOST_CODES[fault.code])
        if fault.code == _FULL_CODE and _may_try_another(self.call, item.replica):
            raise ReplicaFull(fault.message)
        if fault.code == RESERVED_CODE:
            raise ReplicaReserved(fault.message)
        raise Refused(fault)


async def deltas_of(
    backend: Backend, attempt: Attempt, suspects: Suspects, fingerprint: str
) -> AsyncGenerator[OutputDelta]:
    """The deltas that one replica sends.

    Raises: ReplicaLost, also for a stream that ends early; ReplicaFull, ReplicaReserved, Refused.
    """
    async with suspects.run(attempt.call, fingerprint) as (run, call):
        attempt.is_alone = run.is_alone
        num_waits = 0
        while True:
            try:
                async with aclosing(_deltas(backend.stream(call), attempt, run, suspects)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except ReplicaReserved:
                if not run.is_alone:
                    raise
                # It has its turn, and the replica that it asked takes no others: soon it is the only one there.
                await asyncio.sleep(min(LAST_ALONE_PAUSE_S, FIRST_ALONE_PAUSE_S * (1 << num_waits)))
                num_waits = min(num_waits + 1, 10)
            except ReplicaLost as error:
                if error.meaning is Meaning.KILLED and suspects.hung(run):
                    error.meaning = Meaning.DIED
                if error.meaning is Meaning.DIED:
                    await _blame(run, error, suspects, is_told=bool(attempt.progress))
                raise


async def _deltas(
    stream: AsyncGenerator[StreamItem], attempt: Attempt, run: Run, suspects: Suspects
) -> AsyncGenerator[OutputDelta]:
    progress = attempt.progress
    async with aclosing(stream) as items:
        async for item in items:
            if item.fault is None or item.fault.code != RESERVED_CODE:  # else it was turned away, and is not there
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
    await asyncio.sleep(HEARSAY_S)
    try:
        suspects.judge(run, error.death)
    except Refused as refused:
        logger.error("request on replica %s is not tried again: %s", run.replica, refused)
        if is_told:
            raise refused from error


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
