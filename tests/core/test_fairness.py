"""Tenants share the engine: the bound of the VTC paper (arXiv 2401.00588, theorem 4.4), and what is charged."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.core.fairness import LOAD_BYTES_PER_UNIT, OUTPUT_WEIGHT, TOKEN_UNITS, FairQueue, load_cost, token_cost
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from tests.core.build import config, request, step

MIB = 1 << 20


def sequence(seq_id: int, tenant: str) -> Sequence:
    return Sequence(seq_id, request(f"r{seq_id}", tenant=tenant), 0, max_tokens_total=9, cache_namespace="base")


def served_first(queue: FairQueue) -> int:
    current = queue.turns().current
    assert current is not None
    return current.seq_id


@pytest.mark.parametrize(("greedy_prompt", "greedy_tokens"), [(2, 2), (16, 4), (4, 24)])
def test_of_two_tenants_that_wait_neither_gets_ahead_by_more_than_the_bound(
    greedy_prompt: int, greedy_tokens: int
) -> None:
    """One sends ten times as many requests as the other; both always have some waiting."""
    limits = config(max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = Scheduler(limits)
    served: Counter[str] = Counter()
    for index in range(400):
        scheduler.add(request(f"greedy{index}", greedy_prompt, greedy_tokens, tenant="greedy"))
        if index % 10 == 0:
            scheduler.add(request(f"modest{index}", 8, 8, tenant="modest"))
    max_output = max(greedy_tokens, 8) * limits.max_num_seqs
    bound = 2 * max(max(greedy_prompt, 8) * TOKEN_UNITS, OUTPUT_WEIGHT * max_output * TOKEN_UNITS)
    for _ in range(110):
        plan, updates = step(scheduler)
        owner = {start.seq_id: start for start in plan.starts}
        for start in owner.values():
            tenant = "modest" if len(start.prompt_token_ids) == 8 else "greedy"
            served[tenant] += len(start.prompt_token_ids) * TOKEN_UNITS
        for update in updates:
            served[update.request_id[:6]] += OUTPUT_WEIGHT * TOKEN_UNITS * len(update.token_ids)
        assert abs(served["greedy"] - served["modest"]) <= bound, served
    assert min(served["greedy"], served["modest"]) > bound, "the bound was tried"


def test_a_tenant_that_comes_back_gets_no_credit_for_having_been_away() -> None:
    queue = FairQueue()
    queue.push(sequence(1, "busy"))
    queue.charge("busy", 1000)
    queue.push(sequence(2, "late"))
    assert queue.counter("late") == 1000
    queue.charge("busy", 1)
    assert served_first(queue) == 2


def test_an_empty_queue_remembers_what_the_last_tenant_had() -> None:
    queue = FairQueue()
    seq = sequence(1, "busy")
    queue.push(seq)
    queue.remove(seq)
    queue.charge("busy", 500)
    queue.push(sequence(2, "late"))
    assert queue.counter("late") == 500


def test_a_tenant_in_debt_stays_in_debt_while_it_is_away() -> None:
    queue = FairQueue()
    first, second = sequence(1, "debtor"), sequence(2, "other")
    queue.push(first)
    queue.push(second)
    queue.charge("debtor", 5000)
    queue.remove(first)
    queue.push(sequence(3, "debtor"))
    assert queue.counter("debtor") == 5000
    assert served_first(queue) == 2


def test_equal_tenants_are_served_in_order_of_arrival() -> None:
    queue = FairQueue()
    for seq_id, tenant in ((1, "z"), (2, "a"), (3, "m")):
        queue.push(sequence(seq_id, tenant))
    order = []
    turns = queue.turns()
    while (current := turns.current) is not None:
        order.append(current.seq_id)
        turns.skip_current()
    assert order == [1, 2, 3]


def test_counters_of_tenants_that_are_gone_are_forgotten_in_the_end() -> None:
    queue = FairQueue()
    for seq_id in range(1, 1001):
        seq = sequence(seq_id, f"tenant{seq_id}")
        queue.push(seq)
        queue.charge(seq.tenant, 10)
        queue.remove(seq)
        queue.check_invariants()
    assert len(queue._counters) < 200


def test_adapters_are_charged_for_their_rank_and_for_their_loads() -> None:
    assert token_cost(0) == TOKEN_UNITS
    assert token_cost(512 * MIB) == 2 * TOKEN_UNITS
    assert load_cost(MIB) == TOKEN_UNITS == MIB // LOAD_BYTES_PER_UNIT
    assert load_cost(1) == 1


def test_a_tenant_is_charged_for_what_is_computed_for_it() -> None:
    scheduler = Scheduler(config(adapter_bytes=512 * MIB, enable_prefix_caching=True))
    scheduler.add_adapter("big", 512 * MIB)
    scheduler.add(request("a", 9, max_tokens=2, adapter="big"))
    step(scheduler)
    assert scheduler._queue.counter("big") == 512 * TOKEN_UNITS
    step(scheduler)
    step(scheduler)
    assert scheduler._queue.counter("big") == (512 + 2 * (9 + 2 * OUTPUT_WEIGHT)) * TOKEN_UNITS
    scheduler.add(request("b", 9, max_tokens=1, adapter="big"))
    step(scheduler)
    assert scheduler._queue.counter("big") == (512 + 2 * (9 + 3 * OUTPUT_WEIGHT + 1)) * TOKEN_UNITS


def test_no_tenant_starves_behind_one_with_a_thousand_requests() -> None:
    scheduler = Scheduler(config(max_num_seqs=2))
    for index in range(900):
        scheduler.add(request(f"mob{index}", tenant="mob"))
    for index in range(5):
        scheduler.add(request(f"one{index}", tenant=f"one{index}", max_tokens=1))
    ended: list[str] = []
    for _ in range(40):
        ended.extend(update.request_id for update in step(scheduler)[1] if update.finish_reason)
    assert {f"one{index}" for index in range(5)} <= set(ended)
