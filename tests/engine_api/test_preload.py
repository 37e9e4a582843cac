"""Adapters without a request: preloaded, pinned, counted."""

from __future__ import annotations

import asyncio
import threading

import pytest

from engine.aio.async_engine import AsyncEngine
from engine.core.plan import AdapterEvict, AdapterLoad
from engine.errors import AdapterError, EngineDead
from tests.engine_api.alphabet import AlphabetRunner, make_engine, make_image, make_request, run
from tests.engine_api.async_help import Owner, wait_for
from tests.support.waiting import until, until_async


def test_a_preloaded_adapter_is_resident_before_its_first_request() -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner)
    engine.preload(make_image("k1"))
    run(engine)
    assert engine.stats().resident_adapters == ("k1",)
    assert engine.stats().total_adapter_loads == 1
    engine.add_request(make_request("one", adapter="k1"))
    assert run(engine) == {("one", 0): "cegikmoq"}
    assert sum(isinstance(op, AdapterLoad) for plan in runner.plans for op in plan.adapter_ops) == 1


def test_a_preload_without_room_changes_nothing_and_lets_the_image_go() -> None:
    engine = make_engine(max_resident_adapters=1)
    engine.preload(make_image("k1"))
    engine.preload(make_image("k2"))
    run(engine)
    assert engine.stats().resident_adapters == ("k1",)
    assert engine.adapter_changes() == (("k1", True), ("k2", True), ("k2", False))


def test_pinned_adapters_are_told_and_not_evicted() -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner)
    engine.preload(make_image("k0"))
    engine.pin_adapter("k0")
    for i in range(1, 5):
        engine.add_request(make_request(str(i), adapter=f"k{i}"), make_image(f"k{i}"))
    run(engine)
    assert engine.stats().pinned_adapters == ("k0",)
    evicted = [op.adapter for plan in runner.plans for op in plan.adapter_ops if isinstance(op, AdapterEvict)]
    assert len(evicted) == engine.stats().total_adapter_evictions == 3
    assert "k0" not in evicted


def test_preload_and_pin_may_be_asked_of_a_running_engine() -> None:
    engine = AsyncEngine(make_engine())
    asyncio.run(engine.preload(make_image("k1")))
    engine.pin_adapter("k1")
    with pytest.raises(AdapterError, match="'k2' cannot be pinned: it is not resident"):
        engine.pin_adapter("k2")
    asyncio.run(engine.preload(make_image("k3")))
    with pytest.raises(AdapterError, match="'k3' cannot be pinned"):
        engine.pin_adapter("k3")  # as many pins as slots would leave no slot for others
    engine.unpin_adapter("k1")
    engine.pin_adapter("k3")
    until(lambda: engine.stats().pinned_adapters == ("k3",), "k3 to be the one that is pinned")
    engine.close()
    with pytest.raises(EngineDead):
        engine.pin_adapter("k3")


def test_whoever_preloads_hears_of_an_image_that_the_engine_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, owner = make_engine(), Owner()

    def refuse(key: str, *_: object) -> None:
        raise AdapterError(f"{key!r} is not what it was")

    monkeypatch.setattr(engine._scheduler, "add_adapter", refuse)
    running = AsyncEngine(engine, image_owner=owner)

    async def main() -> None:
        await running.preload(make_image("k1"))
        await until_async(lambda: len(owner.events) == 2, "two events for the owner of the image")

    wait_for(main())
    assert owner.events == [("offered", "k1"), ("answered", "k1")]
    assert running.is_alive
    running.close()
    with pytest.raises(EngineDead):
        asyncio.run(running.preload(make_image("k1")))
    assert len(owner.events) == 2, "what is refused at the door was never offered"


def test_a_closed_engine_copies_nothing_any_more() -> None:
    runner = AlphabetRunner()
    engine = AsyncEngine(make_engine(runner))
    engine.start()
    assert not runner.is_closed
    engine.close()
    assert runner.is_closed


def test_a_dead_engine_is_not_waited_for() -> None:
    """Its device may hang, and whatever still copies to it with it."""
    runner, died = AlphabetRunner(result_error=RuntimeError("device lost")), threading.Event()
    engine = AsyncEngine(make_engine(runner), on_death=lambda _reason: died.set())
    asyncio.run(engine.preload(make_image("k1")))
    assert died.wait(60)
    engine.close()
    assert not runner.is_closed
