"""The way of one request's deltas from the output thread to the event loop of its consumer."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

from engine.output import merge
from engine.request import OutputDelta, Request


class Stream:
    """Deltas not yet taken. A slow consumer finds them merged: one per sample, holding all tokens since the last.

    `put`, `fail` come from the output thread; `take` runs on the consumer's event loop, which `wake` must be called on.
    What waits here is never more than the request's own output. A consumer of many streams gives `on_wake`, which is
    called in the place of what `take` waits for, and then asks `drain`.
    """

    __slots__ = ("_deltas", "_error", "_lock", "_on_wake", "_ready", "loop", "request", "shown_id")

    def __init__(
        self,
        request: Request,
        shown_id: str,
        loop: asyncio.AbstractEventLoop,
        on_wake: Callable[[], None] | None = None,
    ) -> None:
        self._on_wake = on_wake
        self.request = request
        self.shown_id = shown_id
        self.loop = loop
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._deltas: dict[int, list[OutputDelta]] = {}
        self._error: Exception | None = None

    def put(self, delta: OutputDelta) -> None:
        with self._lock:
            self._deltas.setdefault(delta.sample_index, []).append(delta)

    def fail(self, error: Exception) -> None:
        """After the deltas put so far, `take` raises `error`."""
        with self._lock:
            self._error = self._error or error

    def wake(self) -> None:
        if self._on_wake is not None:
            self._on_wake()
        else:
            self._ready.set()

    def drain(self) -> tuple[list[OutputDelta], Exception | None]:
        """All that was put and not taken yet, and what `fail` was given: behind it nothing comes."""
        with self._lock:
            taken, self._deltas = self._deltas, {}
            error = self._error
        return [merge(deltas)._replace(request_id=self.shown_id) for deltas in taken.values()], error

    async def take(self) -> list[OutputDelta]:
        """Wait until something was put; all of it. Raises: what `fail` was given."""
        await self._ready.wait()
        self._ready.clear()
        taken, error = self.drain()
        if error is not None:
            if not taken:
                raise error
            self._ready.set()
        return taken


def wake_all(streams: Iterable[Stream]) -> list[Stream]:
    """Wake each stream's consumer: one call per event loop. Returns the streams whose loop is closed."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Stream]] = {}
    for stream in streams:
        by_loop.setdefault(stream.loop, []).append(stream)
    lost: list[Stream] = []
    for loop, group in by_loop.items():
        try:
            loop.call_soon_threadsafe(_wake_group, group)
        except RuntimeError:
            if not loop.is_closed():
                raise
            lost.extend(group)
    return lost


def _wake_group(streams: list[Stream]) -> None:
    for stream in streams:
        stream.wake()
