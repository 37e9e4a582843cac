"""Placement, alone and in a simulated fleet."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from deployments.router.placement import SILENT_S, Heard, ReplicaView, rank

IDS = ("r1", "r2", "r3", "r4")


def _fleet(**changes: ReplicaView) -> list[ReplicaView]:
    return [changes.get(replica_id, ReplicaView(replica_id=replica_id, capacity=32)) for replica_id in IDS]


def test_a_replica_with_the_adapter_in_vram_comes_before_host_before_cold():
    fleet = _fleet(
        r2=ReplicaView(replica_id="r2", capacity=32, host=frozenset({"a"})),
        r3=ReplicaView(replica_id="r3", capacity=32, resident=frozenset({"a"}), host=frozenset({"a"})),
    )
    assert rank(fleet, "a")[:2] == ("r3", "r2")


def test_the_order_does_not_depend_on_the_order_of_the_replicas():
    fleet = _fleet(r4=ReplicaView(replica_id="r4", load=20, capacity=32))
    for adapter in ("a", "b", None):
        assert len({rank(order, adapter) for order in itertools.permutations(fleet)}) == 1


def test_every_router_sends_a_cold_adapter_to_the_same_replica():
    homes = {adapter: rank(_fleet(), adapter)[0] for adapter in map(str, range(400))}
    counts = Counter(homes.values())
    assert set(counts) == set(IDS)
    assert max(counts.values()) < 2 * min(counts.values())


def test_a_lost_replica_moves_only_its_own_adapters():
    adapters = [str(i) for i in range(200)]
    before = {adapter: rank(_fleet(), adapter)[0] for adapter in adapters}
    after = {adapter: rank(_fleet()[1:], adapter)[0] for adapter in adapters}
    assert all(after[adapter] == home for adapter, home in before.items() if home != "r1")


def test_a_base_request_goes_to_the_least_loaded_replica():
    fleet = [ReplicaView(replica_id=r, load=load, capacity=32) for r, load in zip(IDS, (3, 1, 2, 4), strict=True)]
    assert rank(fleet, None) == ("r2", "r3", "r1", "r4")


def test_a_busy_holder_loses_its_adapter_to_an_idle_replica():
    def first(load: int) -> str:
        holder = ReplicaView(replica_id="r1", load=load, capacity=32, resident=frozenset({"a"}))
        return rank(_fleet(r1=holder), "a")[0]

    assert first(0) == "r1"
    assert first(15) == "r1"
    assert first(24) != "r1"


def test_a_longer_cached_prefix_wins_and_a_gap_ends_it():
    fleet = _fleet(
        r1=ReplicaView(replica_id="r1", capacity=32, prefixes=frozenset({1})),
        r2=ReplicaView(replica_id="r2", capacity=32, prefixes=frozenset({1, 2})),
        r3=ReplicaView(replica_id="r3", capacity=32, prefixes=frozenset({2, 3})),
    )
    order = rank(fleet, None, (1, 2, 3))
    assert order[:2] == ("r2", "r1")


def test_a_replica_that_failed_the_request_comes_last():
    holder = ReplicaView(replica_id="r2", capacity=32, resident=frozenset({"a"}))
    order = rank(_fleet(r2=holder), "a", avoid=frozenset({"r2"}))
    assert order[-1] == "r2"
    assert len(order) == len(IDS)


def test_a_silent_replica_comes_after_those_that_report_and_before_those_that_failed():
    fleet = _fleet(r2=ReplicaView(replica_id="r2", is_silent=True, capacity=32, resident=frozenset({"a"})))
    assert rank(fleet, "a", avoid=frozenset({"r3"}))[2:] == ("r2", "r3")
    assert rank(fleet, None)[-1] == "r2"


def test_what_was_heard_last_of_a_queue_is_believed():
    heard = Heard()
    assert not heard.believes_queue("r1")
    heard.report("r1", 7, now_s=1.0)
    heard.queue("r1", now_s=2.0)
    assert heard.believes_queue("r1"), "a call was sent after the report"
    heard.report("r1", 7, now_s=11.0)
    assert heard.believes_queue("r1"), "the same report again is no news"
    heard.report("r1", 8, now_s=11.5)
    assert not heard.believes_queue("r1"), "ten seconds old, and the report half a second"
    heard.queue("r1", now_s=11.6)
    assert heard.believes_queue("r1")
    heard.keep(["r2"])
    assert not heard.believes_queue("r1")


def test_a_replica_is_silent_when_others_are_not():
    heard = Heard()
    for name in ("r1", "r2", "r3"):
        heard.report(name, 0, now_s=0.0)
    assert heard.silent(SILENT_S) == frozenset()
    heard.report("r1", 1, now_s=SILENT_S)
    heard.report("r2", 1, now_s=SILENT_S)
    assert heard.silent(SILENT_S + 1) == {"r3"}
    assert heard.silent(10 * SILENT_S) == frozenset(), "no reports at all tell of the messenger, not of replicas"
    heard.report("r4", None, now_s=10 * SILENT_S)  # new, without a report so far
    assert heard.silent(10 * SILENT_S) == {"r1", "r2", "r3"}
    heard.keep(["r1"])
    assert heard.silent(20 * SILENT_S) == frozenset()


class _Fleet:
    """Replicas with room for some adapters; requests take some ticks; routers see what was true some ticks ago."""

    def __init__(self, num_replicas: int, slots: int, capacity: int, stale_ticks: int) -> None:
        self.ids = [f"r{i}" for i in range(num_replicas)]
        self.slots, self.capacity, self.stale_ticks = slots, capacity, stale_ticks
        self.resident: dict[str, list[str]] = {r: [] for r in self.ids}  # least recently used first
        self.ends: dict[str, list[int]] = {r: [] for r in self.ids}
        self.seen: dict[str, frozenset[str]] = {r: frozenset() for r in self.ids}
        self.loads = 0
        self.peak = 0

    def tick(self, now: int) -> None:
        for r in self.ids:
            self.ends[r] = [end for end in self.ends[r] if end > now]
            if now % self.stale_ticks == 0:
                self.seen[r] = frozenset(self.resident[r])

    def send(self, now: int, adapter: str, ticks: int) -> str:
        views = [
            ReplicaView(replica_id=r, load=len(self.ends[r]), capacity=self.capacity, resident=self.seen[r])
            for r in self.ids
        ]
        chosen = rank(views, adapter)[0]
        held = self.resident[chosen]
        if adapter in held:
            held.remove(adapter)
        else:
            self.loads += 1
            if len(held) == self.slots:
                held.pop(0)
        held.append(adapter)
        self.ends[chosen].append(now + ticks)
        self.peak = max(self.peak, len(self.ends[chosen]))
        return chosen


def _simulate(zipf: float) -> tuple[_Fleet, Counter[str], dict[str, set[str]], int]:
    rng = random.Random(7)
    fleet = _Fleet(num_replicas=4, slots=60, capacity=32, stale_ticks=5)
    adapters = [f"adapter-{i}" for i in range(200)]
    weights = [1 / (i + 1) ** zipf for i in range(len(adapters))]
    sent: Counter[str] = Counter()
    where: dict[str, set[str]] = {}
    num_requests = 6000
    for number, adapter in enumerate(rng.choices(adapters, weights, k=num_requests)):
        now = number // 4
        fleet.tick(now)
        chosen = fleet.send(now, adapter, ticks=rng.randint(5, 25))
        sent[chosen] += 1
        where.setdefault(adapter, set()).add(chosen)
    return fleet, sent, where, num_requests


@pytest.mark.parametrize("zipf", [0.0, 1.0, 1.5])
def test_a_fleet_stays_balanced_and_adapters_stay_where_they_are(zipf: float):
    fleet, sent, _, num_requests = _simulate(zipf)
    assert max(sent.values()) < 1.6 * num_requests / len(fleet.ids)
    assert fleet.peak <= fleet.capacity
    assert fleet.loads < 0.2 * num_requests  # random placement over 4 replicas with room for 60 of 200 loads most


def test_a_hot_adapter_is_spread_and_a_cold_one_is_not():
    _, _, where, _ = _simulate(1.5)
    assert len(where["adapter-0"]) > 1
    spread = [len(replicas) for adapter, replicas in where.items() if int(adapter.split("-")[1]) > 100]
    assert sum(spread) / len(spread) < 1.8
