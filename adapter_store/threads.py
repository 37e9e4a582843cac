"""Threads that work beside a server's own: nicer to it than it is to them."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor


def nice_pool(max_workers: int, name: str, niceness: int = 0) -> ThreadPoolExecutor:
    """A pool whose threads have at least this niceness: 0 (like everybody) to 19 (only when nobody else runs)."""
    return ThreadPoolExecutor(
        max_workers=max_workers, thread_name_prefix=name, initializer=be_nice, initargs=(niceness,)
    )


def be_nice(niceness: int) -> None:
    """Gives the calling thread at least this niceness. Only Linux knows a niceness of threads; elsewhere nothing."""
    if sys.platform != "linux" or niceness <= 0:
        return
    thread = threading.get_native_id()
    # Never less than it has: that takes a privilege, and who started the process nicely meant it.
    if os.getpriority(os.PRIO_PROCESS, thread) < niceness:
        os.setpriority(os.PRIO_PROCESS, thread, niceness)
