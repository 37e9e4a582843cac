"""Threads that the system's own tools show by name, as `top -H` and benchmarks do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

MAX_CHARS = 15  # that Linux keeps of a name


def named(name: str, run: Callable[[], None]) -> None:
    """Runs `run` in the calling thread, which is called `name` from now on where the system is Linux."""
    with suppress(OSError):
        Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(name[:MAX_CHARS])
    run()
