"""The running replicas of each deployment, from Serve's request router to whoever asks in the same process.

Serve may run its request router on another thread and loop than ours, and pickles its module by value; this module is
imported, so there is one of it. Any thread may call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable

Heard = Callable[[tuple[str, ...]], None]

_lock = threading.Lock()
_members: dict[str, tuple[str, ...]] = {}
_listeners: dict[str, dict[object, tuple[asyncio.AbstractEventLoop, Heard]]] = {}


def publish(deployment: str, replica_ids: Iterable[str]) -> None:
    """These are the running replicas of `deployment` now. Listeners hear of it if it is news."""
    ids = tuple(sorted(replica_ids))
    with _lock:
        if _members.get(deployment) == ids:
            return
        _members[deployment] = ids
        for loop, heard in list(_listeners.get(deployment, {}).values()):
            _tell(loop, heard, ids)


def listen(deployment: str, loop: asyncio.AbstractEventLoop, heard: Heard) -> Callable[[], None]:
    """`heard` is called on `loop`, with what is known now, if anything is, and with all news, in their order.

    Returns what ends it.
    """
    token = object()
    with _lock:
        _listeners.setdefault(deployment, {})[token] = (loop, heard)
        if deployment in _members:
            _tell(loop, heard, _members[deployment])

    def stop() -> None:
        with _lock:
            _listeners.get(deployment, {}).pop(token, None)

    return stop


def _tell(loop: asyncio.AbstractEventLoop, heard: Heard, ids: tuple[str, ...]) -> None:
    if not loop.is_closed():  # of a listener that forgot to stop
        loop.call_soon_threadsafe(heard, ids)
