"""FairQueue: who is next, by virtual token counters.

Source: Sheng et al., "Fairness in Serving Large Language Models" (VTC), arXiv 2401.00588, algorithm 2.

Each tenant has a counter of the service it has had; the tenant with the smallest is served next, first come first
served within it. Service is counted in units of 1/1024 token:
  - a prompt token that is computed costs 1024, an output token twice that (both as in the paper); tokens from the
    prefix cache are free, and so is recomputation after preemption, which is the scheduler's choice;
  - each token of an adapter costs num_bytes / 512 Ki units more: a step reads the adapter's bytes, which grow with its
    rank. At 512 MiB a token counts double;
  - a load costs the tenant it is made for one prompt token per MiB (about what it displaces: 84 MB take 1.5 ms over
    PCIe 5, in which an H200 computes some 84 prompt tokens of an 8 B model).
A tenant that comes back to the queue is lifted to the smallest counter in it (if it is empty: to that of the tenant
that left it last), so that idle time earns no credit. Bound (theorem 4.4 there): of two tenants with requests waiting,
neither gets more than 2 * max(cost of the longest prompt, cost of the outputs of a full batch) ahead of the other.
"""

from __future__ import annotations

import heapq
import itertools
from bisect import bisect_left, bisect_right, insort
from operator import attrgetter

from engine.core.sequence import Sequence

TOKEN_UNITS = 1024
OUTPUT_WEIGHT = 2
ADAPTER_BYTES_PER_UNIT = 512 * 1024
LOAD_BYTES_PER_UNIT = 1024
_MIN_TENANTS_TO_SWEEP = 64

_place = attrgetter("place")  # in its tenant's queue
_Turn = tuple[int, int, str]  # the tenant's counter, its first sequence, its name


def token_cost(adapter_bytes: int) -> int:
    """Units of one prompt token."""
    return TOKEN_UNITS + adapter_bytes // ADAPTER_BYTES_PER_UNIT


def load_cost(adapter_bytes: int) -> int:
    """Units of one adapter load."""
    return -(-adapter_bytes // LOAD_BYTES_PER_UNIT)


class FairQueue:
    """Sequences that wait, by tenant, and what each tenant has had.

    Invariants:
      - a tenant's sequences are in order of arrival; a tenant without any is in `_counters` at most
      - a counter never falls; those of tenants in the queue are never below the floor, which never falls either
      - `_order` has each tenant with a queue once, as `_turn` tells it: what changes a turn moves it there, so that
        nobody has to look at all tenants to find the next ones
      - a counter is forgotten only when it is at or below the floor, to which a return would lift it anyway
    """

    def __init__(self) -> None:
        self._queues: dict[str, list[Sequence]] = {}
        self._counters: dict[str, int] = {}
        self._order: list[_Turn] = []
        self._floor = 0
        self._last_to_leave: str | None = None
        self._num_waiting = 0
        self._sweep_at = _MIN_TENANTS_TO_SWEEP

    def __len__(self) -> int:
        return self._num_waiting

    def __contains__(self, seq: Sequence) -> bool:
        queue = self._queues.get(seq.tenant, [])
        index = bisect_left(queue, seq.place, key=_place)
        return index < len(queue) and queue[index] is seq

    def sequences(self) -> list[Sequence]:
        return [seq for queue in self._queues.values() for seq in queue]

    def counter(self, tenant: str) -> int:
        """Units of service; a tenant that is not known has had none above the floor."""
        return self._counters.get(tenant, self._floor)

    def push(self, seq: Sequence) -> None:
        """A sequence arrives, or comes back after preemption (its place is by priority and arrival all the same)."""
        queue = self._queues.get(seq.tenant)
        if queue is None:
            self._raise_floor()
            queue = self._queues[seq.tenant] = []
            self._counters[seq.tenant] = max(self.counter(seq.tenant), self._floor)
        else:
            self._leave_order(seq.tenant)
        insort(queue, seq, key=_place)
        insort(self._order, self._turn(seq.tenant))
        self._num_waiting += 1

    def remove(self, seq: Sequence) -> None:
        queue = self._queues[seq.tenant]
        index = bisect_left(queue, seq.place, key=_place)
        assert queue[index] is seq, f"{seq} is not in the queue"
        self._leave_order(seq.tenant)
        del queue[index]
        self._num_waiting -= 1
        if queue:
            insort(self._order, self._turn(seq.tenant))
        else:
            del self._queues[seq.tenant]
            self._last_to_leave = seq.tenant
            self._raise_floor()
            self._sweep()

    def charge(self, tenant: str, units: int) -> None:
        waits = tenant in self._queues
        if waits:
            self._leave_order(tenant)
        self._counters[tenant] = self.counter(tenant) + units
        if waits:
            insort(self._order, self._turn(tenant))

    def turns(self) -> Turns:
        return Turns(self._queues, self._counters, self._order)

    def _turn(self, tenant: str) -> _Turn:
        return self._counters[tenant], self._queues[tenant][0].seq_id, tenant

    def _leave_order(self, tenant: str) -> None:
        del self._order[bisect_left(self._order, self._turn(tenant))]

    def _raise_floor(self) -> None:
        if self._order:
            self._floor = max(self._floor, self._order[0][0])
        elif self._last_to_leave is not None:
            self._floor = max(self._floor, self.counter(self._last_to_leave))

    def _sweep(self) -> None:
        """Keeps the number of counters within twice the tenants that need one."""
        if len(self._counters) < self._sweep_at:
            return
        self._counters = {
            tenant: units for tenant, units in self._counters.items() if units > self._floor or tenant in self._queues
        }
        self._sweep_at = max(_MIN_TENANTS_TO_SWEEP, 2 * len(self._counters))

    def check_invariants(self) -> None:
        assert self._num_waiting == sum(len(queue) for queue in self._queues.values())
        assert self._order == sorted(map(self._turn, self._queues))
        for tenant, queue in self._queues.items():
            assert queue
            assert all(a.place < b.place for a, b in itertools.pairwise(queue))
            assert all(seq.tenant == tenant for seq in queue)
            assert self._counters[tenant] >= self._floor, f"{tenant}: {self._counters[tenant]} < {self._floor}"


class Turns:
    """One pass over the waiting sequences in the order in which they are entitled to run.

    Equal counters: who arrived first. Valid while nothing but `took_current` removes sequences, and nobody but the
    tenant of `current` is charged. It costs what is taken and skipped, not what waits: tenants that had a turn are in
    a heap of the pass's own, the others are read from `order` one by one.
    """

    def __init__(self, queues: dict[str, list[Sequence]], counters: dict[str, int], order: list[_Turn]) -> None:
        self._queues = queues
        self._counters = counters
        self._order = order
        self._seen: set[str] = set()
        self._heap: list[tuple[int, int, str, int]] = []  # of tenants that were seen; with the index in their queue
        self._fresh: _Turn | None = order[0] if order else None  # the first tenant that was not

    @property
    def current(self) -> Sequence | None:
        if self._is_fresh():
            assert self._fresh is not None
            return self._queues[self._fresh[2]][0]
        if not self._heap:
            return None
        _, _, tenant, index = self._heap[0]
        return self._queues[tenant][index]

    def skip_current(self) -> None:
        """It cannot run yet: the next one of its tenant has the turn."""
        self._move_on(1)

    def took_current(self) -> None:
        """It runs: it has left the queue, and its tenant has been charged."""
        self._move_on(0)

    def _is_fresh(self) -> bool:
        return self._fresh is not None and (not self._heap or self._fresh < self._heap[0][:3])

    def _move_on(self, num_skipped: int) -> None:
        if self._is_fresh():
            assert self._fresh is not None
            tenant, index = self._fresh[2], num_skipped
            self._seen.add(tenant)
            self._fresh = self._next_fresh(self._fresh)
        else:
            _, _, tenant, index = heapq.heappop(self._heap)
            index += num_skipped
        queue = self._queues.get(tenant, [])
        if index < len(queue):
            heapq.heappush(self._heap, (self._counters[tenant], queue[index].seq_id, tenant, index))

    def _next_fresh(self, last: _Turn) -> _Turn | None:
        """Behind `last`, which need not be there any more: a tenant that was charged stands further back."""
        at = bisect_right(self._order, last)
        while at < len(self._order) and self._order[at][2] in self._seen:
            at += 1
        return self._order[at] if at < len(self._order) else None
