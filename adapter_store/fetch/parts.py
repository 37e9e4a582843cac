"""The ranged reads of one adapter: so many at a time, each tried again by itself where it broke."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from adapter_store.errors import SourceUnavailable, StoreError
from adapter_store.fetch.pacing import Pacer, SourceGate
from adapter_store.names.asking import unreadable
from adapter_store.records import StoreConfig
from adapter_store.sources.base import RangeRead, ReadCancelled, Source, SourceChanged, SourceFile

MAX_PAUSE_S = 5.0
# How sources tell in their reasons that a server is overloaded: its status or its code.
_OVERLOADED = re.compile(r"\b(?:503|429|SlowDown|ServiceUnavailable|TooManyRequests|RequestLimitExceeded|Throttl\w+)\b")


def split(start: int, end: int, part_bytes: int) -> tuple[tuple[int, int], ...]:
    """The bytes `start` .. `end - 1` as (begin, behind the end) of ranges that end at multiples of `part_bytes`."""
    bounds = [start, *range((start // part_bytes + 1) * part_bytes, end, part_bytes), end]
    return tuple(itertools.pairwise(bounds)) if start < end else ()


def is_overload(error: SourceUnavailable) -> bool:
    """Whether the source asks for fewer requests, rather than being out of order."""
    return _OVERLOADED.search(error.reason) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What reads share and depend on."""

    config: StoreConfig
    pacer: Pacer
    clock: Callable[[], float]
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    jitter: Callable[[], float] = random.random

    def pause_s(self, num_failures: int) -> float:
        """Before the next try. Exponential with full jitter, so that many stores do not come back at once."""
        longest = min(MAX_PAUSE_S, self.config.retry_base_s * 2.0 ** min(num_failures, 60))
        return float(longest * self.jitter())


class PartReader:
    """Reads ranges of the files of adapter `name`, at most `max_parallel_parts` at a time.

    A read that breaks goes on behind its last byte. Only a try that gained no byte counts against `fetch_retries`, and
    one that gained some forgives those before: a slow or shaky source may take all the time until `deadline`, a dead
    one is told early.
    """

    def __init__(
        self, source: Source, name: str, surroundings: Surroundings, gate: SourceGate, deadline: float
    ) -> None:
        self.told: dict[str, str] = {}  # file name -> the sha256 that came with the latest answer
        self._source = source
        self.name = name
        self._around = surroundings
        self._gate = gate
        self._deadline = deadline
        self._slots = asyncio.Semaphore(surroundings.config.max_parallel_parts)
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Nobody waits any more: nor do source threads for their turn. Each ends with its next chunk."""
        self._stopped.set()

    def unavailable(self, reason: str) -> SourceUnavailable:
        """The error that tells of this adapter and its source."""
        return SourceUnavailable(self._source.name, f"adapter {self.name!r}: {reason}")

    async def read(
        self, file: SourceFile, start: int, target: memoryview, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        """Fills `target` with the bytes of `file` from `start` on.

        `on_bytes` is told, in the loop, how many there are.
        Raises: SourceUnavailable that says where it broke; SourceChanged.
        """
        part = RangeRead(start, target, self._pace(on_bytes))
        part_fails = 0
        try:
            while True:
                before = part.num_received
                try:
                    await self._try(file, part)
                    return
                except SourceUnavailable as error:
                    part_fails = part_fails + 1 if part.num_received == before else 0
                    pause_s = self._around.pause_s(max(0, part_fails - 1))
                    if part_fails > self._around.config.fetch_retries:
                        raise self._broken(file, part, error, f"{part_fails} tries in a row gained nothing") from error
                    if self._around.clock() + pause_s >= self._deadline:
                        left = f"no time is left of fetch_timeout_s={self._around.config.fetch_timeout_s:g}"
                        raise self._broken(file, part, error, left) from error
                await self._around.sleep(pause_s)
        finally:
            part.cancel()  # where this was cancelled, the source's thread goes on; it is not waited for

    async def _try(self, file: SourceFile, part: RangeRead) -> None:
        async with self._slots, self._gate:
            try:
                await self._read(file, part)
                if part.num_missing:
                    raise SourceUnavailable(self._source.name, f"the answer ended {part.num_missing} bytes early")
            except SourceUnavailable as error:
                if is_overload(error):
                    self._gate.aimd.slow_down(self._around.clock())
                raise
        self._gate.aimd.succeeded()
        if part.sha256 is not None:
            self.told[file.name] = part.sha256

    async def _read(self, file: SourceFile, part: RangeRead) -> None:
        try:
            await self._source.read(self.name, file, part)
        except (StoreError, SourceChanged, ReadCancelled):
            raise
        except Exception as error:
            raise SourceUnavailable(self._source.name, unreadable(error)) from error

    def _pace(self, on_bytes: Callable[[int], None] | None) -> Callable[[int], None]:
        loop = asyncio.get_running_loop()
        received = 0

        def pace(num_bytes: int) -> None:
            nonlocal received
            received += num_bytes
            if on_bytes is not None and not self._stopped.is_set():
                loop.call_soon_threadsafe(on_bytes, received)
            self._around.pacer.wait(num_bytes, self._stopped)

        return pace

    def _broken(self, file: SourceFile, part: RangeRead, error: SourceUnavailable, why: str) -> SourceUnavailable:
        place = f"{file.name}, byte {part.start + part.num_received} of {file.num_bytes}"
        return self.unavailable(f"{place}: {error.reason} ({why})")
