"""Several adapters as one on a replica: made once, held with its parts while the engine has it, within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound
from adapter_store.records import AdapterRecord, Lease
from deployments.calls import Fault, Part, Refused
from deployments.replica import merges
from deployments.replica.held import Held, HeldAdapters
from deployments.replica.merges import Merges
from engine.aio.owners import AdapterNews
from engine.errors import AdapterTooLarge, QueueFull
from tests.support.lora_images import linear_sites, pack_parts, random_weights, spec_of
from tests.support.store_world import turns
from tests.support.waiting import until_async, within

SPEC = spec_of(linear_sites((16, 24)))
RANKS = {"a": 2, "b": 3, "c": 4}
A, B = Part(name="a", weight=0.5), Part(name="b", weight=-2.0)
AB_BYTES = 5 * (16 + 24) * 4 + 32  # ranks 2 and 3 of a float32 site, each tensor at a multiple of 64


@dataclass
class FakeStore:
    upload: int = 1
    away: bool = False
    leased: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    beats: list[tuple[str, ...]] = field(default_factory=list)

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord:
        self._check(name)
        return AdapterRecord(name=name, source="local", version=f"{name}@{self.upload}")

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        self._check(name)
        version = version or f"{name}@{self.upload}"
        self.leased.append(version)
        manifest, data = pack_parts(SPEC, random_weights(SPEC.sites, RANKS[name], int(version[-1])))
        lease = Lease(
            name=name, version=version, source="local", owner="r", spec_digest=SPEC.digest, manifest=manifest,
            image=None, num_bytes=len(data), rank=RANKS[name], ttl_s=30.0,
        )  # fmt: skip
        return lease, np.frombuffer(data, np.uint8)

    async def release(self, lease: Lease) -> None:
        self.released.append(lease.version)

    async def lease_again(self, lease: Lease) -> Lease:
        return lease

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        versions = tuple(lease.version for lease in leases)
        self.beats.append(versions)
        return ()

    def _check(self, name: str) -> None:
        if self.away:
            raise Refused(Fault(code="store_unavailable", message="away"))
        if name not in RANKS:
            raise AdapterNotFound(name, ("local",))


@dataclass
class Rig:
    store: FakeStore
    held: HeldAdapters
    made: list[str]
    now_s: float = 0.0

    async def use(self, *parts: Part, pin: str | None = None, accepted: bool = True) -> Held:
        async with self.held.borrowed("merge:x", None, pin, parts) as held:
            self.held.offered(held.version)
            changes = ((held.version, True),) * accepted
            self.held.told(AdapterNews(changes=changes, answered=(held.version,)))
        await turns()
        return held

    async def drop(self, held: Held) -> None:
        self.held.told(AdapterNews(changes=((held.version, False),)))
        await turns()


def _run(test: Callable[[Rig], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, **limits: int) -> None:
    made: list[str] = []
    real = merges.merged

    def counted(key: str, *more: Any) -> Any:
        made.append(key)
        return real(key, *more)

    monkeypatch.setattr(merges, "merged", counted)

    async def main() -> None:
        rig = Rig(FakeStore(), None, made)  # type: ignore[arg-type]
        rig.held = HeldAdapters(rig.store, SPEC, refresh_s=5.0, merges=Merges(SPEC, **limits), clock=lambda: rig.now_s)
        await test(rig)

    asyncio.run(main())


def test_it_is_made_once_and_held_with_its_parts_until_the_engine_drops_it(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        held = [await rig.use(A, B) for _ in range(3)]
        assert len({one.version for one in held}) == len(rig.made) == 1
        assert (rig.store.leased, rig.store.released) == (["a@1", "b@1"], [])
        assert held[0].image.manifest.rank == 5
        await rig.held.beat()
        assert [set(beat) for beat in rig.store.beats] == [{"a@1", "b@1"}]  # it has no lease of its own
        await rig.drop(held[0])
        assert sorted(rig.store.released) == ["a@1", "b@1"]
        assert rig.held.versions == ()

    _run(test, monkeypatch)


def test_what_the_engine_never_took_goes_with_its_request(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        await rig.use(A, B, accepted=False)
        assert rig.held.versions == ()
        assert sorted(rig.store.released) == ["a@1", "b@1"]

    _run(test, monkeypatch)


def test_a_part_that_is_used_alone_too_stays_as_long_as_either_needs_it(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        both = await rig.use(A, B)
        async with rig.held.borrowed("a", None, None) as alone:
            await rig.drop(both)
            assert rig.store.released == ["b@1"]
            assert rig.held.versions == (alone.version,)
        await turns()
        assert rig.store.released == ["b@1", "a@1"]
        assert rig.store.leased == ["a@1", "b@1"]

    _run(test, monkeypatch)


def test_weights_order_and_versions_make_other_images(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        lists = [(A, B), (B, A), (A,), (A, A), (A, Part(name="b")), (A, B, Part(name="c", weight=0.0))]
        found = {(await rig.use(*parts)).version for parts in lists}
        rig.store.upload, rig.now_s = 2, 6.0
        found.add((await rig.use(A, B)).version)
        assert len(found) == len(rig.made) == len(lists) + 1

    _run(test, monkeypatch)


def test_a_cut_off_answer_goes_on_with_the_versions_that_it_began_with(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        before = await rig.use(A, B)
        assert before.pin == "a@1,b@1"
        await rig.drop(before)
        rig.store.upload = 2
        assert (await rig.use(A, B)).pin == "a@2,b@2"
        again = await rig.use(A, B, pin=before.pin)
        assert again.version == before.version
        assert again.image.data.tobytes() == before.image.data.tobytes()

    _run(test, monkeypatch)


def test_it_is_served_while_the_store_is_away(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        held = await rig.use(A, B)
        rig.store.away, rig.now_s = True, 60.0
        assert (await rig.use(A, B)).version == held.version
        with pytest.raises(Refused):
            await rig.use(A, Part(name="c"))

    _run(test, monkeypatch)


def test_a_part_that_is_missing_is_told_and_the_others_are_given_back(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        with pytest.raises(AdapterNotFound, match="nobody"):
            await rig.use(A, Part(name="nobody"), B)
        await turns()
        assert (rig.store.leased, rig.store.released) == (["a@1"], ["a@1"])
        assert rig.held.versions == ()

    _run(test, monkeypatch)


def test_many_who_ask_at_once_get_one_and_one_that_leaves_stops_nobody(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        tasks = [asyncio.ensure_future(rig.use(A, B)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await within(asyncio.gather(*tasks[1:]), "four requests for one merge")
        assert len({held.version for held in found}) == len(rig.made) == 1

    _run(test, monkeypatch)


def test_one_that_nobody_waits_for_any_more_gives_everything_back(monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        task = asyncio.ensure_future(rig.use(A, B))
        await until_async(lambda: rig.made, "the merge to begin", poll_s=0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until_async(lambda: not rig.held.versions, "the merge to be given up")
        await turns()
        assert sorted(rig.store.released) == ["a@1", "b@1"]

    _run(test, monkeypatch)


@pytest.mark.parametrize(
    ("limits", "told"), [({"max_rank": 4}, "max_rank=4"), ({"max_bytes": AB_BYTES - 1}, "max_adapter_bytes=")]
)
def test_more_than_one_adapter_may_be_is_refused(limits: dict[str, int], told: str, monkeypatch: pytest.MonkeyPatch):
    async def test(rig: Rig) -> None:
        with pytest.raises(AdapterTooLarge, match=told):
            await rig.use(A, B)
        assert (rig.made, rig.held.versions) == ([], ())
        await rig.use(A)

    _run(test, monkeypatch, **limits)


def test_what_waits_for_the_engine_takes_no_more_memory_than_it_may(monkeypatch: pytest.MonkeyPatch):
    """Each request may choose weights that nobody had before it."""

    async def test(rig: Rig) -> None:
        lists = [(A, Part(name="b", weight=float(i))) for i in range(1, 10)]
        async with rig.held.borrowed("m", None, None, lists[0]) as first, rig.held.borrowed("m", None, None, lists[1]):
            with pytest.raises(QueueFull, match=str(2 * AB_BYTES)):
                await rig.use(*lists[2])
            rig.held.offered(first.version)
            rig.held.told(AdapterNews(changes=((first.version, True),), answered=(first.version,)))
            await turns()
            await rig.use(*lists[2])  # the engine's own budget counts the first now
        for parts in lists:  # and one after the other all of them
            await rig.drop(await rig.use(*parts))

    _run(test, monkeypatch, waiting_bytes=2 * AB_BYTES)
