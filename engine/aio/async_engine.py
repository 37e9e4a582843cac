"""The engine for concurrent callers: any event loop asks, one thread steps, one thread writes text.

    event loops ──commands──> engine thread ──updates──> output thread ──one wake-up per step and loop──> event loops
                  (deque)     step()                     detokenise, stop strings

Nothing slow is on the step: tokens become text on the output thread, and images that are borrowed are read in
before they are handed over. A watchdog thread finds a step that does not come back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from itertools import count
from queue import SimpleQueue
from typing import TYPE_CHECKING
from weakref import WeakSet

from engine.aio.commands import Abort, Add, Command, Finish, Pin, Preload, Turn, Unpin
from engine.aio.owners import AdapterNews, ImageOwner
from engine.aio.streams import Stream, wake_all
from engine.aio.threads import named
from engine.engine import Engine
from engine.errors import EngineDead, QueueFull
from engine.output import OutputProcessor
from engine.request import OutputDelta, Request
from engine.stats import EngineStats

if TYPE_CHECKING:
    from engine.lora.image import AdapterImage

logger = logging.getLogger(__name__)

STATS_INTERVAL_S = 0.1
DRAIN_POLL_S = 0.05
JOIN_TIMEOUT_S = 30.0
ANSWER_POLL_S = 0.1


class AsyncEngine:
    """Streams requests through one `Engine`, which it owns from `start()` on.

    A death (an error of the device, a step longer than `step_timeout_s`, a bug) is final: every waiter gets EngineDead,
    `is_alive` is False, and `on_death(reason)` is called once so that the process can be replaced.
    `image_owner` is told what becomes of the images that are handed over. All callbacks must be quick.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        image_owner: ImageOwner | None = None,
        on_death: Callable[[str], None] | None = None,
    ) -> None:
        self._engine = engine
        self._image_owner = image_owner
        self._on_death = on_death
        self._processor = OutputProcessor(engine.tokenizer)
        self._condition = threading.Condition()  # guards the next five
        self._commands: deque[Command] = deque()
        self._streams: dict[str, Stream] = {}
        self._draining = False
        self._closing = False
        self._dead_reason: str | None = None
        self._turns: SimpleQueue[Turn | None] = SimpleQueue()
        self._prepared: WeakSet[AdapterImage] = WeakSet()  # images that were read in, to be borrowed; for event loops
        self._request_numbers = count()
        self._threads: list[threading.Thread] = []
        self._step_began_s: float | None = None  # written by the engine thread, read by the watchdog
        self._stopped = threading.Event()
        self._stats = engine.stats()
        self._stats_taken_s = 0.0

    # ---- for callers, on any event loop or thread

    def start(self) -> None:
        """Create the threads. `generate` does it when nobody has. Raises: EngineDead after a death or `close()`."""
        with self._condition:
            self._raise_if_gone()
            if self._threads:
                return
            for name, target in (
                ("chorus-engine", self._run_engine),
                ("chorus-output", self._run_output),
                ("chorus-watchdog", self._run_watchdog),
            ):
                self._threads.append(threading.Thread(target=named, args=(name, target), name=name, daemon=True))
            for thread in self._threads:
                thread.start()

    async def generate(self, request: Request, image: AdapterImage | None = None) -> AsyncIterator[OutputDelta]:
        """Stream the deltas of all samples of `request`; closing the generator aborts what is unfinished.

        `image` must be given when `request.adapter` is set and the engine may not hold that version.

        Raises: RequestError, AdapterError when the request is refused; EngineDead.
        """
        stream = await self.open(request, image)
        num_unfinished = request.params.n
        try:
            while num_unfinished:
                for delta in await stream.take():
                    num_unfinished -= delta.finish_reason is not None
                    yield delta
        finally:
            self.leave(stream, abort=num_unfinished > 0)

    async def open(
        self, request: Request, image: AdapterImage | None = None, on_wake: Callable[[], None] | None = None
    ) -> Stream:
        """As `generate`, for who reads many streams: `on_wake` is called on this loop when there is something to drain.

        Whoever opens a stream leaves it.
        """
        self.start()
        if image is not None:
            await self._prepare(image)
        if (spec := request.params.grammar) is not None:
            await asyncio.to_thread(self._engine.grammars.compiled, spec)
        return self._submit(request, image, on_wake)

    def leave(self, stream: Stream, *, abort: bool) -> None:
        """The end of a stream that was opened; with `abort` of its unfinished samples too. From any thread."""
        with self._condition:
            self._streams.pop(stream.request.request_id, None)
            if abort:
                self._commands.append(Abort(stream.request.request_id))
                self._condition.notify_all()

    async def preload(self, image: AdapterImage) -> None:
        """Load an adapter without a request, and do not wait for that.

        Whether it was taken in, or not for want of room or by a refusal, is told to the `image_owner`.
        Where images are borrowed, this one is read in first, in about 0.1 ms per MiB. Raises: EngineDead.
        """
        self.start()
        await self._prepare(image)
        self._ask(Preload(image), image)

    def pin_adapter(self, key: str) -> None:
        """Keep a resident adapter until `unpin_adapter`. Waits for the step under way: call it off an event loop.

        Raises: AdapterError if the engine does not hold it, or if too little would be left for others; EngineDead.
        """
        self.start()
        answer: Future[None] = Future()
        self._ask(Pin(key, answer))
        while True:
            try:
                return answer.result(ANSWER_POLL_S)
            except TimeoutError:
                self.check()

    def unpin_adapter(self, key: str) -> None:
        """Returns at once. Nothing happens if it is not pinned."""
        self._command([Unpin(key)])

    async def drain(self) -> None:
        """Refuse new requests (QueueFull) and wait until every accepted one has ended."""
        with self._condition:
            self._draining = True
        while self._streams:
            await asyncio.sleep(DRAIN_POLL_S)

    def close(self) -> None:
        """Stop after the current step and join the threads. Requests still running get EngineDead."""
        with self._condition:
            self._closing = True
            self._condition.notify_all()
        self._stopped.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(JOIN_TIMEOUT_S)
        if self._dead_reason is None and not any(thread.is_alive() for thread in self._threads):
            self._engine.close()  # a device that hangs, or a step still under way, would not let it end
        self._fail_all("the engine was closed")

    def stats(self) -> EngineStats:
        """As of at most about STATS_INTERVAL_S ago, exact when idle. Never waits for the step."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        return self._dead_reason is None and not self._closing

    @property
    def dead_reason(self) -> str | None:
        return self._dead_reason

    def check(self) -> None:
        """For health checks. Raises: EngineDead with the reason."""
        with self._condition:
            self._raise_if_gone()

    def _raise_if_gone(self) -> None:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)
        if self._closing:
            raise EngineDead("the engine was closed")

    def _submit(
        self, request: Request, image: AdapterImage | None, on_wake: Callable[[], None] | None = None
    ) -> Stream:
        # An id of our own: the caller may ask again under the same id while the engine still aborts the first.
        own = request.renamed(f"{request.request_id}#{next(self._request_numbers)}")
        stream = Stream(own, request.request_id, asyncio.get_running_loop(), on_wake)
        with self._condition:
            self._raise_if_gone()
            if self._draining:
                raise QueueFull("the engine is draining and takes no new requests; send it to another replica")
            self._streams[own.request_id] = stream
            self._send(Add(own, image), image)
        return stream

    async def _prepare(self, image: AdapterImage) -> None:
        """Images that are copied to pages are read by the thread that copies."""
        if image not in self._prepared and not self._engine.config.has_adapter_pages():
            await asyncio.to_thread(self._engine.prepare_adapter, image)
            self._prepared.add(image)

    # ---- the engine thread

    def _run_engine(self) -> None:
        try:
            while (commands := self._wait_for_work()) is not None:
                self._turn(commands)
        except BaseException as error:
            self._die(str(error) if isinstance(error, EngineDead) else f"{type(error).__name__}: {error}", error)
        finally:
            self._turns.put(None)

    def _wait_for_work(self) -> list[Command] | None:
        """Commands to apply before the next step (maybe none); None: stop."""
        with self._condition:
            while not (self._commands or self._engine.has_work or self._closing or self._dead_reason):
                self._condition.wait()
            if self._closing or self._dead_reason:
                return None
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _turn(self, commands: list[Command]) -> None:
        turn = Turn()
        self._step_began_s = time.monotonic()
        for command in commands:
            command.apply(self._engine, turn)
        turn.updates = self._engine.step()
        turn.adapter_changes = self._engine.adapter_changes()
        self._engine.take_ended()  # their metrics are in the totals of the stats
        self._step_began_s = None
        now_s = time.monotonic()
        if now_s - self._stats_taken_s >= STATS_INTERVAL_S or not self._engine.has_work:
            self._stats, self._stats_taken_s = self._engine.stats(), now_s
        if turn:
            self._turns.put(turn)

    # ---- the output thread

    def _run_output(self) -> None:
        try:
            while (turn := self._turns.get()) is not None:
                self._deliver(turn)
        except BaseException as error:
            self._die(f"the output thread failed: {type(error).__name__}: {error}", error)
        finally:
            try:
                self._tell(AdapterNews(is_over=True))
            except Exception:
                logger.exception("whoever keeps the adapter images could not be told that the engine has ended")

    def _deliver(self, turn: Turn) -> None:
        touched: dict[str, Stream] = {}
        for request_id, error in turn.refused:
            if (stream := self._streams.get(request_id)) is not None:
                stream.fail(error)
                touched[request_id] = stream
        deltas = [self._processor.open(request) for request in turn.opened]
        deltas += [self._processor.process(update) for update in turn.updates]
        for delta in deltas:
            if delta is not None and (stream := self._streams.get(delta.request_id)) is not None:
                stream.put(delta)
                touched[delta.request_id] = stream
        self._command(Finish(*key) for key in self._processor.take_finishes())
        for stream in wake_all(touched.values()):
            self.leave(stream, abort=True)
        if turn.answered or turn.adapter_changes:
            self._tell(AdapterNews(changes=turn.adapter_changes, answered=tuple(turn.answered)))

    def _tell(self, news: AdapterNews) -> None:
        if self._image_owner is not None:
            self._image_owner.told(news)

    def _ask(self, command: Command, image: AdapterImage | None = None) -> None:
        """Raises: EngineDead, as nobody would answer."""
        with self._condition:
            self._raise_if_gone()
            self._send(command, image)

    def _send(self, command: Command, image: AdapterImage | None) -> None:
        """With the lock held, and when the engine was not gone under it: the offer is answered, or all is over."""
        if image is not None and self._image_owner is not None:
            self._image_owner.offered(image.key)
        self._commands.append(command)
        self._condition.notify_all()

    def _command(self, commands: Iterable[Command]) -> None:
        with self._condition:
            self._commands.extend(commands)
            self._condition.notify_all()

    # ---- endings

    def _run_watchdog(self) -> None:
        limit_s = self._engine.config.step_timeout_s
        while not self._stopped.wait(min(1.0, limit_s / 4)):
            began_s = self._step_began_s
            if began_s is not None and time.monotonic() - began_s > limit_s:
                self._die(f"a step took longer than step_timeout_s={limit_s}; the device hangs or the limit is too low")

    def _die(self, reason: str, cause: BaseException | None = None) -> None:
        with self._condition:
            if self._dead_reason is not None:
                return
            self._dead_reason = reason
            self._condition.notify_all()
        self._stopped.set()
        self._turns.put(None)  # the engine thread may never come back from its step to say so
        logger.error("the engine died: %s", reason, exc_info=cause)
        self._fail_all(reason)
        if self._on_death is not None:
            self._on_death(reason)

    def _fail_all(self, reason: str) -> None:
        with self._condition:
            streams = list(self._streams.values())
        for stream in streams:
            stream.fail(EngineDead(reason))
        for stream in wake_all(streams):
            self.leave(stream, abort=False)
