"""Waits that end: each has a deadline of its own, and says what it waited for when that comes.

The seconds end a test that hangs. They measure nothing, so they are generous: a busy machine is slow.
"""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Never, TypeVar

DEADLINE_S = 60.0
POLL_S = 0.005

T = TypeVar("T")
What = str | Callable[[], str]  # what is waited for; asked when the time is over if it tells what was seen last


def patience(what: What, seconds: float = DEADLINE_S) -> Iterator[None]:
    """Turns of a loop that looks for something and breaks when it is there. Raises: TimeoutError."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        yield
    yield  # what came while this process had no turn was there in time
    raise _too_late(what, seconds)


def until(condition: Callable[[], T], what: What, seconds: float = DEADLINE_S, poll_s: float = POLL_S) -> T:
    """Waits until `condition()` is true, and returns what it was. Raises: TimeoutError."""
    for _ in patience(what, seconds):
        if found := condition():
            return found
        time.sleep(poll_s)
    raise AssertionError("patience ends with a TimeoutError")


async def until_async(
    condition: Callable[[], Any], what: What, seconds: float = DEADLINE_S, poll_s: float = POLL_S
) -> Any:
    """`until` for an event loop. `condition` may be a coroutine function; it counts against the time as well."""

    async def hold() -> Any:
        while True:
            found = condition()
            if inspect.isawaitable(found):
                found = await found
            if found:
                return found
            await asyncio.sleep(poll_s)

    return await within(hold(), what, seconds)


async def within(awaitable: Awaitable[T], what: What, seconds: float = DEADLINE_S) -> T:
    """What `awaitable` returns. A TimeoutError of its own is left as it is. Raises: TimeoutError."""
    try:
        async with asyncio.timeout(seconds) as limit:
            return await awaitable
    except TimeoutError as error:
        if limit.expired():
            raise _too_late(what, seconds) from error
        raise


def happened(event: threading.Event, what: What, seconds: float = DEADLINE_S) -> bool:
    """Waits until the event is set: true. Raises: TimeoutError."""
    if not event.wait(seconds):
        raise _too_late(what, seconds)
    return True


def ended(one: threading.Thread | subprocess.Popen[Any], what: What, seconds: float = DEADLINE_S) -> int:
    """Waits for the end of a thread, or of a process, whose exit code is returned. Raises: TimeoutError."""
    if isinstance(one, threading.Thread):
        one.join(seconds)
        if one.is_alive():
            raise _too_late(what, seconds)
        return 0
    try:
        return one.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise _too_late(what, seconds) from error


async def for_ever() -> Never:
    """What hangs on purpose, as a source that never answers does: whoever awaits it has the deadline."""
    await asyncio.Event().wait()
    raise AssertionError("nobody sets that event")


def _too_late(what: What, seconds: float) -> TimeoutError:
    return TimeoutError(f"waited {seconds:g} s for {what if isinstance(what, str) else what()}")
