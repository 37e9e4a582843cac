"""Leases follow what the engine holds, in whatever order its threads and the event loop take turns.

The real engine, scheduler, `AsyncEngine` and `HeldAdapters`; a scheduler of our own decides who is next.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import Any

import numpy as np
import pytest

from adapter_store.records import AdapterRecord, Lease
from deployments.replica.held import HeldAdapters
from engine.aio.owners import AdapterNews
from engine.errors import EngineError
from tests.engine_api.alphabet import SPEC, AlphabetRunner, make_engine, make_request
from tests.support.interleave import MAX_STEPS, SteppedEngine, SteppedLoop, World, explore, running_in

MANIFEST: dict[str, Any] = {
    "format": 1, "spec": SPEC.digest, "dtype": "float32", "num_bytes": 0, "rank": 0, "entries": []
}  # fmt: skip
MANY = 40_000  # schedules of one scenario: more would take minutes


class Leases:
    """A store that answers at once: which numbers of leases are out, by version."""

    def __init__(self) -> None:
        self.out: dict[str, int] = {}
        self._next = 0

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        return AdapterRecord(name=name, source="local", version=name)

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        self._next += 1
        self.out[name] = self._next
        lease = Lease(
            name=name, version=name, source="local", owner="r", spec_digest=SPEC.digest, manifest=MANIFEST, image=None,
            num_bytes=0, rank=0, ttl_s=30.0, number=self._next,
        )  # fmt: skip
        return lease, np.zeros(0, np.uint8)

    async def lease_again(self, lease: Lease) -> Lease:
        return (await self.lease(lease.name, lease.source, lease.version))[0]

    async def release(self, lease: Lease) -> None:
        if self.out.get(lease.version) == lease.number:
            del self.out[lease.version]

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        return tuple(lease.version for lease in leases if lease.version not in self.out)


class Scenario:
    """A replica in steps. `room`: so many adapters fit on the device."""

    def __init__(self, held_as: type[HeldAdapters] = HeldAdapters, *, room: int = 1, reads_set: bool = False) -> None:
        self.loop = SteppedLoop()
        self.store, self.runner = Leases(), AlphabetRunner()
        with running_in(self.loop):
            self.held = held_as(self.store, SPEC, refresh_s=60.0)
        self.inner = make_engine(self.runner, max_resident_adapters=room)
        self.engine = SteppedEngine(self.inner, image_owner=self.held)
        self.engine._prepare = self._prepared  # type: ignore[method-assign]  # a thread would read the image in
        self.reads_set = reads_set
        self._had: set[str] = set()
        self.tasks: list[asyncio.Task[None]] = []
        self.order: tuple[str, ...] = ()  # of "NAME read" and "NAME dropped"
        self.world = World(self.loop, self.engine, check=self.check, check_end=self.check_end)

    async def _prepared(self, image: Any) -> None:
        await asyncio.sleep(0)

    def ask(self, name: str, *, max_tokens: int = 1, prompt: str = "a", leave_after: int | None = None) -> None:
        """A request, whose reader leaves after so many deltas (None: with the last)."""
        self.tasks.append(self.loop.create_task(self._ask(name, max_tokens, prompt, leave_after)))

    async def _ask(self, name: str, max_tokens: int, prompt: str, leave_after: int | None) -> None:
        with suppress(EngineError):
            async with self.held.borrowed(name, None, None) as held:
                request = make_request(f"r{len(self.tasks)}", prompt, name, max_tokens=max_tokens)
                stream: Any = self.engine.generate(request, held.image)
                async with aclosing(stream) as deltas:
                    num_left = leave_after
                    while num_left != 0:
                        try:
                            await anext(deltas)
                        except StopAsyncIteration:
                            break
                        if self.reads_set:
                            held.in_engine = True
                        self.order += (f"{name} read",)
                        num_left = None if num_left is None else num_left - 1

    def preload(self, name: str) -> None:
        self.tasks.append(self.loop.create_task(self._preload(name)))

    async def _preload(self, name: str) -> None:
        with suppress(EngineError):
            async with self.held.borrowed(name, None, None) as held:
                await self.engine.preload(held.image)

    def cancel(self, number: int) -> None:
        self.tasks[number].cancel()

    def break_device(self) -> None:
        self.runner.result_error = RuntimeError("the device is lost")

    def check(self) -> None:
        """The engine never holds an image whose bytes the store may let go."""
        for key in self._had - self.inner._images:
            self.order += (f"{key} dropped",)
        self._had = set(self.inner._images)
        if self.engine.is_alive:
            without = self.inner._images - set(self.store.out)
            assert not without, f"the engine holds images without a lease: {without}"

    def check_end(self) -> None:
        assert all(task.done() for task in self.tasks), "somebody waits for ever"
        holds = set(self.inner._images) if self.engine.is_alive else set()
        assert set(self.store.out) == holds, f"leases on {set(self.store.out)}, the engine holds {holds}"
        assert set(self.held.versions) == holds
        for held in self.held._held.values():
            assert (held.users, held.offers, held.in_engine) == (0, 0, True)


def _one_request(s: Scenario) -> None:
    s.ask("k1")


def _a_reader_that_leaves_at_once(s: Scenario) -> None:
    s.ask("k1", leave_after=0)
    s.ask("k2")


def _a_reader_that_leaves_midway(s: Scenario) -> None:
    s.ask("k1", max_tokens=3, leave_after=1)


def _a_caller_that_is_cancelled(s: Scenario) -> None:
    s.ask("k1", max_tokens=2)
    s.world.events = [lambda: s.cancel(0)]


def _two_requests_of_one_adapter(s: Scenario) -> None:
    s.ask("k1")
    s.world.events = [lambda: s.ask("k1")]


def _two_requests_of_one_adapter_one_is_cancelled(s: Scenario) -> None:
    s.ask("k1")
    s.ask("k1")
    s.world.events = [lambda: s.cancel(1)]


def _two_adapters_in_room_for_one(s: Scenario) -> None:
    s.ask("k1")
    s.ask("k2")


def _an_adapter_that_comes_back(s: Scenario) -> None:
    s.ask("k1")
    s.world.events = [lambda: s.ask("k2"), lambda: s.ask("k1")]


def _a_preload(s: Scenario) -> None:
    s.preload("k1")


def _a_preload_that_is_cancelled(s: Scenario) -> None:
    s.preload("k1")
    s.world.events = [lambda: s.cancel(0)]


def _a_preload_beside_a_request_of_it(s: Scenario) -> None:
    s.preload("k1")
    s.ask("k1")


def _a_preload_without_room_and_again(s: Scenario) -> None:
    s.ask("k1")
    s.world.events = [lambda: s.preload("k2"), lambda: s.preload("k2")]


def _a_preload_without_room_beside_a_request_of_it(s: Scenario) -> None:
    s.ask("k1")
    s.world.events = [lambda: s.preload("k2"), lambda: s.ask("k2")]


def _a_refused_request(s: Scenario) -> None:
    s.ask("k1", prompt="a" * 500)


def _a_refused_request_beside_a_good_one(s: Scenario) -> None:
    s.ask("k1", prompt="a" * 500)
    s.ask("k1")


def _a_device_that_dies(s: Scenario) -> None:
    s.ask("k1", max_tokens=2)
    s.world.events = [s.break_device]


def _a_watchdog_that_ends_it(s: Scenario) -> None:
    s.ask("k1")
    s.world.events = [lambda: s.engine._die("a step took too long"), lambda: s.ask("k1")]


def _an_engine_that_is_closed(s: Scenario) -> None:
    s.ask("k1")
    s.preload("k2")
    s.world.events = [s.engine.shut]


SCENARIOS = [
    _one_request, _a_reader_that_leaves_at_once, _a_reader_that_leaves_midway, _a_caller_that_is_cancelled,
    _two_requests_of_one_adapter, _two_requests_of_one_adapter_one_is_cancelled, _two_adapters_in_room_for_one,
    _an_adapter_that_comes_back, _a_preload, _a_preload_that_is_cancelled, _a_preload_beside_a_request_of_it,
    _a_preload_without_room_and_again, _a_preload_without_room_beside_a_request_of_it, _a_refused_request,
    _a_refused_request_beside_a_good_one, _a_device_that_dies, _a_watchdog_that_ends_it, _an_engine_that_is_closed,
]  # fmt: skip


def _walk(begin: Callable[[Scenario], None], max_preemptions: int, **fields: Any) -> int:
    def make() -> World:
        scenario = Scenario(**fields)
        with running_in(scenario.loop):
            begin(scenario)
        return scenario.world

    number = 0
    for number in explore(make, max_preemptions):
        assert number < MANY, "too many schedules: make the scenario smaller"
    return number


# Interruptions of whoever could have gone on; the others are walked through without such a bound.
BOUNDED = {
    _two_requests_of_one_adapter: 2,
    _two_requests_of_one_adapter_one_is_cancelled: 2,
    _an_adapter_that_comes_back: 1,
    _a_preload_without_room_and_again: 1,
    _a_preload_without_room_beside_a_request_of_it: 1,
    _a_watchdog_that_ends_it: 1,
    _an_engine_that_is_closed: 1,
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL + 1)  # thousands of engines die here


@pytest.mark.parametrize("begin", SCENARIOS)
def test_in_every_order_of_events_the_leases_are_what_the_engine_holds(begin: Callable[[Scenario], None]) -> None:
    assert _walk(begin, BOUNDED.get(begin, MAX_STEPS)) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("begin", BOUNDED)
def test_with_more_interruptions_the_leases_are_what_the_engine_holds(begin: Callable[[Scenario], None]) -> None:
    assert _walk(begin, BOUNDED[begin] + 1) > 100


def test_orders_that_matter_are_among_those_that_are_tried() -> None:
    """A reader may come to its answer before and after the engine has dropped the adapter again."""
    seen: set[tuple[str, ...]] = set()

    def make() -> World:
        scenario = Scenario()
        with running_in(scenario.loop):
            _two_adapters_in_room_for_one(scenario)
        scenario.world.check_end = lambda: seen.add(tuple(event for event in scenario.order if "k1" in event))
        return scenario.world

    assert sum(1 for _ in explore(make, MAX_STEPS)) > 50
    assert {("k1 read", "k1 dropped"), ("k1 dropped", "k1 read")} <= seen


def test_a_flag_that_readers_set_about_the_engine_is_found_out() -> None:
    """As it once was: who reads an answer notes that the engine has the adapter; only the end is told."""

    class SetByReaders(HeldAdapters):
        def offered(self, key: str) -> None:
            pass

        def _on_news(self, news: AdapterNews) -> None:
            super()._on_news(AdapterNews(changes=tuple(change for change in news.changes if not change[1])))

    with pytest.raises(AssertionError, match=r"the engine holds") as caught:
        _walk(_two_adapters_in_room_for_one, MAX_STEPS, held_as=SetByReaders, reads_set=True)
    assert "schedule" in caught.value.__notes__[0]
