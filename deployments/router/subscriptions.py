"""What a router reads of its replicas: one subscription for each, and a mailbox for each call under way.

A call has its mailbox before it is submitted, as frames may overtake the receipt. When a subscription ends, all calls
that it carried are lost, each in the same way; the next call to that replica begins a new one.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from deployments import frames
from deployments.calls import Aim, StreamItem
from deployments.losses import Meaning
from deployments.router.attempt import ReplicaLost
from deployments.router.fleet import Fleet

logger = logging.getLogger("ray.serve")

FIRST_FRAME_S = 10.0  # from the call that subscribes to the first frame
SILENT_S = 20.0  # a replica sends a frame each second, however little it has to say
BEAT_S = 10.0  # less than a third of what a replica waits before it gives a router's calls up
SWEEP_S = 0.25
RETRY_S = 1.0  # that a replica which failed is left alone, if nothing is asked of it
CANCEL_S = 5.0


class Mailbox:
    """What came for one call and was not taken yet. A slow reader finds items waiting: no more than its own answer."""

    __slots__ = ("_error", "_items", "_ready", "broken", "number", "replica")

    def __init__(self, number: int) -> None:
        self.number = number
        self.replica = ""  # "": not known yet
        self.broken: set[str] = set()  # replicas whose frames broke off while it was not known
        self._items: deque[StreamItem] = deque()
        self._error: Exception | None = None
        self._ready = asyncio.Event()

    def put(self, item: StreamItem) -> bool:
        """False: it is of a replica that this call was not left to."""
        if self.replica and item.replica != self.replica:
            return False
        self._items.append(item)
        self._ready.set()
        return True

    def heard_from(self) -> set[str]:
        """Replicas whose items were not taken yet."""
        return {item.replica for item in self._items}

    def leave_to(self, replica: str) -> None:
        """What came of others is thrown away: none of it was taken."""
        self.replica = replica
        self._items = deque(item for item in self._items if item.replica == replica)

    def fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._ready.set()

    async def take(self) -> StreamItem:
        """The next item. Raises: what `fail` was given, behind the last item."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        return self._items.popleft()


class Subscriptions:
    """Of one router, on one event loop. `explain` turns an exception of Ray's into what a call ends with."""

    def __init__(
        self,
        handle: Any,
        *,
        explain: Callable[[Exception, str], Awaitable[Exception]],
        known_replicas: Callable[[], set[str]],
        fleet: Fleet | None = None,
    ) -> None:
        """`fleet` is told what replicas say of themselves."""
        self.router = uuid.uuid4().hex
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._explain = explain
        self._known_replicas = known_replicas
        self._fleet = Fleet() if fleet is None else fleet
        self._wanted: frozenset[str] = frozenset()
        self._ended_s: dict[str, float] = {}  # when the frames of a wanted replica broke off
        self._numbers = itertools.count(1)
        self._boxes: dict[int, Mailbox] = {}
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._reading: dict[str, int] = {}  # by replica: the number of the subscription that its reader reads
        self._cancelled: dict[str, list[int]] = {}  # by replica: not told yet
        self._tasks: set[asyncio.Task[Any]] = set()
        self._keeper: asyncio.Task[None] | None = None

    def box(self) -> Mailbox:
        """For a call that is about to be submitted; leave it at the end."""
        box = Mailbox(next(self._numbers))
        self._boxes[box.number] = box
        return box

    def bind(self, box: Mailbox, replica: str, reading: int = 0) -> None:
        """`replica` has the call, and answers into subscription `reading` (0: into the next).

        Whatever ends its frames from now on, or did since the call was submitted, ends the call. Serve submits a call
        again where it is not told that a replica took it: then two may have it, and the other is told to give it up.
        """
        for other in box.heard_from() - {replica}:
            self.cancel(other, box.number)
        box.leave_to(replica)
        is_stale = reading not in (0, self._reading.get(replica))  # the replica has not heard of its end
        if is_stale or replica in box.broken:  # with frames in which its answer may have been
            self.cancel(replica, box.number)
            box.fail(ReplicaLost(f"the frames of replica {replica} broke off", meaning=Meaning.AWAY))
        else:
            self._open(replica)

    def read_from(self, replicas: Iterable[str]) -> None:
        """Also while nothing is asked of them: what they say of themselves decides where calls go."""
        self._wanted = frozenset(replicas)
        self._ended_s = {replica: at_s for replica, at_s in self._ended_s.items() if replica in self._wanted}
        for replica in self._wanted - self._readers.keys() - self._ended_s.keys():
            self._open(replica)

    def _open(self, replica: str) -> None:
        if replica not in self._readers:
            self._readers[replica] = asyncio.ensure_future(self._read(replica))
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.ensure_future(self._keep())

    def leave(self, box: Mailbox, *, is_over: bool) -> None:
        """Nobody takes from `box` any more. Unless it `is_over`, the replica is told."""
        self._boxes.pop(box.number, None)
        if not is_over:
            for replica in {box.replica} - {""} or box.heard_from():
                self.cancel(replica, box.number)

    def cancel(self, replica: str, number: int) -> None:
        """Told with all others of this moment in one call."""
        waiting = self._cancelled.setdefault(replica, [])
        waiting.append(number)
        if len(waiting) == 1:
            self._start(self._tell(replica))

    async def close(self) -> None:
        """Ends all subscriptions: replicas give up what is left, and need not wait for it."""
        self._wanted = frozenset()
        tasks = [*self._readers.values(), *([self._keeper] if self._keeper else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for box in self._boxes.values():
            box.fail(ReplicaLost("this router ends", meaning=Meaning.KILLED))

    async def _read(self, replica: str) -> None:
        error: Exception = ReplicaLost(f"replica {replica} ended its frames", meaning=Meaning.AWAY)
        # A context of its own: Serve tells calls apart by an id that it keeps there.
        self._reading[replica] = reading = next(self._numbers)
        response: Any = contextvars.Context().run(self._streaming.subscribe.remote, Aim(replica), self.router, reading)
        frame_s = FIRST_FRAME_S
        try:
            while True:
                async with asyncio.timeout(frame_s):
                    frame = await anext(response)
                self._take(replica, frame)
                frame_s = SILENT_S
        except StopAsyncIteration:
            pass
        except TimeoutError:
            error = ReplicaLost(f"replica {replica} sent nothing for {frame_s:g} s", meaning=Meaning.AWAY)
        except frames.BadFrame as bad:
            error = ReplicaLost(f"replica {replica} sent {bad}", meaning=Meaning.AWAY)
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise  # else it is Serve's word for a call that was cancelled over there
        except Exception as raised:
            error = await self._explain(raised, f"the frames of replica {replica}")
        finally:
            response.cancel()
            if self._readers.get(replica) is asyncio.current_task():
                del self._readers[replica]
                self._reading.pop(replica, None)
            self._fleet.on_lost(replica)
            if replica in self._wanted:
                self._ended_s[replica] = asyncio.get_running_loop().time()
            self._broke_off(replica)
        for box in [box for box in self._boxes.values() if box.replica == replica]:
            box.fail(error)

    def _broke_off(self, replica: str) -> None:
        for box in self._boxes.values():
            box.broken.add(replica)

    def _take(self, replica: str, frame: bytes) -> None:
        load, items = frames.read(frame)
        self._fleet.on_load(replica, load)
        report = frames.report_of(frame)
        if report and not self._fleet.on_report(replica, report):
            self._start(self._beat(replica, (), is_report_missed=True))
        for number, item in items:
            box = self._boxes.get(number)
            if (
                (box is None or not box.put(item))
                and item.fault is None
                and any(delta.finish_reason is None for delta in item.deltas)
            ):
                self.cancel(replica, number)  # its caller left before the receipt came, or another replica has it

    async def _tell(self, replica: str) -> None:
        await asyncio.sleep(0)  # what ends in the same moment goes along
        await self._beat(replica, tuple(self._cancelled.pop(replica, ())))

    async def _beat(self, replica: str, numbers: tuple[int, ...], **more: bool) -> None:
        call = contextvars.Context().run(self._handle.cancel.remote, Aim(replica), self.router, numbers, **more)
        try:
            async with asyncio.timeout(CANCEL_S):
                await call
        except Exception as error:  # a replica that is gone has nothing to cancel; one that is back is asked again
            logger.info("replica %s could not be told: %s: %s", replica, type(error).__name__, error)
        finally:
            call.cancel()

    async def _keep(self) -> None:
        """Says that this router is there, and reads no more of replicas that Serve takes off, once they are done.

        Serve waits for a replica's last call before it stops it, and the subscription is one.
        """
        loop = asyncio.get_running_loop()
        beaten_s = loop.time()
        while self._readers or self._wanted:
            await asyncio.sleep(SWEEP_S)
            busy = {box.replica for box in self._boxes.values()}
            known = self._known_replicas()
            for replica in [replica for replica in self._readers if replica not in known and replica not in busy]:
                self._readers.pop(replica).cancel()
                self._reading.pop(replica, None)
                self._broke_off(replica)
            for replica in [name for name, at_s in self._ended_s.items() if loop.time() - at_s >= RETRY_S]:
                del self._ended_s[replica]
                if replica in self._wanted and replica in known:
                    self._open(replica)
            if loop.time() - beaten_s >= BEAT_S:
                beaten_s = loop.time()
                for replica in self._readers:
                    self._start(self._beat(replica, ()))

    def _start(self, work: Any) -> None:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
