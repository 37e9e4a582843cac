"""How fast and how many at once: a rate for all downloads, and how many reads a source takes. The policies are pure."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class TokenBucket:
    """A rate. Pure: `now` is passed in, in seconds of any monotonic clock; not for several threads.

    What is taken may be more than there is: the bucket owes, and whoever takes next waits for that too. So over any
    time t at most `rate * (t + burst_s)` bytes and one take more pass.
    """

    def __init__(self, rate: float, now: float, burst_s: float = 0.1) -> None:
        self._rate = rate
        self._capacity = rate * burst_s
        self._tokens = self._capacity
        self._checked_at = now

    def take(self, number: int, now: float) -> float:
        """Takes `number` and returns the seconds after which they are paid for."""
        passed_s = max(0.0, now - self._checked_at)
        self._checked_at = max(now, self._checked_at)
        self._tokens = min(self._capacity, self._tokens + passed_s * self._rate) - number
        return max(0.0, -self._tokens / self._rate)


class Pacer:
    """Keeps all who call `wait`, from whatever threads, to `bytes_per_s` together; None is no limit."""

    def __init__(self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bucket = None if bytes_per_s is None else TokenBucket(bytes_per_s, clock())
        self._lock = threading.Lock()

    def wait(self, num_bytes: int, stopped: threading.Event) -> None:
        """Blocks until `num_bytes` are paid for, or `stopped` is set."""
        if self._bucket is None:
            return
        with self._lock:
            seconds = self._bucket.take(num_bytes, self._clock())
        if seconds:
            stopped.wait(seconds)


class Aimd:
    """How many at once: one more after as many successes as there may be at once, half as many when told to slow down.

    Pure: `now` is passed in. Several refusals within `settle_s` are one, as they were sent before the first was heard.
    Source: additive increase, multiplicative decrease, as TCP's (RFC 5681).
    """

    def __init__(self, maximum: int, settle_s: float = 1.0) -> None:
        self._maximum = float(maximum)
        self._limit = self._maximum
        self._settle_s = settle_s
        self._slowed_at = float("-inf")

    @property
    def limit(self) -> int:
        """From 1 to the maximum."""
        return int(self._limit)

    def succeeded(self) -> None:
        """One of them went well."""
        self._limit = min(self._maximum, self._limit + 1 / self._limit)

    def slow_down(self, now: float) -> None:
        """One of them was refused for being one too many."""
        if now - self._slowed_at >= self._settle_s:
            self._slowed_at = now
            self._limit = max(1.0, self._limit / 2)


class SourceGate:
    """Lets as many reads of one source run at once as its Aimd says: `async with gate`. For one event loop."""

    def __init__(self, maximum: int) -> None:
        self.aimd = Aimd(maximum)
        self._num_running = 0
        self._left = asyncio.Event()

    async def __aenter__(self) -> None:
        while self._num_running >= self.aimd.limit:
            await self._left.wait()
        self._num_running += 1

    async def __aexit__(self, *_: object) -> None:
        self._num_running -= 1
        self._left.set()  # all who wait look again, in their order
        self._left = asyncio.Event()


class RoomGate:
    """At most `maximum` at once, of `max_bytes` together at most, in the order in which they come; what is larger
    than that goes alone. For one event loop.
    """

    def __init__(self, maximum: int, max_bytes: int | None) -> None:
        self._maximum, self._max_bytes = maximum, max_bytes
        self._sizes: list[int] = []  # of those inside
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def room(self, num_bytes: int) -> AsyncIterator[None]:
        """Room for so many bytes."""
        if self._waiting or not self._has_room(num_bytes):
            await self._wait(num_bytes)
        else:
            self._sizes.append(num_bytes)
        try:
            yield
        finally:
            self._leave(num_bytes)

    async def _wait(self, num_bytes: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((num_bytes, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(num_bytes)  # it was let in, and had just left
            else:
                self._waiting.remove((num_bytes, turn))
                self._let_in()
            raise

    def _has_room(self, num_bytes: int) -> bool:
        if not self._sizes:
            return True
        fits = self._max_bytes is None or sum(self._sizes) + num_bytes <= self._max_bytes
        return fits and len(self._sizes) < self._maximum

    def _leave(self, num_bytes: int) -> None:
        self._sizes.remove(num_bytes)
        self._let_in()

    def _let_in(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][0]):
            num_bytes, turn = self._waiting.popleft()
            if not turn.done():
                self._sizes.append(num_bytes)
                turn.set_result(None)
