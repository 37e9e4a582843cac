"""How busy each replica is, as this process learnt last: from receipts and frames, and by what it sends itself.

One table for the process: Serve keeps its request router apart from the code that sends and reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Load:
    """Calls in hand, and when that was known."""

    num_calls: int
    at_s: float


class Loads:
    """May be used from several threads: each change is one assignment, and a lost one costs a worse choice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._loads: dict[str, Load] = {}

    def told(self, replica: str, num_calls: int) -> None:
        """`replica` says how many it has."""
        self._loads[replica] = Load(num_calls, self._clock())

    def sent(self, replica: str, reported: int) -> None:
        """One more goes there; `reported` is what else is known, if nothing was told yet."""
        before = self._loads.get(replica)
        self._loads[replica] = Load((before.num_calls if before else reported) + 1, self._clock())

    def get(self, replica: str) -> Load | None:
        return self._loads.get(replica)

    def lost(self, replica: str) -> None:
        self._loads.pop(replica, None)


LOADS = Loads()
