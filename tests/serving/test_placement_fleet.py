"""What a router knows of its replicas, against a naive model, in every order of events; and how calls come to lie."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from benchmarks.placement import World, received
from deployments.reports import HOST, VRAM, Report, pack
from deployments.router.fleet import Fleet
from tests.serving.test_placement import Clock, call

IDS = st.sampled_from(["r1", "r2", "r3"])
DIGESTS = st.integers(0, 3)


@dataclass
class Truth:
    """One replica as its reports have told it, and what this router did."""

    names: dict[int, int] = field(default_factory=dict)
    hints: set[int] = field(default_factory=set)
    followed: tuple[int, int] | None = None
    reported: int = 0
    change: int = 0
    own: int = 0
    is_lost: bool = False


class EveryOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet(now_s=Clock())
        self.members: dict[str, Truth] = {}
        self.strangers: dict[str, Truth] = {}

    @rule(ids=st.sets(IDS))
    def serve_names_its_replicas(self, ids: set[str]) -> None:
        self.fleet.on_members(ids)
        self.members = {name: self.members.get(name) or self.strangers.pop(name, None) or Truth() for name in ids}

    @rule(
        name=IDS, epoch=st.integers(1, 2), number=st.integers(0, 3), load=st.integers(0, 5), is_full=st.booleans(),
        names=st.dictionaries(DIGESTS, st.sampled_from((HOST, VRAM))), lost=st.sets(DIGESTS),
        hints=st.sets(DIGESTS), lost_hints=st.sets(DIGESTS),
    )  # fmt: skip
    def a_report_comes(
        self, name: str, epoch: int, number: int, load: int, is_full: bool, names: dict[int, int], lost: set[int],
        hints: set[int], lost_hints: set[int],
    ) -> None:  # fmt: skip
        report = Report(
            epoch=epoch, number=number, load=load, capacity=4, is_full=is_full, names=tuple(names.items()),
            lost_names=tuple(lost), hints=tuple(hints), lost_hints=tuple(lost_hints),
        )  # fmt: skip
        truth = self.members.get(name) or self.strangers.get(name)
        understood = self.fleet.on_report(name, pack(report))
        if truth is None and not is_full:
            assert understood, "nobody is asked for what is not wanted"
            return
        assert understood == (is_full or (truth is not None and truth.followed == (epoch, number - 1)))
        if not understood:
            return
        if truth is None:
            truth = self.strangers[name] = Truth()
        if is_full:
            truth.names, truth.hints = {}, set()
        truth.names = {digest: tier for digest, tier in truth.names.items() if digest not in lost} | names
        truth.hints = (truth.hints - lost_hints) | hints
        truth.followed, truth.reported, truth.change, truth.is_lost = (epoch, number), load, 0, False

    @rule(name=IDS, load=st.integers(0, 5))
    def a_load_is_told(self, name: str, load: int) -> None:
        self.fleet.on_load(name, load, 4)
        if (truth := self.members.get(name)) is not None:
            truth.reported, truth.change, truth.is_lost = load, 0, False

    @rule(name=IDS)
    def a_connection_breaks(self, name: str) -> None:
        self.fleet.on_lost(name)
        self.strangers.pop(name, None)
        if (truth := self.members.get(name)) is not None:
            truth.names, truth.hints, truth.followed, truth.is_lost = {}, set(), None, True

    @rule(name=IDS)
    def a_call_is_sent(self, name: str) -> None:
        self.fleet.sent(name)
        if (truth := self.members.get(name)) is not None:
            truth.own, truth.change = truth.own + 1, truth.change + 1

    @rule(name=IDS)
    def a_call_ends(self, name: str) -> None:
        self.fleet.ended(name)
        if (truth := self.members.get(name)) is not None and truth.own > 0:
            truth.own, truth.change = truth.own - 1, truth.change - 1

    @rule(name=IDS, data=st.binary(max_size=60))
    def bytes_come_that_are_no_report(self, name: str, data: bytes) -> None:
        assert not self.fleet.on_report(name, b"\x00" + data)

    @invariant()
    def the_indices_say_what_the_reports_said(self) -> None:
        index = self.fleet._index
        for digest in range(4):
            for told, kind in ((index.names, "names"), (index.hints, "hints")):
                holders = [known.replica_id for known in told[digest].members] if digest in told else []
                assert sorted(holders) == sorted(
                    name for name, truth in self.members.items() if digest in getattr(truth, kind)
                )
                assert digest not in told or holders, "what nobody holds takes no room"

    @invariant()
    def loads_and_sums_are_right(self) -> None:
        fleet = self.fleet
        assert fleet.members == tuple(sorted(self.members))
        loads = {name: max(truth.reported + truth.change, truth.own) for name, truth in self.members.items()}
        assert {known.replica_id: known.load for known in fleet._members} == loads
        assert fleet._total_load == sum(loads.values())
        assert fleet._total_capacity == sum(known.capacity for known in fleet._members)
        for known in fleet._members:
            share = float("inf") if self.members[known.replica_id].is_lost else known.load / known.capacity
            assert fleet._shares[known.slot] == share
            assert known.names == self.members[known.replica_id].names

    @invariant()
    def everyone_can_be_reached_and_the_lost_come_last(self) -> None:
        order = self.fleet.place(call())
        assert sorted(order) == sorted(self.members)
        lost = [self.members[name].is_lost for name in order]
        assert lost == sorted(lost)


EveryOrder.TestCase.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)
TestEveryOrder = EveryOrder.TestCase


@pytest.mark.parametrize("num_routers", [1, 4])
@pytest.mark.parametrize("in_flight", [8.0, 16.0])
def test_load_is_even_for_the_base_and_then_for_one_adapter(num_routers: int, in_flight: float) -> None:
    world = World(64, num_routers)
    for adapter in (None, "one"):
        ratios = world.run(adapter, in_flight=in_flight, for_s=12.0, mean_s=4.0)[80:]
        assert statistics.fmean(ratios) <= 1.5, adapter


def test_a_hot_adapter_spreads_and_goes_home_when_it_is_cold_again() -> None:
    world = World(64)
    world.run("hot", in_flight=8.0, for_s=5.0)
    assert len(world.sent["hot"]) > 32
    world.run(None, in_flight=8.0, for_s=60.0)
    world.sent.clear()
    for _ in range(20):
        world._send("hot", 0.01)
        world.run(None, in_flight=8.0, for_s=0.2)
    assert len(world.sent["hot"]) <= 3, "a copy here and there that is not used is dropped in time"


def test_cold_adapters_have_one_replica_each_whichever_router_is_asked() -> None:
    world = World(200, num_routers=4)
    world.run(None, in_flight=2.0, for_s=2.0)
    for number in range(200):
        world._send(f"adapter-{number % 50}", 0.01)
    assert sum(len(where) for name, where in world.sent.items()) <= 55


def test_what_a_router_hears_of_a_thousand_replicas_is_bounded() -> None:
    assert received(50, seconds=6, num_names=100)["bytes_per_s"] * 20 <= 200_000
