"""Real replicas behind a handle that needs no Serve: a wire that loses, delays and doubles what it is told to.

Only Serve's handle and the engine's steps are stand-ins. Nothing is delivered by itself.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from deployments.calls import Aim, Batch
from deployments.replica.alone import Door
from deployments.replica.replica import Replica
from deployments.replica.reporter import Reporter
from deployments.replica.subscribers import Subscribers
from engine.aio.streams import Stream
from engine.request import FinishReason, OutputDelta, Request

NAMES = ("a", "b")


class Id(NamedTuple):
    unique_id: str


class StepEngine:
    """Every call gains one token a step, until it has as many as it asked for."""

    def __init__(self) -> None:
        self.streams: dict[int, tuple[Stream, int]] = {}
        self.num_opened = self.num_left = 0

    def check(self) -> None:
        pass

    async def open(self, request: Request, image: None, on_wake: Callable[[], None]) -> Stream:
        stream = Stream(request, request.request_id, asyncio.get_running_loop(), on_wake)
        self.streams[id(stream)] = (stream, 0)
        self.num_opened += 1
        return stream

    def leave(self, stream: Stream, *, abort: bool) -> None:
        self.streams.pop(id(stream), None)
        self.num_left += 1

    def step(self) -> None:
        for key, (stream, at) in list(self.streams.items()):
            last = stream.request.params.max_tokens or 0
            if at < last:
                reason = FinishReason.LENGTH if at + 1 == last else None
                stream.put(OutputDelta("q", 0, (at,), "x", finish_reason=reason))
                self.streams[key] = (stream, at + 1)
                stream.wake()


class PartReplica(Replica):
    """What a replica is to its routers, without a store and an engine that computes."""

    def __del__(self) -> None:  # type: ignore[override]
        """There is nothing to stop."""


def make_replica(name: str, clock: Callable[[], float] = time.monotonic) -> Replica:
    replica = PartReplica.__new__(PartReplica)
    replica._id = name
    replica._engine = StepEngine()  # type: ignore[assignment]
    replica._in_hand = 0
    replica._door = Door()
    replica._subscribers = Subscribers(name, replica._observe, clock=clock)
    replica._reporter = Reporter(capacity=64, names=lambda: ((), ()))
    return replica


class Answer:
    """Of the wire: what is put comes in turn."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False

    def put(self, what: Any) -> None:
        self._queue.put_nowait(what)

    async def __anext__(self) -> Any:
        what = await self._queue.get()
        if isinstance(what, BaseException):
            raise what
        return what

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class Subscription:
    def __init__(self, wire: Wire, replica: Replica, router: str, reading: int) -> None:
        self.answer = Answer()
        self.is_broken = False
        self.frames: deque[bytes] = deque()
        self._wire = wire
        self._generator: AsyncGenerator[bytes] = replica.subscribe(Aim(replica._id), router, reading)
        self.task = asyncio.ensure_future(self._pull())

    async def _pull(self) -> None:
        try:
            async for frame in self._generator:
                self.frames.append(frame)
            self.frames.append(b"")
        finally:
            await self._generator.aclose()

    def deliver(self) -> None:
        frame = self.frames.popleft()
        if not self.is_broken:
            self.answer.put(frame or StopAsyncIteration())

    def break_off(self) -> None:
        """The router hears at once, and the replica some time later."""
        self.is_broken = True
        self.answer.put(ConnectionError("the connection broke"))
        self._wire.later.append(self.task.cancel)


class Wire:
    """Serve's handle. What was said waits in `later` and in each subscription's `frames` until it is delivered."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 0.0
        self.replicas = {name: make_replica(name, lambda: self.now_s) for name in NAMES}
        self.known = set(NAMES)
        self.later: list[Callable[[], Any]] = []
        self.subscriptions: list[Subscription] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.submit = SimpleNamespace(remote=self._submitted)
        self.cancel = SimpleNamespace(remote=self._cancelled)
        self.subscribe = SimpleNamespace(remote=self._subscribed)
        self._router = SimpleNamespace(request_router=self)
        self.is_doubling = False

    @property
    def curr_replicas(self) -> dict[Id, None]:
        return {Id(name): None for name in self.known}

    def options(self, *, stream: bool) -> Wire:
        return self

    def _submitted(self, batch: Batch) -> Answer:
        answer = Answer()
        name = self.rng.choice(NAMES)
        names = [name]
        if self.is_doubling and self.rng.random() < 0.3:  # Serve tries again where an acknowledgement was lost
            names = list(NAMES) if self.rng.random() < 0.5 else [name, name]

        def run(name: str, is_last: bool) -> None:
            async def submitted() -> None:
                receipt = await self.replicas[name].submit(batch)
                if is_last:
                    self.later.append(lambda: answer.put(receipt))

            self.tasks.append(asyncio.ensure_future(submitted()))

        for at, each in enumerate(names):
            self.later.append(lambda each=each, at=at: run(each, at == len(names) - 1))  # type: ignore[misc]
        return answer

    def _cancelled(self, aim: Aim, router: str, numbers: tuple[int, ...], **more: bool) -> Answer:
        answer = Answer()

        def run() -> None:
            self.tasks.append(asyncio.ensure_future(self.replicas[aim.replica].cancel(aim, router, numbers, **more)))
            answer.put(None)

        self.later.append(run)
        return answer

    def _subscribed(self, aim: Aim, router: str, reading: int) -> Answer:
        subscription = Subscription(self, self.replicas[aim.replica], router, reading)
        self.subscriptions.append(subscription)
        return subscription.answer

    def deliverable(self) -> list[Callable[[], Any]]:
        waiting: list[Callable[[], Any]] = [s.deliver for s in self.subscriptions if s.frames]
        if self.later:
            waiting.append(lambda: self.later.pop(self.rng.randrange(len(self.later)))())
        return waiting

    def step(self) -> None:
        for replica in self.replicas.values():
            replica._engine.step()  # type: ignore[attr-defined]
