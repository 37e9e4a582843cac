"""The replicas behind a deployment handle of Serve. Ray's exceptions end here.

An answer about all of them is put together from what each says within a deadline: one that is away is named, and spoils
nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator
from typing import Any

from ray.serve.handle import DeploymentHandle

from adapter_store.errors import StoreError
from deployments.calls import Call, Fault, Refused, StreamItem
from deployments.losses import LOST, Meaning, actor_of, fate, meaning
from deployments.router.streams import ReplicaLost
from engine.errors import EngineError

logger = logging.getLogger("ray.serve")

PING_TIMEOUT_S = 2.0
FIRST_PING_S = 0.5  # then every replica is asked
STATS_TIMEOUT_S = 5.0
_CANCELLED = Fault(code="request_cancelled", message="the request was taken back while it ran; send it again")


class ServeBackend:
    """See `deployments.router.streams.Backend`."""

    def __init__(self, handle: DeploymentHandle[Any], *, wait_s: float) -> None:
        """`wait_s`: how long a call may wait for a replica to take it; Serve itself would wait for ever."""
        self._handle = handle
        self._wait_s = wait_s
        self._streaming = handle.options(stream=True)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """Items of `call`. Raises: ReplicaLost; Refused; what the replica itself or a mistake of ours raises."""
        # In a context of its own: calls made within one HTTP request would share its internal id, by which Serve tells
        # waiting calls apart, and all but the first would wait for ever.
        response: Any = contextvars.Context().run(self._streaming.generate.remote, call)
        try:
            yield await self._accepted(response)
            async for item in response:
                yield item
        except (Refused, ReplicaLost):
            raise
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            raise Refused(_CANCELLED) from error  # Serve's word for a call that was cancelled over there
        except Exception as error:
            found = meaning(error)
            if found is Meaning.AWAY and (actor := actor_of(error)) is not None:
                found = await asyncio.to_thread(fate, actor)
            told = _told(error, found, call.request_id)
            if told is error:
                raise
            raise told from error
        finally:
            response.cancel()  # aborts what still runs; nothing to a finished call

    async def _accepted(self, response: Any) -> StreamItem:
        """The first item, which a replica sends before it does anything else."""
        deadline = asyncio.timeout(self._wait_s)
        try:
            async with deadline:
                item: StreamItem = await anext(response)
                return item
        except StopAsyncIteration as error:
            raise ReplicaLost("the stream ended before it began", meaning=Meaning.AWAY) from error
        except TimeoutError as error:
            if not deadline.expired():
                raise  # one of Ray's: it means what it does elsewhere
            message = f"no replica took the request within {self._wait_s:g} s; try again later"
            raise Refused(Fault(code="no_replica", message=message)) from error

    async def ping(self) -> None:
        """Returns as soon as one replica answered. Raises: Refused when none does in time."""
        reasons: list[str] = []
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                try:
                    async with asyncio.timeout(FIRST_PING_S):
                        await self._handle.ping.remote()
                    return
                except Exception as error:
                    reasons.append(type(error).__name__)
                # The one that was asked may be the one that hangs.
                members = await self._members("ping")
                if await _any_answers(members, reasons):
                    return
        except Exception as error:
            reasons.append(type(error).__name__)
        message = f"no replica answered within {PING_TIMEOUT_S:g} s ({', '.join(dict.fromkeys(reasons))})"
        raise Refused(Fault(code="engine_dead", message=message))

    async def stats(self) -> list[dict[str, object]]:
        """What each replica says within `STATS_TIMEOUT_S`; one that says nothing has the field `missing`: why."""
        known = self._replica_ids()  # before one that died is taken off
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                members = await self._members("stats")
        except Exception as error:
            return [
                {"part": "replica", "replica": None, "missing": f"no replica could be asked ({type(error).__name__})"}
            ]
        answers = await asyncio.gather(*(_within(member, STATS_TIMEOUT_S) for member in members))
        said = [answer for answer in answers if isinstance(answer, dict)]
        unheard = known - {str(answer.get("replica")) for answer in said}
        silence = [str(answer) for answer in answers if not isinstance(answer, dict)]
        # More silent calls than names: a replica that is no longer counted; more names: one that could not be asked.
        names = [*sorted(unheard), *[None] * (len(silence) - len(unheard))]
        why = [*silence, *["it could not be asked"] * (len(names) - len(silence))]
        return [
            *said,
            *({"part": "replica", "replica": name, "missing": text} for name, text in zip(names, why, strict=True)),
        ]

    async def _members(self, method: str) -> list[Any]:
        """One pending answer for each replica.

        Serve's own way to collect them waits for all, so that a replica that hangs would hold back the others'.
        """
        response: Any = await asyncio.to_thread(self._handle.broadcast, method)
        return list(await response._fetch_replica_results_async())

    def _replica_ids(self) -> set[str]:
        """The replicas that this router knows of now. Serve has no public name for it."""
        router: Any = getattr(self._handle, "_router", None)
        router = getattr(router, "_asyncio_router", router)
        known: dict[Any, Any] = getattr(getattr(router, "request_router", None), "curr_replicas", None) or {}
        return {str(replica_id.unique_id) for replica_id in list(known)}


async def _any_answers(members: list[Any], reasons: list[str]) -> bool:
    tasks = [asyncio.ensure_future(member.get_async()) for member in members]
    try:
        for task in asyncio.as_completed(tasks):
            try:
                await task
            except Exception as error:
                reasons.append(type(error).__name__)
            else:
                return True
        return False
    finally:
        for unneeded in tasks:
            unneeded.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _within(member: Any, timeout_s: float) -> object:
    """What `member` answers, or why it does not."""
    try:
        async with asyncio.timeout(timeout_s):
            return await member.get_async()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except Exception as error:
        found = meaning(error)
        return f"it is gone: {found.value}" if found in LOST else f"{type(error).__name__} in the replica"


def _told(error: Exception, found: Meaning, request_id: str) -> Exception:
    """`error` of Ray in this layer's words."""
    if found in LOST:
        what = f"{type(error).__name__} in request {request_id} ({found.value})"
        return ReplicaLost(what, meaning=found, death=actor_of(error) or "")
    if found is Meaning.OVERLOADED:
        code = "queue_full" if "BackPressure" in type(error).__name__ else "replica_overloaded"
        return Refused(Fault(code=code, message="all replicas are full; try again later"))
    if found is Meaning.CANCELLED:
        return Refused(_CANCELLED)
    cause = getattr(error, "cause", None)  # of a RayTaskError, whose own text is a traceback
    return cause if isinstance(cause, EngineError | StoreError | Refused) else error
