"""A test that hangs fails alone, with its stack: it gets an error before `faulthandler_timeout` ends the whole run.

A last resort: a wait has a deadline of its own, which says what it waited for (waiting.py).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import pytest

SHARE = 0.8  # of `faulthandler_timeout`, for setup and call together; the rest is for the teardown
AGAIN_S = 5.0  # what swallows the error, or hangs while it cleans up, is raised to again
_deadline_s = pytest.StashKey[float]()


@contextmanager
def _raised_to(item: pytest.Item, is_teardown: bool) -> Iterator[None]:
    limit_s = float(item.config.getini("faulthandler_timeout") or 0)
    if not limit_s or threading.current_thread() is not threading.main_thread():
        yield  # a debugger's run has no limit, and only the main thread can be raised to
        return
    own_s = SHARE * limit_s
    at_s = item.stash.setdefault(_deadline_s, time.monotonic() + own_s)
    if is_teardown:
        own_s = (1 - SHARE) / 2 * limit_s
        at_s = time.monotonic() + own_s

    def too_late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} was still running after {own_s:g} s")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.setitimer(signal.ITIMER_REAL, max(at_s - time.monotonic(), 0.001), AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _raised_to(item, is_teardown=False):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _raised_to(item, is_teardown=False):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    with _raised_to(item, is_teardown=True):
        return (yield)
