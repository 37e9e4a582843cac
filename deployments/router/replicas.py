"""The replicas behind a deployment handle of Serve. Ray's exceptions end here.

An answer about all of them is put together from what each says within a deadline: one that is away is named, and spoils
nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from ray.serve.handle import DeploymentHandle

from adapter_store.errors import StoreError
from deployments.calls import Call, Fault, Receipt, Refused, StreamItem, Submission
from deployments.losses import LOST, Meaning, actor_of, fate, meaning
from deployments.router import members
from deployments.router.fleet import Fleet
from deployments.router.streams import ReplicaLost
from deployments.router.submissions import Submissions
from deployments.router.subscriptions import Mailbox, Subscriptions
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
        self._fleet = Fleet()
        self._subscriptions = Subscriptions(
            handle, explain=_explained, known_replicas=self._replica_ids, fleet=self._fleet
        )
        self._submissions = Submissions(handle, self._subscriptions.cancel)
        self._stop_listening: Callable[[], None] | None = None

    def start(self) -> None:
        """Begins to hear of the replicas, on the loop that runs. Nothing happens the second time."""
        if self._stop_listening is None:
            deployment = str(getattr(self._handle, "deployment_id", ""))
            self._on_members(tuple(self._replica_ids()))
            self._stop_listening = members.listen(deployment, asyncio.get_running_loop(), self._on_members)

    def _on_members(self, replica_ids: tuple[str, ...]) -> None:
        self._fleet.on_members(replica_ids)
        self._subscriptions.read_from(replica_ids)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """Items of `call`, the first of them empty: a replica has it.

        Raises: ReplicaLost; Refused; what the replica itself or a mistake of ours raises.
        """
        self.start()
        box = self._subscriptions.box()
        aim = self._fleet.place(call)
        where = aim[0] if aim else ""
        self._fleet.sent(where)
        num_unfinished, is_over = call.params.n, False
        try:
            receipt = await self._receipt(call, box, aim)
            if receipt.replica != where:
                self._fleet.ended(where)
                where = receipt.replica
                self._fleet.sent(where)
            self._fleet.on_load(receipt.replica, receipt.load)
            if receipt.fault is not None:
                is_over = True
                yield StreamItem(replica=receipt.replica, fault=receipt.fault)
                return
            yield StreamItem(replica=receipt.replica)
            while num_unfinished:
                item = await box.take()
                num_unfinished -= sum(delta.finish_reason is not None for delta in item.deltas)
                is_over = not num_unfinished or item.fault is not None
                yield item
                if item.fault is not None:
                    return
        except ReplicaLost:
            is_over = True
            raise
        finally:
            self._fleet.ended(where)
            self._subscriptions.leave(box, is_over=is_over)

    async def _receipt(self, call: Call, box: Mailbox, aim: tuple[str, ...]) -> Receipt:
        """What the replica says that has it. Raises: as `stream`."""
        ticket = self._submissions.send(Submission(call, self._subscriptions.router, box.number, aim))
        try:
            receipt = await asyncio.wait_for(asyncio.shield(ticket.receipt), self._wait_s)
        except TimeoutError as error:
            if ticket.receipt.done():
                raise await _explained(error, call.request_id) from error  # one of Ray's own
            self._submissions.take_back(ticket)
            message = f"no replica took the request within {self._wait_s:g} s; try again later"
            raise Refused(Fault(code="no_replica", message=message)) from error
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                self._submissions.take_back(ticket)
                raise
            raise Refused(_CANCELLED) from error  # Serve's word for a call that was cancelled over there
        except Exception as error:
            told = await _explained(error, call.request_id)
            if told is error:
                raise
            raise told from error
        if receipt.fault is None:
            self._subscriptions.bind(box, receipt.replica, receipt.reading)
        return receipt

    async def close(self) -> None:
        """Reads no more: what runs is given up, and replicas that are to stop need not wait."""
        if self._stop_listening is not None:
            self._stop_listening()
        await self._subscriptions.close()

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
                    reasons.append(_why(error))
                # The one that was asked may be the one that hangs.
                members = await self._members("ping")
                if await _any_answers(members, reasons):
                    return
        except Exception as error:
            reasons.append(_why(error))
        message = f"no replica answered within {PING_TIMEOUT_S:g} s ({', '.join(dict.fromkeys(reasons))})"
        raise Refused(Fault(code="engine_dead", message=message))

    async def stats(self) -> list[dict[str, object]]:
        """What each replica says within `STATS_TIMEOUT_S`; one that says nothing has the field `missing`: why."""
        known = self._replica_ids()  # before one that died is taken off
        try:
            async with asyncio.timeout(STATS_TIMEOUT_S):
                members = await self._members("stats")
        except Exception as error:
            logger.warning("no replica could be asked for its statistics: %s: %s", type(error).__name__, error)
            return [{"part": "replica", "replica": None, "missing": f"no replica could be asked: {_why(error)}"}]
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
                reasons.append(_why(error))
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
        return f"it is gone: {found.value}" if found in LOST else found.value


def _why(error: Exception) -> str:
    """Why nothing was heard, in words that name nothing of Ray's."""
    return "no answer in time" if isinstance(error, TimeoutError) else meaning(error).value


async def _explained(error: Exception, what: str) -> Exception:
    """`error` of Ray in this layer's words; `what` it came from."""
    found = meaning(error)
    if found is Meaning.AWAY and (actor := actor_of(error)) is not None:
        found = await asyncio.to_thread(fate, actor)
    return _told(error, found, what)


def _told(error: Exception, found: Meaning, what: str) -> Exception:
    """`error` of Ray in this layer's words."""
    if found in LOST:
        message = f"{type(error).__name__} in {what} ({found.value})"
        return ReplicaLost(message, meaning=found, death=actor_of(error) or "")
    if found is Meaning.OVERLOADED:
        code = "queue_full" if "BackPressure" in type(error).__name__ else "replica_overloaded"
        return Refused(Fault(code=code, message="all replicas are full; try again later"))
    if found is Meaning.CANCELLED:
        return Refused(_CANCELLED)
    cause = getattr(error, "cause", None)  # of a RayTaskError, whose own text is a traceback
    return cause if isinstance(cause, EngineError | StoreError | Refused) else error
