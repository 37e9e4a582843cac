"""What this replica tells its routers of itself, each what is new to it: batched, bounded, numbered.

All calls are made on one loop.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from deployments.reports import HEARTBEAT_S, HOST, PERIOD_S, VRAM, Report, name_digest, pack

MAX_HINTS = 512  # prompts' beginnings that are remembered
MAX_NAMES_TOLD = 64  # a report of what changed; the rest comes with the next
MAX_HINTS_TOLD = 8

Names = Callable[[], tuple[Iterable[str], Iterable[str]]]
"""Names of adapters in the memory of the device, and in the host's."""


@dataclass(slots=True)
class _Told:
    """What a router has been told."""

    epoch: int = field(
        default_factory=lambda: secrets.randbits(64)
    )  # a report of before a renewal precedes none after it
    number: int = -1
    at_s: float = float("-inf")
    names: dict[int, int] = field(default_factory=dict)
    hints: set[int] = field(default_factory=set)


class Reporter:
    """Makes the reports of one replica. `now_s` is any clock that does not go back."""

    def __init__(self, *, capacity: int, names: Names, now_s: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._read_names = names
        self._now_s = now_s
        self._load = 0
        self._seen: OrderedDict[int, bool] = OrderedDict()  # hint -> it came more than once
        self._names: dict[int, int] = {}
        self._names_at_s = float("-inf")
        self._told: dict[str, _Told] = {}

    def load(self, in_hand: int) -> None:
        """How many requests are in hand now."""
        self._load = in_hand

    def remember(self, hints: Iterable[int]) -> None:
        """The beginnings of a prompt that is served here.

        One that came once is told to nobody: requests that begin so find this replica by their hash, as the first did.
        """
        for hint in hints:
            self._seen[hint] = hint in self._seen
            self._seen.move_to_end(hint)
        while len(self._seen) > MAX_HINTS:
            self._seen.popitem(last=False)

    def due(self, subscriber: str) -> bytes:
        """The report that `subscriber` should have now, full if it is the first; empty: nothing yet."""
        now_s = self._now_s()
        told = self._told.get(subscriber)
        if told is None:
            self._told[subscriber] = told = _Told()
        elif now_s - told.at_s < PERIOD_S:
            return b""
        is_full = told.number < 0
        names, lost_names = self._names_news(told, now_s, MAX_NAMES_TOLD if not is_full else None)
        hints, lost_hints = self._hints_news(told, MAX_HINTS_TOLD if not is_full else None)
        is_news = is_full or names or lost_names or hints or lost_hints
        if not is_news and now_s - told.at_s < HEARTBEAT_S:
            return b""
        told.number, told.at_s = told.number + 1, now_s
        return pack(
            Report(
                epoch=told.epoch,
                number=told.number,
                load=self._load,
                capacity=self._capacity,
                is_full=is_full,
                names=names,
                lost_names=lost_names,
                hints=hints,
                lost_hints=lost_hints,
            )
        )

    def forget(self, subscriber: str) -> None:
        """What it was told: it is gone, or missed a report, and the next to it is full and due at once."""
        self._told.pop(subscriber, None)

    def _names_news(
        self, told: _Told, now_s: float, limit: int | None
    ) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
        current = self._current_names(now_s)
        lost = tuple(islice((digest for digest in told.names if digest not in current), limit))
        news = tuple(islice((item for item in current.items() if told.names.get(item[0]) != item[1]), limit))
        for digest in lost:
            del told.names[digest]
        told.names.update(news)
        return news, lost

    def _current_names(self, now_s: float) -> dict[int, int]:
        """Read once a period for all subscribers."""
        if now_s - self._names_at_s >= PERIOD_S / 2:
            resident, host = self._read_names()
            self._names = {name_digest(name): HOST for name in host} | {name_digest(name): VRAM for name in resident}
            self._names_at_s = now_s
        return self._names

    def _hints_news(self, told: _Told, limit: int | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The newest first: what came lately comes again."""
        again = (hint for hint in reversed(self._seen) if self._seen[hint] and hint not in told.hints)
        news = tuple(islice(again, limit))
        lost = tuple(islice((hint for hint in told.hints if hint not in self._seen), limit))
        told.hints.difference_update(lost)
        told.hints.update(news)
        return news, lost
