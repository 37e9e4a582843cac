"""Which replica should serve a request: pure and deterministic.

score = adapter residency (VRAM > host > cold) + share of the prompt's prefix that is cached - load; ties are broken by
rendezvous hashing, so that every router, whatever it saw before, sends a cold adapter to the same replica.
Source: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998 (rendezvous hashing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from deployments.calls import REPORT_S

SILENT_S = 3 * REPORT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """What a router believes of one replica; up to a poll period old."""

    replica_id: str
    is_silent: bool = False  # it has not reported for long, while others do
    load: int = 0  # requests it has in hand
    capacity: int = 1  # sequences it can run at once
    resident: frozenset[str] = frozenset()  # adapter names in the memory of its device
    host: frozenset[str] = frozenset()  # adapter names in its host memory
    prefixes: frozenset[int] = frozenset()  # hints of prompts it served lately


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What each advantage is worth, in units of a full replica's load.

    With `vram` 0.5 a holder keeps its adapter until it is half a batch busier than another replica; then the adapter
    spreads. `load_steps` is how finely load counts for requests with an adapter or a prefix: differences
    below a step are noise and leave the choice to residency and the hash.
    """

    vram: float = 0.5
    host: float = 0.25
    prefix: float = 0.25
    load_steps: int = 8


class Heard:
    """When a router last heard of each replica: of its reports, and of its queue's length by calls of its own.

    What was heard last is believed. `now_s` is any clock of this router's process.
    """

    def __init__(self) -> None:
        self._reports: dict[str, tuple[object, float]] = {}  # the report's number, when it was first seen
        self._queues: dict[str, float] = {}

    def report(self, replica_id: str, number: object, now_s: float) -> None:
        """The report that is at hand; the same number again is no news."""
        if replica_id not in self._reports or self._reports[replica_id][0] != number:
            self._reports[replica_id] = (number, now_s)

    def queue(self, replica_id: str, now_s: float) -> None:
        """A call went there or came from there, so that its queue's length is known."""
        self._queues[replica_id] = now_s

    def keep(self, replica_ids: Collection[str]) -> None:
        """Forgets all others."""
        kept = set(replica_ids)
        self._reports = {name: report for name, report in self._reports.items() if name in kept}
        self._queues = {name: at_s for name, at_s in self._queues.items() if name in kept}

    def believes_queue(self, replica_id: str) -> bool:
        """Whether the queue's length is younger than the report."""
        _, reported_s = self._reports.get(replica_id, (None, float("-inf")))
        return self._queues.get(replica_id, float("-inf")) > reported_s

    def silent(self, now_s: float) -> frozenset[str]:
        """Replicas without a new report for `SILENT_S`, but not if that is true of all: it is the messenger's fault."""
        silent = {replica_id for replica_id, (_, at_s) in self._reports.items() if now_s - at_s > SILENT_S}
        return frozenset(silent) if len(silent) < len(self._reports) else frozenset()


def rank(
    replicas: Sequence[ReplicaView],
    adapter: str | None,
    prefix_hints: Sequence[int] = (),
    *,
    avoid: frozenset[str] = frozenset(),
    weights: Weights = Weights(),
) -> tuple[str, ...]:
    """Replica ids, best first: a total order that does not depend on the order of `replicas`.

    `avoid` holds replicas that just failed this request: they come last, but they do come. Before them the silent ones.
    """
    key = adapter if adapter is not None else str(prefix_hints[0]) if prefix_hints else ""

    def order(view: ReplicaView) -> tuple[bool, bool, float, int, bytes, str]:
        score = _residency(view, adapter, weights) + weights.prefix * _prefix_share(view, prefix_hints)
        score -= _load(view, weights.load_steps if key else 0)
        # A request that prefers no replica goes by exact load; one that does, by its key first.
        exact_load = 0 if key else view.load
        return (
            view.replica_id in avoid,
            view.is_silent,
            -score,
            exact_load,
            _rendezvous(key, view.replica_id),
            view.replica_id,
        )

    return tuple(view.replica_id for view in sorted(replicas, key=order))


def _residency(view: ReplicaView, adapter: str | None, weights: Weights) -> float:
    if adapter is None:
        return 0.0
    return weights.vram if adapter in view.resident else weights.host if adapter in view.host else 0.0


def _prefix_share(view: ReplicaView, prefix_hints: Sequence[int]) -> float:
    """Share of the hints, shortest prefix first, that the replica has seen without a gap."""
    matched = 0
    for hint in prefix_hints:
        if hint not in view.prefixes:
            break
        matched += 1
    return matched / len(prefix_hints) if prefix_hints else 0.0


def _load(view: ReplicaView, steps: int) -> float:
    """Load over capacity; with `steps`, rounded down to a multiple of 1/steps."""
    share = view.load / max(1, view.capacity)
    return int(share * steps) / steps if steps else share


def _rendezvous(key: str, replica_id: str) -> bytes:
    return hashlib.blake2b(f"{key}\0{replica_id}".encode(), digest_size=8).digest()
