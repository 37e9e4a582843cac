"""The routers that read a replica's answers, and what each of them has not been sent yet.

A router subscribes once and reads frames; it submits calls one by one. A call may arrive before its router reads: the
answer waits a while. When a router stops reading, or is not heard of for long, its calls are given up: nobody would
read them. Should it read again, it is told which those were.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from deployments import frames
from deployments.calls import UNREAD_CODE, Fault, StreamItem, Submission
from engine.aio.streams import Stream
from engine.request import OutputDelta

SUBSCRIBE_S = 15.0  # that an answer waits for its router to read
SILENT_S = 45.0  # a router says that it is there more often; Ray does not tell of every death
MAX_UNTOLD = 10_000  # numbers of calls given up that a router may still ask for
FORGOTTEN_S = 600.0  # by then
HEARTBEAT_S = 1.0  # a frame comes at least so often, to tell the load

Observer = Callable[["Run", list[OutputDelta]], None]


class Run:
    """One submitted call, from its receipt to its end. On one event loop."""

    __slots__ = ("ended", "item_version", "num_unfinished", "stream", "submission", "subscriber", "task")

    def __init__(self, submission: Submission, subscriber: Subscriber) -> None:
        self.submission = submission
        self.subscriber = subscriber
        self.num_unfinished = submission.call.params.n
        self.stream: Stream | None = None
        self.item_version: str | None = None  # of its adapter, once it is known
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Its stream has something to drain."""
        self.subscriber.touch(self)

    def fail(self, fault: Fault) -> None:
        """The last that its router hears of it."""
        self.subscriber.add_fault(self, fault)
        self.end()

    def end(self) -> None:
        """Nothing comes any more."""
        runs, number = self.subscriber.runs, self.submission.number
        if runs.get(number) is self:  # a second submission may have the number by now
            del runs[number]
        if not self.ended.done():
            self.ended.set_result(None)


class Subscriber:
    """One router, for one replica. Made when it subscribes, or when its first call comes."""

    def __init__(self, replica: str, router: str, now_s: float, observe: Observer) -> None:
        self._replica = replica
        self.router = router
        self.heard_s = now_s
        self.reading = 0  # the number that its router gave to the subscription; 0: it does not read yet
        self.runs: dict[int, Run] = {}
        self._observe = observe
        self._touched: dict[int, Run] = {}
        self._faults: dict[int, StreamItem] = {}
        self._ready = asyncio.Event()

    def touch(self, run: Run) -> None:
        self._touched[run.submission.number] = run
        self._ready.set()

    def add_fault(self, run: Run, fault: Fault) -> None:
        self.add_item(
            run.submission.number,
            StreamItem(replica=self._replica, adapter_version=run.item_version, fault=fault),
        )

    def add_item(self, number: int, item: StreamItem) -> None:
        self._faults[number] = item
        self._ready.set()

    async def frame(self, load: Callable[[], int], report: Callable[[], bytes] = bytes) -> bytes:
        """All that came since the last one, a report if it is due; waits for something to tell, but not for long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._ready.wait()
        self._ready.clear()
        return frames.write(load(), self._items(), report())

    def _items(self) -> list[tuple[int, StreamItem]]:
        touched, self._touched = self._touched, {}
        items = []
        for number, run in touched.items():
            item = self._item(run)
            if item is not None:
                items.append((number, item))
        faults, self._faults = self._faults, {}
        return [*items, *faults.items()]

    def _item(self, run: Run) -> StreamItem | None:
        if run.stream is None or run.ended.done():
            return None
        deltas, error = run.stream.drain()
        run.num_unfinished -= sum(delta.finish_reason is not None for delta in deltas)
        if deltas:
            self._observe(run, deltas)
        if error is not None and run.num_unfinished:
            run.ended.set_exception(error)  # its task says it as a fault
        elif not run.num_unfinished:
            run.end()
        if not deltas:
            return None
        return StreamItem(replica=self._replica, adapter_version=run.item_version, deltas=tuple(deltas))


class Subscribers:
    """All routers of one replica, on one event loop."""

    def __init__(self, replica: str, observe: Observer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._replica = replica
        self._observe = observe
        self._clock = clock
        self._here: dict[str, Subscriber] = {}
        self._untold: dict[str, tuple[float, list[int]]] = {}  # by router: calls given up since it last began to read

    def of(self, router: str) -> Subscriber:
        """The one that answers to `router` go to; it may not read yet."""
        found = self._here.get(router)
        if found is None:
            found = self._here[router] = Subscriber(self._replica, router, self._clock(), self._observe)
        return found

    def opened(self, router: str, reading: int = 1) -> Subscriber:
        """`router` begins to read. What it read before, it does not read any more. `reading`: its own number for it."""
        before = self._here.get(router)
        if before is not None and before.reading:
            self.closed(before)
        subscriber = self.of(router)
        subscriber.reading = reading
        subscriber.heard_s = self._clock()
        fault = Fault(code=UNREAD_CODE, message="the router that asked was not reading")
        _, untold = self._untold.pop(router, (0.0, []))
        for number in untold:
            subscriber.add_item(number, StreamItem(replica=self._replica, fault=fault))
        return subscriber

    def closed(self, subscriber: Subscriber) -> None:
        """Its router reads no more: its calls are given up. Nothing happens the second time."""
        if not self.is_here(subscriber):
            return
        del self._here[subscriber.router]
        _, untold = self._untold.pop(subscriber.router, (0.0, []))
        for run in list(subscriber.runs.values()):
            untold.append(run.submission.number)
            give_up(run)
        if untold:
            self._untold[subscriber.router] = (self._clock(), untold[-MAX_UNTOLD:])

    def is_here(self, subscriber: Subscriber) -> bool:
        """Whether it is still the one of its router."""
        return self._here.get(subscriber.router) is subscriber

    def heard(self, router: str, cancelled: tuple[int, ...]) -> None:
        """`router` is there, and wants no more of the calls with these numbers."""
        subscriber = self._here.get(router)
        if subscriber is None:
            return
        subscriber.heard_s = self._clock()
        for number in cancelled:
            if (run := subscriber.runs.get(number)) is not None:
                give_up(run)

    def sweep(self) -> None:
        """Gives up the calls of routers that do not read, or have not been heard of for long. To be called often."""
        now_s = self._clock()
        for subscriber in list(self._here.values()):
            if now_s - subscriber.heard_s > (SILENT_S if subscriber.reading else SUBSCRIBE_S):
                self.closed(subscriber)
        for router, (at_s, _) in list(self._untold.items()):
            if now_s - at_s > FORGOTTEN_S:
                del self._untold[router]


def give_up(run: Run) -> None:
    """Aborts what is left of it."""
    run.end()
    if run.task is not None:
        run.task.cancel()
