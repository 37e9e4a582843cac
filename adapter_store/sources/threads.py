"""Threads that work beside a server's own: nicer to it than it is to them."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

MAX_LOOKUPS = 32  # of one source at a time


def nice_pool(max_workers: int, name: str, niceness: int = 0) -> ThreadPoolExecutor:
    """A pool whose threads have at least this niceness: 0 (like everybody) to 19 (only when nobody else runs)."""
    return ThreadPoolExecutor(
        max_workers=max_workers, thread_name_prefix=name, initializer=be_nice, initargs=(niceness,)
    )


class SourceThreads:
    """The threads of one source. Lookups never wait for reads, which may hang, or are slowed down to a rate.

    So a source has up to `max_reads + max_lookups` calls, and connections, at a time.
    """

    def __init__(self, max_reads: int, name: str, niceness: int, max_lookups: int = MAX_LOOKUPS) -> None:
        self._reads = nice_pool(max_reads, f"{name}-read", niceness)
        self._lookups = nice_pool(max_lookups, f"{name}-look", niceness)

    async def look(self, call: Callable[..., T], *values: Any) -> T:
        """What `call(*values)` returns; it is short."""
        return await asyncio.get_running_loop().run_in_executor(self._lookups, call, *values)

    async def read(self, call: Callable[..., T], *values: Any) -> T:
        """What `call(*values)` returns; it may take long."""
        return await asyncio.get_running_loop().run_in_executor(self._reads, call, *values)

    def close(self) -> None:
        """Takes no more calls. Those under way are not waited for, those that have not begun never do."""
        for pool in (self._lookups, self._reads):
            pool.shutdown(wait=False, cancel_futures=True)


def be_nice(niceness: int) -> None:
    """Gives the calling thread at least this niceness. Only Linux knows a niceness of threads; elsewhere nothing."""
    if sys.platform != "linux" or niceness <= 0:
        return
    thread = threading.get_native_id()
    # Never less than it has: that takes a privilege, and who started the process nicely meant it.
    if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
