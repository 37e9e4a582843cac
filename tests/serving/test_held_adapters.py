"""Which adapter images a replica holds, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound, AdapterVersionGone
from adapter_store.records import AdapterRecord, Lease
from deployments.calls import Fault, Refused
from deployments.replica.held import HeldAdapters
from engine.aio.owners import AdapterNews
from engine.errors import AdapterImageInvalid
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterManifest
from tests.support.store_world import turns
from tests.support.waiting import within

SPEC = ImageSpec(base_fingerprint="x", dtype="float32", sites=())
MANIFEST: dict[str, Any] = {
    "format": 1, "spec": SPEC.digest, "dtype": "float32", "num_bytes": 0, "rank": 0, "entries": []
}  # fmt: skip


@dataclass
class FakeStore:
    version: str = "v1"
    away: bool = False
    gone: bool = False  # what was lost cannot be had again
    leases: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    pause: asyncio.Event | None = None
    resolved: int = 0
    lost: set[str] = field(default_factory=set)
    beats: list[tuple[str, ...]] = field(default_factory=list)

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        self.resolved += 1
        self._check(name)
        return AdapterRecord(name=name, source="local", version=self.version)

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        self._check(name)
        if self.pause is not None:
            await within(self.pause.wait(), "the test to end the pause")
        version = version or self.version
        self.leases.append(version)
        lease = Lease(
            name=name, version=version, source="local", owner="r", spec_digest=SPEC.digest, manifest=MANIFEST,
            image=None, num_bytes=0, rank=0, ttl_s=30.0,
        )  # fmt: skip
        return lease, np.zeros(0, np.uint8)

    async def release(self, lease: Lease) -> None:
        self.released.append(lease.version)

    async def lease_again(self, lease: Lease) -> Lease:
        if self.gone:
            raise AdapterVersionGone(lease.name, lease.version)
        return (await self.lease(lease.name, lease.source, lease.version))[0]

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        versions = tuple(lease.version for lease in leases)
        self.beats.append(versions)
        if self.pause is not None:
            await within(self.pause.wait(), "the test to end the pause")
        return tuple(version for version in versions if version in self.lost)

    def _check(self, name: str) -> None:
        if self.away:
            raise Refused(Fault(code="store_unavailable", message="away"))
        if name == "missing":
            raise AdapterNotFound(name, ("local",))


@dataclass
class Rig:
    store: FakeStore
    held: HeldAdapters
    now_s: float = 0.0

    async def use(self, name: str = "a", version: str | None = None, *, accepted: bool = True) -> str:
        async with self.held.borrowed(name, None, version) as held:
            self.held.offered(held.version)
            changes = ((held.version, True),) * accepted
            self.held.told(AdapterNews(changes=changes, answered=(held.version,)))
            return held.version

    async def drop(self, version: str) -> None:
        self.held.told(AdapterNews(changes=((version, False),)))
        await turns()


def _run(test: Callable[[Rig], Awaitable[None]]) -> None:
    async def main() -> None:
        rig = Rig(FakeStore(), None)  # type: ignore[arg-type]
        rig.held = HeldAdapters(rig.store, SPEC, refresh_s=5.0, clock=lambda: rig.now_s)
        await test(rig)

    asyncio.run(main())


def test_a_held_version_is_leased_once_and_released_when_the_engine_drops_it():
    async def test(rig: Rig) -> None:
        for _ in range(3):
            assert await rig.use() == "v1"
        assert rig.store.leases == ["v1"]
        assert rig.held.versions == ("v1",)
        await rig.drop("v1")
        assert (rig.held.versions, rig.store.released) == ((), ["v1"])

    _run(test)


def test_a_version_that_comes_back_has_its_manifest_checked_once(monkeypatch: pytest.MonkeyPatch):
    checked: list[object] = []
    check = AdapterManifest.from_dict
    monkeypatch.setattr(AdapterManifest, "from_dict", lambda *args: checked.append(args) or check(*args))

    async def test(rig: Rig) -> None:
        for version in ("v1", "v2", "v1"):
            await rig.use(version=version, accepted=False)
        assert rig.store.leases == ["v1", "v2", "v1"]
        assert len(checked) == 2

    _run(test)


def test_a_version_in_use_is_not_released_until_its_last_user_is_gone():
    async def test(rig: Rig) -> None:
        async with rig.held.borrowed("a", None, None):
            await rig.drop("v1")
            assert rig.store.released == []
        await turns()
        assert rig.store.released == ["v1"]

    _run(test)


def test_a_version_that_the_engine_never_took_is_released_at_once():
    async def test(rig: Rig) -> None:
        await rig.use(accepted=False)
        await turns()
        assert rig.store.released == ["v1"]

    _run(test)


def test_a_new_upload_is_used_after_refresh_and_the_old_version_can_still_be_asked_for():
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.version = "v2"
        assert await rig.use() == "v1"
        rig.now_s = 6.0
        assert await rig.use() == "v2"
        assert await rig.use(version="v1") == "v1"
        assert rig.store.leases == ["v1", "v2"]

    _run(test)


def test_a_name_in_steady_use_is_asked_for_ahead_of_time_so_that_no_request_waits_for_the_store():
    async def test(rig: Rig) -> None:
        await rig.use()
        for now_s in (1.0, 3.0, 3.1, 5.5, 8.0, 8.1):
            rig.now_s = now_s
            before = rig.store.resolved
            assert await rig.use() == "v1"
            assert rig.store.resolved == before, "the request itself asked nothing"
            await turns()
        assert rig.store.resolved == 3, "at 3.0, 5.5 and 8.0: once in each second half"

    _run(test)


def test_what_was_learnt_ahead_of_time_counts_from_the_next_request_on():
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.version, rig.now_s = "v2", 3.0
        assert await rig.use() == "v1"
        await turns()
        assert await rig.use() == "v2"

    _run(test)


def test_a_store_that_is_away_when_it_is_asked_ahead_of_time_changes_nothing():
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.away, rig.now_s = True, 3.0
        for _ in range(2):
            assert await rig.use() == "v1"
            await turns()
        assert rig.store.leases == ["v1"]

    _run(test)


def test_held_versions_are_served_while_the_store_is_away_and_others_are_not():
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.away = True
        rig.now_s = 100.0
        assert await rig.use() == "v1"
        with pytest.raises(Refused):
            await rig.use("b")

    _run(test)


def test_many_requests_for_a_cold_adapter_make_one_lease_and_one_that_leaves_stops_nobody():
    async def test(rig: Rig) -> None:
        rig.store.pause = asyncio.Event()
        waiting = [asyncio.ensure_future(rig.use()) for _ in range(5)]
        await turns()
        waiting[0].cancel()
        rig.store.pause.set()
        assert await asyncio.gather(*waiting[1:]) == ["v1"] * 4
        assert rig.store.leases == ["v1"]

    _run(test)


def test_a_lease_that_nobody_waits_for_any_more_is_given_back():
    async def test(rig: Rig) -> None:
        rig.store.pause = asyncio.Event()
        waiting = asyncio.ensure_future(rig.use())
        await turns()
        waiting.cancel()
        rig.store.pause.set()
        await turns()
        assert rig.store.released == ["v1"]

    _run(test)


def test_an_unknown_adapter_is_told_to_everyone_who_asked():
    async def test(rig: Rig) -> None:
        for _ in range(2):
            with pytest.raises(AdapterNotFound):
                await rig.use("missing")

    _run(test)


def test_a_lease_that_the_store_has_lost_is_taken_again_and_the_engine_keeps_its_bytes():
    async def test(rig: Rig) -> None:
        await rig.use()
        before = rig.held._held["v1"].image
        rig.store.lost = {"v1"}
        await rig.held.beat()
        assert rig.store.leases == ["v1", "v1"]
        assert rig.held._held["v1"].image is before
        await rig.drop("v1")
        assert rig.store.released == ["v1"]

    _run(test)


def test_a_lost_lease_that_cannot_be_had_again_takes_nothing_from_the_engine(caplog: pytest.LogCaptureFixture):
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.lost = {"v1"}
        rig.store.away = True
        await rig.held.beat()  # it may come back: asked for again with the next beat
        rig.store.away, rig.store.gone = False, True
        await rig.held.beat()  # it never comes back: served to the end, and no beat names it any more
        await rig.held.beat()
        assert rig.store.beats == [("v1",), ("v1",), ()]
        assert await rig.use() == "v1"
        await rig.drop("v1")
        assert rig.held.versions == ()

    _run(test)


def test_a_lease_that_was_given_back_during_a_beat_is_not_taken_again():
    async def test(rig: Rig) -> None:
        await rig.use()
        rig.store.lost, rig.store.pause = {"v1"}, asyncio.Event()
        beat = asyncio.ensure_future(rig.held.beat())
        await asyncio.sleep(0)
        await rig.drop("v1")
        rig.store.pause.set()
        await beat
        await rig.held.settled()
        assert rig.store.leases == rig.store.released, "what was leased too late is given back at once"

    _run(test)


def test_an_image_that_cannot_be_read_is_given_back_at_once(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> AdapterManifest:
        raise AdapterImageInvalid("of another layout")

    monkeypatch.setattr(AdapterManifest, "from_dict", broken)

    async def test(rig: Rig) -> None:
        with pytest.raises(AdapterImageInvalid):
            await rig.use()
        await rig.held.settled()
        assert rig.store.released == ["v1"]

    _run(test)


def test_the_names_in_use_are_remembered_however_many_others_come(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.replica.held.MAX_NAMES", 4)

    async def test(rig: Rig) -> None:
        await rig.use("hot")
        for i in range(20):
            await rig.use(f"tail{i}")
            before = rig.store.resolved
            assert await rig.use("hot") == "v1"
            assert rig.store.resolved == before, "the hot name was forgotten, and had to be asked for"
        assert len(rig.held._meanings) == 4
        known = set(rig.held._meanings)
        for name, source in list(known - {("hot", None)}) * 3:
            rig.held._mean(name, source, "v1")  # what is known already puts nobody out
        assert set(rig.held._meanings) == known

    _run(test)
