"""Where a router sends a call, by what it was told of the replicas."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest

from deployments.calls import Call
from deployments.reports import HOST, VRAM, Report, name_digest, pack
from deployments.router.fleet import MAX_PLACED, SILENT_S, Fleet
from deployments.router.placement import Demand, Weights, digest, homes, mixed, num_homes, ranks
from engine.request import SamplingParams

IDS = ("r1", "r2", "r3", "r4")
CAPACITY = 32


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def call(number: object = 0, **changes: Any) -> Call:
    return Call(
        **{"request_id": f"q{number}", "prompt_token_ids": (1,), "params": SamplingParams(), "seed": 0} | changes
    )


def told(
    load: int = 0, *, vram: tuple[str, ...] = (), host: tuple[str, ...] = (), hints: tuple[int, ...] = ()
) -> bytes:
    names = {name_digest(name): HOST for name in host} | {name_digest(name): VRAM for name in vram}
    return pack(
        Report(epoch=7, number=0, load=load, capacity=CAPACITY, is_full=True, names=tuple(names.items()), hints=hints)
    )


def fleet_of(ids: tuple[str, ...] = IDS, *, now_s: Clock | None = None, **reports: bytes) -> Fleet:
    fleet = Fleet(now_s=now_s or Clock())
    fleet.on_members(ids)
    for replica_id in ids:
        assert fleet.on_report(replica_id, reports.get(replica_id, told()))
    return fleet


def test_a_replica_with_the_adapter_in_vram_comes_before_host_before_cold():
    fleet = fleet_of(r2=told(host=("a",)), r3=told(vram=("a",), host=("a",)))
    assert fleet.place(call(adapter="a"))[:2] == ("r3", "r2")


def test_the_order_does_not_depend_on_the_order_in_which_replicas_came():
    for adapter in ("a", "b", None):
        orders = set()
        for ids in itertools.permutations(IDS):
            fleet = fleet_of(ids, r4=told(20))
            orders.add(fleet.place(call(adapter=adapter)))
        assert len(orders) == 1


@pytest.mark.parametrize("num_replicas", [4, 64, 1000])
def test_every_router_sends_a_cold_adapter_to_the_same_replica(num_replicas: int):
    ids = tuple(f"replica-{i}" for i in range(num_replicas))
    routers = [fleet_of(order) for order in (ids, ids[::-1])]
    routers[1].place(call("other", adapter="other"))
    for adapter in map(str, range(40)):
        assert len({router.place(call(f"{adapter} {i}", adapter=adapter))[0] for i, router in enumerate(routers)}) == 1


def test_cold_adapters_are_spread_evenly():
    fleet = fleet_of()
    counts = Counter(fleet.place(call(adapter=str(i), request_id=str(i)))[0] for i in range(400))
    assert set(counts) == set(IDS)
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_lost_replica_moves_only_its_own_adapters():
    ids = tuple(f"replica-{i}" for i in range(20))
    fleet = fleet_of(ids)
    before = {name: fleet.place(call(name, adapter=name))[0] for name in map(str, range(200))}
    fleet.on_members(ids[1:])
    after = {name: fleet.place(call(name, adapter=name))[0] for name in before}
    assert all(after[name] == home for name, home in before.items() if home != ids[0])
    assert ids[0] not in after.values()


def test_a_base_request_goes_to_the_least_loaded_replica():
    fleet = fleet_of(r1=told(3), r2=told(1), r3=told(2), r4=told(4))
    assert fleet.place(call()) == ("r2", "r3", "r1", "r4")


def test_one_that_is_served_alone_goes_to_the_least_loaded_whatever_it_asks_for():
    ids = tuple(f"replica-{i}" for i in range(100))
    fleet = fleet_of(ids, **{name: told(5, vram=("a",), hints=(1,)) for name in ids if name != "replica-42"})
    assert fleet.place(call(adapter="a", prefix_hints=(1,), alone_tokens=1))[0] == "replica-42"


def test_a_busy_holder_loses_its_adapter_to_an_idle_replica():
    def first(load: int) -> str:
        fleet = fleet_of(r1=told(load, vram=("a",)))
        for i in range(200):  # the adapter is one of many that are asked for
            fleet.place(call(f"other {i}"))
        return fleet.place(call(adapter="a"))[0]

    assert first(0) == "r1"
    assert first(15) == "r1"
    assert first(24) != "r1"


def test_a_longer_cached_prefix_wins_and_a_gap_ends_it():
    fleet = fleet_of(r1=told(hints=(1,)), r2=told(hints=(1, 2)), r3=told(hints=(2, 3)))
    assert fleet.place(call(prefix_hints=(1, 2, 3)))[:2] == ("r2", "r1")


def test_holders_of_a_prefix_and_of_an_adapter_are_found_among_a_thousand():
    ids = tuple(f"replica-{i}" for i in range(1000))
    fleet = fleet_of(ids, **{"replica-77": told(vram=("a",)), "replica-500": told(hints=(1, 2))})
    assert fleet.place(call(adapter="a"))[0] == "replica-77"
    assert fleet.place(call(prefix_hints=(1, 2, 3)))[0] == "replica-500"


def test_a_replica_that_failed_the_request_comes_last_and_a_silent_one_before_it():
    clock = Clock()
    fleet = fleet_of(now_s=clock, r2=told(vram=("a",)))
    assert fleet.place(call(adapter="a", avoid=("r2",)))[-1] == "r2"
    clock.now_s += SILENT_S + 1
    for name in ("r1", "r3", "r4"):
        fleet.on_load(name, 0, CAPACITY)
    assert fleet.place(call(adapter="a", avoid=("r3",)))[2:] == ("r2", "r3")
    assert fleet.place(call())[-1] == "r2"


def test_when_all_are_silent_none_is():
    clock = Clock()
    fleet = fleet_of(now_s=clock, r2=told(vram=("a",)))
    clock.now_s += 10 * SILENT_S
    assert fleet.place(call(adapter="a"))[0] == "r2", "it is the messenger's fault"


def test_a_replica_whose_connection_broke_comes_last_until_it_is_heard():
    fleet = fleet_of(r2=told(vram=("a",)))
    fleet.on_lost("r2")
    order = fleet.place(call(adapter="a"))
    assert (len(order), order[-1]) == (4, "r2")
    fleet.on_load("r2", 0, CAPACITY)
    assert fleet.place(call(adapter="a", avoid=tuple(name for name in IDS if name != "r2")))[0] == "r2"


def test_few_of_many_are_named_and_the_least_loaded_is_among_them():
    ids = tuple(f"replica-{i}" for i in range(1000))
    fleet = fleet_of(ids, **{name: told(CAPACITY, vram=("a",)) for name in ids if name != "replica-123"})
    for number in range(20):
        order = fleet.place(call(number, adapter="a"))
        assert len(order) <= MAX_PLACED
        assert "replica-123" in order
        assert len(set(order)) == len(order)


def test_when_all_that_were_looked_at_failed_or_are_silent_the_rest_is_looked_at():
    ids = tuple(f"replica-{i:03}" for i in range(300))
    clock = Clock()
    fleet = fleet_of(ids, now_s=clock)
    clock.now_s += SILENT_S + 1
    fleet.on_load("replica-299", CAPACITY, CAPACITY)
    for number in range(20):
        assert fleet.place(call(number, adapter="a"))[0] == "replica-299"
        assert fleet.place(call(number, avoid=ids[:-1]))[0] == "replica-299"


def test_own_sends_count_until_a_load_is_told_and_what_runs_counts_always():
    fleet = fleet_of()
    for _ in range(3):
        fleet.sent("r1")
    assert fleet.place(call())[-1] == "r1"
    for name in ("r2", "r3", "r4"):
        fleet.on_load(name, 2, CAPACITY)
    fleet.on_load("r1", 1, CAPACITY)  # of before two of the three arrived
    assert fleet.place(call())[-1] == "r1", "three of this router's own are there, whatever is told"
    for _ in range(2):
        fleet.ended("r1")
    fleet.on_load("r1", 1, CAPACITY)
    assert fleet.place(call())[0] == "r1"


def test_nobody_runs_nobody_is_named():
    fleet = Fleet()
    assert fleet.place(call(adapter="a")) == ()
    fleet.on_members(["r1"])
    assert fleet.place(call(adapter="a")) == ("r1",)
    fleet.on_members([])
    assert fleet.place(call()) == ()


def test_the_same_request_is_placed_the_same_when_the_same_was_heard():
    ids = tuple(f"replica-{i}" for i in range(200))
    calls = [call(i, adapter=f"a{i % 7}" if i % 3 else None) for i in range(100)]
    first, second = fleet_of(ids), fleet_of(ids)
    assert [first.place(one) for one in calls] == [second.place(one) for one in calls]


def test_a_key_has_homes_for_its_demand_and_keeps_them_while_it_wavers():
    weights = Weights(fill=0.125)

    def homes_for(now: int, demand: float, share: float = 0.0) -> int:
        return num_homes(now, demand, 32, share, 100, weights)

    assert [homes_for(1, demand) for demand in (0, 1, 4, 4.1, 40, 256)] == [1, 1, 1, 2, 10, 64]
    assert homes_for(10, 21) == 10, "six would do: not worth moving"
    assert homes_for(10, 16) == 4
    assert homes_for(2, 2.1) == 2
    assert homes_for(2, 1.9) == 1
    assert homes_for(3, 0.0) == 1
    assert homes_for(1, 200, share=1.0) == 100, "it is all there is"
    assert homes_for(1, 20, share=1.0) == 10, "but not one by one"


def test_demand_is_forgotten_with_time():
    demand = Demand(half_life_s=10.0)
    for _ in range(100):
        share = demand.asked(1, 0.0)
    assert share == pytest.approx(0.8)
    assert demand.asked(2, 0.0) == 0.0, "one request proves nothing"
    for i in range(300):
        demand.asked(2, 1.0 + i / 10)
    assert demand.asked(1, 31.0) < 0.15


def test_the_vector_form_of_the_hash_is_the_scalar_one():
    salts = [digest(f"replica-{i}") for i in range(300)]
    for key in (0, 1, digest("a"), (1 << 64) - 1):
        expected = [mixed(key ^ salt) for salt in salts]
        assert ranks(key, np.array(salts, np.uint64)).tolist() == expected
        order = tuple(sorted(range(300), key=lambda slot: -expected[slot]))
        for count in (1, 2, 8, 64, 300):
            assert homes(key, np.array(salts, np.uint64), count) == order[:count]
