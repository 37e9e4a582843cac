"""What a router knows of each replica, and who holds what: indices that a report changes by what it says is new."""

from __future__ import annotations

from dataclasses import dataclass, field

from deployments.reports import Report


@dataclass(slots=True, eq=False)
class Known:
    """One replica. Loads count requests, `capacity` sequences that run at once."""

    replica_id: str
    salt: int
    heard_s: float
    slot: int = -1  # place among the members; -1: none
    is_lost: bool = False  # its connection broke, and nothing came since
    reported: int = 0
    unreported: int = 0  # sent by this router, less what ended, since a load was told
    own: int = 0  # of this router, in flight
    capacity: int = 1
    share: float = 0.0  # of the capacity, when `load` changed last
    epoch: int = -1
    number: int = -1
    names: dict[int, int] = field(default_factory=dict)  # digest -> tier
    hints: set[int] = field(default_factory=set)

    @property
    def load(self) -> int:
        """What it has in hand. What this router itself has there is certain, and at least that."""
        return max(self.reported + self.unreported, self.own)


class Holders:
    """Replicas that hold one thing: any of them can be drawn, put in and taken out at once."""

    __slots__ = ("_places", "members")

    def __init__(self) -> None:
        self.members: list[Known] = []
        self._places: dict[str, int] = {}

    def add(self, known: Known) -> None:
        if known.replica_id not in self._places:
            self._places[known.replica_id] = len(self.members)
            self.members.append(known)

    def remove(self, known: Known) -> None:
        place = self._places.pop(known.replica_id, None)
        if place is None:
            return
        last = self.members.pop()
        if last is not known:
            self.members[place] = last
            self._places[last.replica_id] = place


class Index:
    """Digest -> who holds it, for names and for hints."""

    def __init__(self) -> None:
        self.names: dict[int, Holders] = {}
        self.hints: dict[int, Holders] = {}

    def take(self, known: Known, report: Report) -> None:
        """What `report` says of `known`, which has its place in the index."""
        if report.is_full:
            self.forget(known)
        for digest in report.lost_names:
            if known.names.pop(digest, None) is not None:
                _remove(self.names, digest, known)
        for digest in report.lost_hints:
            if digest in known.hints:
                known.hints.discard(digest)
                _remove(self.hints, digest, known)
        known.names.update(report.names)
        known.hints.update(report.hints)
        for digest, _ in report.names:
            self.names.setdefault(digest, Holders()).add(known)
        for digest in report.hints:
            self.hints.setdefault(digest, Holders()).add(known)

    def forget(self, known: Known) -> None:
        """`known` holds nothing."""
        for digest in known.names:
            _remove(self.names, digest, known)
        for digest in known.hints:
            _remove(self.hints, digest, known)
        known.names.clear()
        known.hints.clear()


def _remove(index: dict[int, Holders], digest: int, known: Known) -> None:
    holders = index.get(digest)
    if holders is not None:
        holders.remove(known)
        if not holders.members:
            del index[digest]
