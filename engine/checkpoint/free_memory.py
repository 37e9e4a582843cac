"""Freed memory that goes back to the system while a model is read and laid out."""

from __future__ import annotations

import ctypes

_EVERY_BYTES = 32 << 20


class FreeMemory:
    """Told of each tensor that was read, it now and then has the C library give back what was freed since.

    glibc keeps freed memory for later, and here there is none: small tensors that stay lie between the large ones that
    went. Without this, half of a 16-bit checkpoint stayed resident beside its 4-bit codes.
    """

    def __init__(self) -> None:
        # Other C libraries lack it; then nothing is given back.
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        self._num_bytes = 0

    def read(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes >= _EVERY_BYTES:
            self.give_back()

    def give_back(self) -> None:
        self._num_bytes = 0
        if self._trim is not None:
            self._trim(0)
