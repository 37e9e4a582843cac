"""Worth: which resident adapter is the cheapest to lose. Integers only.

Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy" (HPL-98-69):

    worth = age + uses * cost of a load / bytes

`age` is the largest worth that was ever evicted, so that what is not used any more falls behind what is.
"""

from __future__ import annotations

LOAD_OVERHEAD_BYTES = 16 << 20
"""What a load costs besides its bytes, in bytes: its request waits for a step or two whatever its size."""
_UNIT = 1024  # of worth: a use of an adapter so large that only its bytes count


class WorthClock:
    """The age of one set of adapters."""

    def __init__(self) -> None:
        self.age = 0

    def worth(self, uses: int, num_bytes: int) -> int:
        """Of an adapter that was just used, for the `uses`th time since it was loaded."""
        size = max(1, num_bytes)
        return self.age + uses * _UNIT * (LOAD_OVERHEAD_BYTES + size) // size

    def note_eviction(self, worth: int) -> None:
        self.age = max(self.age, worth)
