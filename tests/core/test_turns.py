"""Turns cost what is taken and skipped, and come in the order of a pass that looks at every tenant."""

from __future__ import annotations

import heapq
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.fairness import FairQueue
from engine.core.sequence import Sequence
from tests.core.build import request


class AllTenants:
    """The plain way: a heap over all tenants at each pass."""

    def __init__(self, queue: FairQueue) -> None:
        self._queues, self._counters = queue._queues, queue._counters
        self._heap = [(self._counters[name], waiting[0].seq_id, name, 0) for name, waiting in self._queues.items()]
        heapq.heapify(self._heap)

    @property
    def current(self) -> Sequence | None:
        if not self._heap:
            return None
        _, _, tenant, index = self._heap[0]
        return self._queues[tenant][index]

    def move_on(self, num_skipped: int) -> None:
        _, _, tenant, index = heapq.heappop(self._heap)
        index += num_skipped
        waiting = self._queues.get(tenant, [])
        if index < len(waiting):
            heapq.heappush(self._heap, (self._counters[tenant], waiting[index].seq_id, tenant, index))


def _sequence(seq_id: int, tenant: str) -> Sequence:
    return Sequence(seq_id, request(f"r{seq_id}", tenant=tenant), 0, max_tokens_total=9, cache_namespace="base")


MOVES = st.lists(
    st.tuples(st.sampled_from(["push", "push", "again", "charge", "remove", "pass"]), st.integers(0, 2**32 - 1)),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(MOVES)
def test_turns_come_as_if_all_tenants_were_looked_at(moves: list[tuple[str, int]]) -> None:
    queue, out = FairQueue(), []
    numbers = iter(range(1, 1000))
    for move, seed in moves:
        rng = random.Random(seed)
        tenant = rng.choice("abcde")
        waiting = queue.sequences()
        if move == "push":
            queue.push(_sequence(next(numbers), tenant))
        elif move == "again" and out:
            queue.push(out.pop(rng.randrange(len(out))))
        elif move == "charge":
            queue.charge(tenant, rng.choice((0, 1, 1, 5, 100)))
        elif move == "remove" and waiting:
            out.append(rng.choice(waiting))
            queue.remove(out[-1])
        elif move == "pass":
            _pass(queue, out, rng)
        queue.check_invariants()


def _pass(queue: FairQueue, out: list[Sequence], rng: random.Random) -> None:
    """Some are taken and charged, some charged for a load and skipped, until somebody stops."""
    turns, plain = queue.turns(), AllTenants(queue)
    for _ in range(rng.choice((1, 3, 50))):
        current = turns.current
        assert current is plain.current
        if current is None:
            return
        if rng.random() < 0.2:
            queue.charge(current.tenant, rng.choice((1, 2, 50)))
        is_taken = rng.random() < 0.5
        if is_taken:
            queue.remove(current)
            queue.charge(current.tenant, rng.choice((0, 1, 7)))
            out.append(current)
            turns.took_current()
        else:
            turns.skip_current()
        plain.move_on(0 if is_taken else 1)


class _Counted(list[Any]):
    """What is read of it one by one. To read all of it is an error."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        self.num_read += 1
        return super().__getitem__(index)

    def __iter__(self) -> Any:
        raise AssertionError("all tenants were looked at")


@pytest.mark.parametrize("num_tenants", [50, 5_000])
def test_a_pass_looks_at_what_it_takes_and_not_at_all_who_wait(num_tenants: int) -> None:
    queue = FairQueue()
    for seq_id in range(num_tenants):
        queue.push(_sequence(seq_id, f"tenant{seq_id}"))
    order = queue._order = _Counted(queue._order)
    turns = queue.turns()
    for index in range(8):
        current = turns.current
        assert current is not None
        assert current.seq_id == index
        if index % 2:
            queue.remove(current)
            queue.charge(current.tenant, 10**6)
            turns.took_current()
        else:
            turns.skip_current()
    assert 0 < order.num_read <= 8 * 4 * num_tenants.bit_length()
