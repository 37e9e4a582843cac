"""One actor of the adapter store: found or created, waited for, told its specs again.

It may die and come back empty at any time. Calls wait for it up to `wait_s`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayTaskError

from adapter_store.errors import SpecUnknown, StoreError
from deployments.calls import Fault, Refused
from deployments.losses import LOST, Meaning, meaning

logger = logging.getLogger("ray.serve")

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 1.0
_AWAY = LOST | {Meaning.OVERLOADED}  # worth another try


class StoreLink:
    """`spec` is the image spec of a replica's engine; a router has none."""

    def __init__(self, connect: Callable[[], Any], wait_s: float, owner: str, spec: dict[str, Any] | None) -> None:
        self._connect = connect
        self._wait_s = wait_s
        self._owner = owner
        self._spec = spec
        self._actor: Any = None
        self._expected: Counter[tuple[str, str | None]] = Counter()  # requests that the store was not told of yet
        self.telling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises: Refused (`store_unavailable`) when it could not be started in time."""
        await self.call("status")
        if self._spec is not None:
            await self.call("register_spec", self._spec, self._owner)

    def expect(self, name: str, source: str | None) -> None:
        """Tells the store that a request for `name` is on its way, without waiting for anything."""
        if self._actor is None:
            return
        self._expected[name, source] += 1
        if self.telling is None or self.telling.done():
            self.telling = asyncio.ensure_future(self._tell())

    async def _tell(self) -> None:
        """One call at a time; what comes meanwhile goes with the next. What fails is told when a replica leases it."""
        while self._expected:
            expected, self._expected = self._expected, Counter()
            try:
                await self.call("expect_all", tuple((*key, number) for key, number in expected.items()))
            except Exception as error:
                logger.info("the adapter store does not know what is asked for: %s: %s", type(error).__name__, error)

    async def call(self, method: str, *args: Any, wait_s: float | None = None) -> Any:
        """Raises: a StoreError of the store's; Refused (`store_unavailable`) after `wait_s`."""
        limit_s = self._wait_s if wait_s is None else wait_s
        deadline = time.monotonic() + limit_s
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return await self._try(method, args, None if wait_s is None else deadline)
            except SpecUnknown:
                if self._spec is None or time.monotonic() > deadline:
                    raise
                await self._try("register_spec", (self._spec, self._owner), None)
            except RayTaskError:
                raise  # the store is there and has a fault; its class may also be one of those below
            except Exception as error:
                # A ValueError: its name is not there, or was taken in the same moment. TimeoutError is an OSError.
                if not (isinstance(error, ValueError | OSError) or meaning(error) in _AWAY):
                    raise
                if time.monotonic() + pause_s > deadline:
                    raise unavailable(f"the adapter store did not answer for {limit_s:g} s") from error
                logger.info("the adapter store is away (%s: %s), asking again", type(error).__name__, error)
                await asyncio.sleep(pause_s)
                pause_s = min(LAST_PAUSE_S, 2 * pause_s)

    async def _try(self, method: str, args: tuple[Any, ...], deadline: float | None) -> Any:
        async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
            actor = self._actor
            if actor is None:
                self._actor = actor = await asyncio.to_thread(self._connect)
            try:
                return await getattr(actor, method).remote(*args)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, StoreError):
                    raise cause from None
                raise
            except Exception as error:
                is_away = isinstance(error, ValueError | TimeoutError) or meaning(error) in _AWAY
                if is_away and self._actor is actor:  # else somebody has found the next one already
                    self._actor = None
                raise


def unavailable(message: str) -> Refused:
    """The store could not be had in time."""
    return Refused(Fault(code="store_unavailable", message=f"{message}; try again later"))
