"""Whether a replica takes a call: while one must be served alone, it takes no other.

A router asks for that when a request was on replicas that died (`Call.alone_tokens`). Calls come from several routers;
only here they meet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.calls import Call

DRAIN_LEASE_S = 5.0  # a call that waits to be alone asks again within; until then nothing new is taken
MAX_ALONE_S = 60.0


@dataclass(slots=True)
class _Waiting:
    key: str
    until_s: float


@dataclass(slots=True)
class _Running:
    request_id: str
    tokens_left: int
    until_s: float


class Door:
    """Lives on one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: _Waiting | None = None
        self._running: _Running | None = None

    def admits(self, call: Call, num_others: int) -> bool:
        """Whether `call` may begin beside `num_others` that are in hand.

        One that must be alone and is not keeps the door shut for others until it asks again.
        """
        now = self._clock()
        if self._running is not None and now < self._running.until_s:
            return False
        key = call.request_id.partition("~")[0]
        if self._waiting is not None and now < self._waiting.until_s and self._waiting.key != key:
            return False
        if call.alone_tokens and num_others:
            self._waiting = _Waiting(key, now + DRAIN_LEASE_S)
            return False
        self._waiting = None
        if call.alone_tokens:
            self._running = _Running(call.request_id, call.alone_tokens, now + MAX_ALONE_S)
        return True

    def produced(self, call: Call, num_tokens: int) -> None:
        """`call` has so many more tokens."""
        running = self._running
        if running is not None and running.request_id == call.request_id:
            running.tokens_left -= num_tokens
            if running.tokens_left <= 0:
                self._running = None

    def left(self, call: Call) -> None:
        """`call` has ended, however it did."""
        if self._running is not None and self._running.request_id == call.request_id:
            self._running = None
