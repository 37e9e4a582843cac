"""One budget for KV blocks and adapters: who takes pages from whom, and what callers may pin."""

from __future__ import annotations

import pytest

from engine.core.adapter_room import ByteRoom
from engine.core.adapter_slots import AdapterSlots
from engine.core.plan import AdapterEvict, AdapterLoad, StepEvents
from engine.core.scheduler import Scheduler
from engine.errors import AdapterError, AdapterTooLarge, ConfigError
from tests.core.build import config, request, run, step

MIB = 1 << 20


def paged(num_blocks: int, **changes: object) -> Scheduler:
    return Scheduler(config(**{"num_blocks": num_blocks + 1, "max_adapter_pages": 4, **changes}))


def make_resident(scheduler: Scheduler, *keys: str, runs: tuple[int, ...] = (1, 1)) -> None:
    for key in keys:
        scheduler.add_adapter(key, 10, runs)
        assert scheduler.preload_adapter(key)
    while scheduler.has_work():
        step(scheduler)
    assert set(scheduler.stats().resident_adapters) >= set(keys)


def test_a_growing_sequence_takes_pages_of_idle_adapters_before_anybody_is_preempted() -> None:
    scheduler = paged(8)
    make_resident(scheduler, "ada", "bob")
    scheduler.add(request("a", 8, max_tokens=12))
    scheduler.add(request("b", 4, max_tokens=4))
    ops = [op for plan, _ in run(scheduler) for op in plan.adapter_ops]
    assert [type(op) for op in ops] == [AdapterEvict]
    assert scheduler.stats().preemptions == 0


def test_sequences_leave_adapters_their_floor() -> None:
    scheduler = paged(8, min_adapter_pages=4)
    make_resident(scheduler, "ada", "bob")
    for name in "abc":
        scheduler.add(request(name, 4, max_tokens=12))
    assert not [op for plan, _ in run(scheduler) for op in plan.adapter_ops]
    assert scheduler.stats().preemptions > 0


def test_no_sequence_gets_the_floor_even_while_no_adapter_is_there() -> None:
    scheduler = paged(8, min_adapter_pages=4)
    for name in "abc":
        scheduler.add(request(name, 8))
    plan, _ = step(scheduler)
    assert len(plan.slices) == 2
    assert scheduler.stats().free_blocks == 4


def test_an_adapter_takes_blocks_without_content_first_then_cached_ones() -> None:
    scheduler = paged(6, enable_prefix_caching=True)
    scheduler.add(request("a", 8, max_tokens=2))
    list(run(scheduler))
    assert scheduler.stats().cached_blocks == 2
    make_resident(scheduler, "ada", runs=(1, 1, 1, 1))
    assert scheduler.stats().cached_blocks == 2
    scheduler.add_adapter("bob", 10, (1,))
    assert not scheduler.preload_adapter("bob")  # the ceiling


def test_prefixes_of_an_adapter_that_is_gone_are_handed_out_before_older_ones() -> None:
    scheduler = Scheduler(config(num_blocks=7, enable_prefix_caching=True))
    scheduler.add(request("base", 4, max_tokens=2))
    list(run(scheduler))
    scheduler.add_adapter("ada", 10)
    scheduler.add(request("tuned", 4, max_tokens=2, adapter="ada"))
    list(run(scheduler))
    assert not scheduler.remove_adapter("ada")
    step(scheduler)
    assert scheduler.remove_adapter("ada")
    scheduler.add(request("x", 17, max_tokens=2, cache_salt="x"))
    list(run(scheduler))
    hits = scheduler.stats().prefix_hit_tokens
    scheduler.add(request("again", 8, max_tokens=1))
    list(run(scheduler))
    assert scheduler.stats().prefix_hit_tokens - hits == 4  # the older one was still there


def test_a_run_of_neighbours_is_waited_for_until_sequences_have_made_room() -> None:
    """A tensor larger than a page, a pool in fragments, and callers of the base model who never stop coming."""
    scheduler = paged(9, max_num_seqs=3)
    scheduler.add_adapter("wide", 10, (4,))
    for index in range(3):
        scheduler.add(request(f"first{index}", 4, max_tokens=3 + 2 * index))
    step(scheduler)
    scheduler.add(request("wide", adapter="wide", tenant="w"))
    ended: list[str] = []
    for index in range(60):
        scheduler.add(request(f"base{index}", 4, max_tokens=5, tenant="b"))
        _, updates = step(scheduler)
        scheduler.check_invariants()
        ended += [update.request_id for update in updates if update.finish_reason is not None]
    assert "wide" in ended


def test_an_adapter_larger_than_the_ceiling_is_refused_by_name() -> None:
    scheduler = paged(8)
    scheduler.add_adapter("ada", 10, (3, 2))
    with pytest.raises(AdapterTooLarge, match="'ada' has 5 pages, but adapter_bytes is 4 pages"):
        scheduler.add(request("a", adapter="ada"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_adapter_pages": 5}, "min_adapter_bytes are 5 pages .* may hold 4"),
        ({"max_adapter_pages": 8}, "none would be left for sequences"),
    ],
)
def test_boundaries_that_leave_one_side_nothing_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paged(8, **changes)


# --- what callers ask for


def test_a_preload_loads_without_a_request_and_evicts_nobody() -> None:
    scheduler = Scheduler(config(max_resident_adapters=1))
    for key in ("ada", "bob"):
        scheduler.add_adapter(key, 10)
    assert scheduler.preload_adapter("ada")
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    assert plan.adapter_ops == (AdapterLoad("ada", 1),)
    assert not scheduler.preload_adapter("bob")
    assert scheduler.preload_adapter("ada")  # again changes nothing
    scheduler.abandon(plan)
    plan, _ = step(scheduler)
    assert plan.adapter_ops == (AdapterEvict("ada", 1), AdapterLoad("ada", 1))
    assert scheduler.stats().resident_adapters == ("ada",)
    assert not scheduler.has_work()


def test_what_was_to_follow_an_abandoned_plan_is_undone_before_it() -> None:
    """A preload has got the slot that the abandoned plan freed, which the device may not have done."""
    scheduler = paged(8, max_resident_adapters=1)
    make_resident(scheduler, "ada")
    assert not scheduler.remove_adapter("ada")
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    assert plan.adapter_ops == (AdapterEvict("ada", 1),)
    scheduler.add_adapter("bob", 10, (1,))
    assert scheduler.preload_adapter("bob")
    scheduler.abandon(plan)
    plan, _ = step(scheduler)
    assert plan.adapter_ops == (AdapterEvict("ada", 1), AdapterLoad("bob", 1, (1,)))
    assert scheduler.stats().resident_adapters == ("bob",)


def test_a_pin_that_an_abandoned_plan_moves_into_the_way_of_others_is_lost_and_no_more() -> None:
    scheduler = paged(12, max_adapter_pages=9, pipeline_depth=2)
    for key, runs in (("one", (1,)), ("two", (2,)), ("wide", (6,))):
        scheduler.add_adapter(key, 10, runs)
    for name in "ab":
        scheduler.add(request(name, 10, max_tokens=3))
    step(scheduler)  # blocks 1 .. 6
    assert scheduler.preload_adapter("one")
    scheduler.add(request("c", 10, max_tokens=3))
    first = scheduler.schedule(StepEvents())  # page 7, blocks 8 .. 10
    assert first is not None
    assert scheduler.preload_adapter("two")  # pages 11 and 12
    for key in ("one", "two"):
        scheduler.pin_adapter(key)
    assert scheduler.schedule(StepEvents()) is not None
    scheduler.abandon(first)
    assert scheduler.stats().pinned_adapters == ("two",)  # which is in pages 1 and 2 now
    scheduler.check_invariants()
    list(run(scheduler))
    assert set(scheduler.stats().resident_adapters) == {"one", "two"}


def test_a_pinned_adapter_stays_while_others_come_and_go() -> None:
    scheduler = Scheduler(config(max_resident_adapters=2, adapter_bytes=20))
    make_resident(scheduler, "kept", runs=())
    scheduler.pin_adapter("kept")
    scheduler.pin_adapter("kept")
    for index in range(4):
        scheduler.add_adapter(f"a{index}", 10)
        scheduler.add(request(f"a{index}", adapter=f"a{index}"))
        list(run(scheduler))
        assert "kept" in scheduler.stats().resident_adapters
    assert scheduler.stats().pinned_adapters == ("kept",)
    assert not scheduler.remove_adapter("kept")
    scheduler.unpin_adapter("kept")
    scheduler.unpin_adapter("kept")
    assert not scheduler.remove_adapter("kept")
    step(scheduler)
    assert scheduler.remove_adapter("kept")


def test_pins_leave_room_for_another_adapter_as_large_as_any() -> None:
    scheduler = Scheduler(config(adapter_bytes=25))
    make_resident(scheduler, "ada", "bob", runs=())
    scheduler.pin_adapter("ada")
    with pytest.raises(AdapterError, match=r"'bob' cannot be pinned: with it, 2 adapters .* one of 10 bytes would"):
        scheduler.pin_adapter("bob")
    with pytest.raises(AdapterError, match="'cyd' cannot be pinned: it is not resident"):
        scheduler.pin_adapter("cyd")
    scheduler.add_adapter("large", 20)
    with pytest.raises(AdapterTooLarge, match="find no room in 25 bytes beside the pinned adapters 'ada'; unpin one"):
        scheduler.add(request("large", adapter="large"))
    assert scheduler.stats().pinned_adapters == ("ada",)


def test_pins_that_would_tear_the_pages_of_the_largest_apart_are_refused() -> None:
    scheduler = paged(9, max_adapter_pages=6)
    make_resident(scheduler, "p0", "p1", "p2", runs=(1,))
    scheduler.remove_adapter("p0")
    scheduler.add_adapter("wide", 10, (5,))
    scheduler.pin_adapter("p2")  # behind it five neighbours are left
    with pytest.raises(AdapterError, match="cannot be pinned"):
        scheduler.pin_adapter("p1")


# --- who is evicted


def resident(slots: AdapterSlots, key: str, num_uses: int) -> None:
    assert slots.load(key)
    slots.copied(key)
    for _ in range(num_uses):
        slots.pin(key)
        slots.unpin(key)


def test_of_equally_large_adapters_the_one_used_less_goes_first_though_it_was_used_last() -> None:
    slots = AdapterSlots(2, ByteRoom(100))
    for key in ("often", "once", "new"):
        slots.add(key, 10)
    resident(slots, "often", 5)
    resident(slots, "once", 1)
    assert slots.resident() == ("once", "often")
    assert [op.adapter for op in slots.load("new")] == ["once", "new"]


def test_what_was_used_often_once_does_not_stay_for_ever() -> None:
    slots = AdapterSlots(2, ByteRoom(100))
    slots.add("old", 10)
    resident(slots, "old", 5)
    for index in range(10):
        slots.add(f"a{index}", 10)
        resident(slots, f"a{index}", 1)
        if "old" not in slots.resident():
            return
    raise AssertionError("it is still resident")


def test_the_bytes_of_a_large_adapter_weigh_against_it() -> None:
    slots = AdapterSlots(3, ByteRoom(300 * MIB))
    slots.add("large", 200 * MIB)
    slots.add("small", 10 * MIB)
    slots.add("new", 150 * MIB)
    resident(slots, "small", 1)
    resident(slots, "large", 1)
    assert [op.adapter for op in slots.load("new")] == ["large", "new"]
