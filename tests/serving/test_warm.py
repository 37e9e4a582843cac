"""What a replica brings in before anybody asks, with stand-ins for the engine and the store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound, SourceUnavailable
from adapter_store.records import AdapterRecord, Lease
from deployments.replica.held import HeldAdapters
from deployments.replica.warm import Warmer
from engine.aio.owners import AdapterNews, ImageOwner
from engine.errors import AdapterError
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage
from tests.support.store_world import turns
from tests.support.waiting import until_async

SPEC = ImageSpec(base_fingerprint="x", dtype="float32", sites=())
MANIFEST: dict[str, Any] = {
    "format": 1, "spec": SPEC.digest, "dtype": "float32", "num_bytes": 0, "rank": 0, "entries": []
}  # fmt: skip


@dataclass
class FakeStore:
    """Its names, each with what it means now."""

    versions: dict[str, str]
    warm: tuple[str, ...] = ()
    fault: Exception | None = None
    budgets: list[int] = field(default_factory=list)
    released: list[str] = field(default_factory=list)

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        return self._record(name)

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        lease = Lease(
            name=name, version=version or str(self._record(name).version), source="local", owner="r",
            spec_digest=SPEC.digest, manifest=MANIFEST, image=None, num_bytes=0, rank=0, ttl_s=30.0,
        )  # fmt: skip
        return lease, np.zeros(0, np.uint8)

    async def release(self, lease: Lease) -> None:
        self.released.append(lease.version)

    async def lease_again(self, lease: Lease) -> Lease:
        return lease

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        return ()

    async def warm_set(self, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        self.budgets.append(budget_bytes)
        if self.fault is not None:
            raise self.fault
        return tuple(AdapterRecord(name=name, source="local", version=f"{name}-1") for name in self.warm)

    def _record(self, name: str) -> AdapterRecord:
        if name not in self.versions:
            raise AdapterNotFound(name, ("local",))
        return AdapterRecord(name=name, source="local", version=self.versions[name])


@dataclass
class FakeDevice:
    """Takes so many images, a moment after it was asked; `refused` are versions that break it."""

    room: int = 100
    refused: tuple[str, ...] = ()
    never: tuple[str, ...] = ()  # are neither loaded nor dropped
    owner: ImageOwner | None = None
    loaded: list[str] = field(default_factory=list)
    loading: str | None = None
    pinned: set[str] = field(default_factory=set)

    async def preload(self, image: AdapterImage) -> None:
        assert self.owner is not None
        assert self.loading is None, "one at a time"
        if image.key in self.refused:
            raise AdapterError(f"{image.key} is broken")
        self.owner.offered(image.key)
        if image.key in self.never:
            return
        has_room = len(self.loaded) < self.room
        changes = ((image.key, True),) if has_room else ((image.key, True), (image.key, False))
        self.owner.told(AdapterNews(changes=changes, answered=(image.key,)))
        if has_room:
            self.loading = image.key

    def stats(self) -> Any:
        resident = tuple(self.loaded)
        if self.loading is not None:
            self.loaded.append(self.loading)
            self.loading = None
        return SimpleNamespace(resident_adapters=resident)

    def pin_adapter(self, key: str) -> None:
        assert key in self.loaded
        self.pinned.add(key)

    def unpin_adapter(self, key: str) -> None:
        self.pinned.remove(key)


@dataclass
class Rig:
    store: FakeStore
    device: FakeDevice
    held: HeldAdapters
    warmer: Warmer
    now_s: float = 0.0


def _run(
    test: Callable[[Rig], Awaitable[None]],
    *,
    store: FakeStore | None = None,
    device: FakeDevice | None = None,
    pinned: tuple[str, ...] = (),
    budget_bytes: int = 1000,
) -> None:
    async def main() -> None:
        rig = Rig(store or FakeStore({"a": "a-1", "b": "b-1"}, ("a", "b")), device or FakeDevice(), None, None)  # type: ignore[arg-type]
        rig.held = HeldAdapters(rig.store, SPEC, refresh_s=5.0, clock=lambda: rig.now_s)
        rig.device.owner = rig.held
        rig.warmer = Warmer(
            rig.held, rig.device, rig.store, pinned=pinned, budget_bytes=budget_bytes, refresh_s=0.001, load_wait_s=0.05
        )  # fmt: skip
        await test(rig)

    asyncio.run(main())


def test_a_new_replica_begins_with_what_is_asked_for_and_holds_it_until_the_engine_drops_it():
    async def test(rig: Rig) -> None:
        await rig.warmer.warm_up()
        assert (rig.store.budgets, rig.device.loaded) == ([1000], ["a-1", "b-1"])
        assert (rig.held.names, rig.store.released) == (["a", "b"], [])
        rig.held.told(AdapterNews(changes=(("a-1", False),)))
        await turns()
        assert (rig.held.names, rig.store.released) == (["b"], ["a-1"])

    _run(test)


def test_it_stops_where_the_device_has_no_room_and_keeps_no_lease_on_what_did_not_fit():
    async def test(rig: Rig) -> None:
        await rig.warmer.warm_up()
        await turns()
        assert (rig.device.loaded, rig.held.names, rig.store.released) == (["a-1"], ["a"], ["b-1"])

    _run(test, store=FakeStore({}, ("a", "b", "c")), device=FakeDevice(room=1))


def test_an_adapter_that_cannot_be_brought_in_is_named_and_the_next_one_is(caplog: pytest.LogCaptureFixture):
    async def test(rig: Rig) -> None:
        with caplog.at_level(logging.WARNING):
            await rig.warmer.warm_up()
        await turns()
        assert (rig.device.loaded, rig.store.released) == (["b-1"], ["a-1"])
        assert "'a'" in caplog.text

    _run(test, device=FakeDevice(refused=("a-1",)))


def test_what_the_device_does_not_answer_is_waited_for_no_longer_than_a_while_and_held_until_it_does():
    async def test(rig: Rig) -> None:
        await rig.warmer.warm_up()
        await turns()
        assert (rig.device.loaded, rig.held.names, rig.store.released) == ([], ["a"], [])
        rig.held.told(AdapterNews(answered=("a-1",)))
        await turns()
        assert (rig.held.names, rig.store.released) == ([], ["a-1"])

    _run(test, device=FakeDevice(never=("a-1",)))


def test_without_a_store_or_a_budget_a_replica_begins_empty():
    async def test(rig: Rig) -> None:
        await rig.warmer.run()
        assert rig.device.loaded == []

    _run(test, store=FakeStore({}, ("a",), fault=SourceUnavailable("s3", "away")))
    untouched = FakeStore({}, ("a",))
    _run(test, store=untouched, budget_bytes=0)
    assert untouched.budgets == []


def test_pinned_names_are_on_the_device_before_anything_else_and_those_that_cannot_be_are_named(
    caplog: pytest.LogCaptureFixture,
):
    async def test(rig: Rig) -> None:
        with caplog.at_level(logging.WARNING):
            await rig.warmer.pin()
        assert (rig.device.pinned, rig.warmer.pinned) == ({"b-1"}, ["b"])
        assert "'missing'" in caplog.text
        await rig.warmer.warm_up()
        assert rig.device.loaded[0] == "b-1"

    _run(test, pinned=("missing", "b"))


def test_a_pinned_name_that_does_not_fit_is_named_and_not_held(caplog: pytest.LogCaptureFixture):
    async def test(rig: Rig) -> None:
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                await rig.warmer.pin()
        await turns()
        assert (rig.warmer.pinned, rig.held.names) == ([], [])
        assert caplog.text.count("'a'") == 1, "told once, not with every look"

    _run(test, device=FakeDevice(room=0), pinned=("a",))


def test_a_pinned_name_that_is_uploaded_again_or_late_is_pinned_as_it_is_then():
    async def test(rig: Rig) -> None:
        following = asyncio.ensure_future(rig.warmer.run())
        await until_async(lambda: rig.device.pinned == {"a-1"}, "the pin of a-1")
        rig.store.versions |= {"a": "a-2", "late": "late-1"}
        rig.now_s = 6.0
        await until_async(lambda: rig.device.pinned == {"a-2", "late-1"}, "the pins of a-2 and late-1")
        following.cancel()
        assert rig.warmer.pinned == ["a", "late"]

    _run(test, pinned=("a", "late"), budget_bytes=0)
