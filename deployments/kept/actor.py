"""The answers that all routers of an application share: in an actor of its own, begun with the first that is kept.

A router that dies takes none of them along. The actor is a cache: when it dies itself it comes back empty, and it ends
when nobody has called it for as long as the oldest answer may be kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from deployments.calls import Fault, Refused
from deployments.kept.answers import Answers

logger = logging.getLogger("ray.serve")

CALL_S = 5.0
FIRST_CALL_S = 30.0  # a process starts for it


class KeptActor:
    """`Answers` behind remote calls, on one event loop."""

    def __init__(self, max_bytes: int, max_bytes_of_one: int, max_age_s: float) -> None:
        self._answers = Answers(max_bytes, max_bytes_of_one, max_age_s)
        self._max_age_s = max_age_s
        self._called_s = time.monotonic()
        self._watch = asyncio.get_event_loop().create_task(self._leave_when_idle())

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        """See `Kept.put`."""
        self._called_s = time.monotonic()
        return self._answers.put(tenant, name, data)

    async def get(self, tenant: str, name: str) -> bytes | None:
        """See `Kept.get`."""
        self._called_s = time.monotonic()
        return self._answers.get(tenant, name)

    async def delete(self, tenant: str, name: str) -> bool:
        """See `Kept.delete`."""
        self._called_s = time.monotonic()
        return self._answers.delete(tenant, name)

    async def _leave_when_idle(self) -> None:
        while (left_s := self._called_s + self._max_age_s - time.monotonic()) > 0:
            await asyncio.sleep(left_s)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class SharedAnswers:
    """The actor, from a router. Raises: Refused (`kept_unavailable`) when it does not answer."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        """`connect` gives a handle of the actor, which it begins if there is none; it may block."""
        self._connect = connect
        self._handle: Any = None

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        """See `Kept.put`."""
        return bool(await self._call("put", tenant, name, data))

    async def get(self, tenant: str, name: str) -> bytes | None:
        """See `Kept.get`."""
        found: bytes | None = await self._call("get", tenant, name)
        return found

    async def delete(self, tenant: str, name: str) -> bool:
        """See `Kept.delete`."""
        return bool(await self._call("delete", tenant, name))

    async def _call(self, method: str, *args: object) -> Any:
        for is_last in (False, True):
            try:
                async with asyncio.timeout(CALL_S if self._handle is not None else FIRST_CALL_S):
                    if self._handle is None:
                        self._handle = await asyncio.to_thread(self._connect)
                    return await getattr(self._handle, method).remote(*args)
            except (RayActorError, TimeoutError, ValueError) as error:
                # It left, as nobody had called for long, or is being restarted: the next handle finds or begins one.
                self._handle = None
                if is_last:
                    logger.warning("kept answers cannot be reached: %s: %s", type(error).__name__, error)
                    message = "answers that are kept cannot be reached now; send it again, or with store=false"
                    raise Refused(Fault(code="kept_unavailable", message=message)) from error


def connector(name: str, namespace: str, max_bytes: int, max_bytes_of_one: int, max_age_s: float) -> Callable[[], Any]:
    """For `SharedAnswers`: the actor called `name` in a Ray namespace."""

    def connect() -> Any:
        on_ray: Any = ray.remote
        actor = on_ray(KeptActor).options(
            name=name,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=1,
            max_concurrency=1000,
        )
        return actor.remote(max_bytes, max_bytes_of_one, max_age_s)

    return connect
