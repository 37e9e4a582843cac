"""Tiny models: one thread is faster."""

from tests.support.one_thread import one_thread as one_thread
