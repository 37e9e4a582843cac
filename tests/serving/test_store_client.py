"""Waiting for the adapter store, with a stand-in for its actor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, OwnerDiedError, RayActorError, RayTaskError

from adapter_store.errors import AdapterNotFound, SpecUnknown
from adapter_store.tiers.blobs import FileImage
from deployments.calls import Fault, Refused
from deployments.replica.replica import Replica
from deployments.store.client import StoreClient
from tests.support.waiting import until_async

SPEC = {"sites": []}


class _Answer:
    """Like an ObjectRef: the call is made whether or not anybody awaits it."""

    def __init__(self, outcome: Callable[[], Any]) -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[None, None, Any]:
        yield from asyncio.sleep(0).__await__()
        return self._outcome()


class FakeActor:
    """Each method answers with the next of its scripted outcomes; the last one is repeated."""

    def __init__(self, **outcomes: list[Any]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> Any:
            self.calls.append((method, *args))
            return _Answer(lambda: self._outcome(method))

        return SimpleNamespace(remote=remote)

    def _outcome(self, method: str) -> Any:
        outcomes = self.outcomes.get(method, [None])
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _client(actor: FakeActor, *, wait_s: float = 2.0, connect: Callable[[], Any] | None = None) -> StoreClient:
    return StoreClient([connect or (lambda: actor)], wait_s=wait_s, owner="r", spec=SPEC, digest="d")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.store.link.FIRST_PAUSE_S", 0.01)


def test_a_request_waits_for_a_store_that_restarts():
    actor = FakeActor(resolve=[RayActorError(), RayActorError(), "record"])
    connections: list[FakeActor] = []

    def connect() -> FakeActor:
        connections.append(actor)
        return actor

    assert asyncio.run(_client(actor, connect=connect).resolve("a")) == "record"
    assert len(connections) == 3, "a handle of a dead actor is never used again"


def test_a_store_that_stays_away_is_unavailable_and_not_waited_for_for_ever():
    actor = FakeActor(resolve=[RayActorError()])
    with pytest.raises(Refused) as caught:
        asyncio.run(_client(actor, wait_s=0.1).resolve("a"))
    assert caught.value.fault.code == "store_unavailable"


def test_a_restarted_store_is_told_the_spec_again():
    actor = FakeActor(acquire=[SpecUnknown("d"), SimpleNamespace(image="ref")])
    client = _client(actor)

    async def lease() -> None:
        await client.links[0].call("acquire", "a", "d", "r", None, None)

    asyncio.run(lease())
    assert [call[0] for call in actor.calls] == ["acquire", "register_spec", "acquire"]
    assert actor.calls[1] == ("register_spec", SPEC, "r")


def test_an_image_that_died_with_its_owner_is_leased_again(monkeypatch: pytest.MonkeyPatch):
    outcomes: list[Any] = [OwnerDiedError("00", None, ""), b"bytes"]  # type: ignore[arg-type]

    def get(_: Any, *, timeout: float) -> Any:
        assert timeout == 2.0
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr("ray.get", get)
    actor = FakeActor(acquire=[SimpleNamespace(image="ref")])
    _, data = asyncio.run(_client(actor).lease("a", None, "v1"))
    assert data == b"bytes"
    assert [call[0] for call in actor.calls] == ["acquire", "acquire"]
    assert actor.calls[0] == ("acquire", "a", "d", "r", "v1", None)


def test_an_error_of_the_store_is_told_at_once():
    actor = FakeActor(resolve=[AdapterNotFound("a", ("local",))])
    with pytest.raises(AdapterNotFound):
        asyncio.run(_client(actor).resolve("a"))
    assert len(actor.calls) == 1


def test_a_request_is_told_to_the_store_without_waiting_and_before_there_is_a_store_not_at_all():
    async def main() -> list[tuple[Any, ...]]:
        actor = FakeActor(status=["status"])
        client = _client(actor)
        client.expect("a", None)
        await client.start()
        for _ in range(3):
            client.expect("a", "s3")
        client.expect("b", None)
        assert client.links[0].telling is not None
        await client.links[0].telling
        return actor.calls

    told = ("expect_all", (("a", "s3", 3), ("b", None, 1)))
    assert asyncio.run(main()) == [("status",), ("register_spec", SPEC, "r"), told], "many requests, one call"


def test_a_store_that_died_is_told_of_requests_by_its_next_handle():
    dead, living = FakeActor(status=["status"], expect_all=[RayActorError()]), FakeActor()
    actors = iter((dead, living, living))

    async def main() -> None:
        client = _client(dead, connect=lambda: next(actors))
        await client.start()
        client.expect("a", None)
        assert client.links[0].telling is not None
        await client.links[0].telling
        assert living.calls == [("expect_all", (("a", None, 1),))]

    asyncio.run(main())


def test_what_fails_late_does_not_take_the_handle_from_who_found_the_next_one():
    dead, living = FakeActor(resolve=[RayActorError()]), FakeActor(resolve=["record"])
    actors = [dead, living]
    client = _client(dead, connect=lambda: actors.pop(0))

    async def main() -> None:
        assert await asyncio.gather(client.resolve("a"), client.resolve("b")) == ["record", "record"]
        assert actors == [], "one handle for both"

    asyncio.run(main())


class Node:
    """Where a client is, and an image in a file of another node."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
        monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "here"))
        monkeypatch.setattr("deployments.store.client.PART_BYTES", 1000)
        self.content = content
        self.asked: list[tuple[int, int]] = []

    def lease(self, node: str, path: str = "/nowhere") -> Any:
        image = FileImage(path, node)
        return SimpleNamespace(image=image, num_bytes=len(self.content), version="v", spec_digest="d", name="a")

    async def read(self, start: int, num_bytes: int) -> bytes | None:
        self.asked.append((start, num_bytes))
        return self.content[start : start + num_bytes]


@pytest.mark.parametrize("num_bytes", [1, 999, 1000, 1001, 25_000])
def test_an_image_in_a_file_of_another_node_comes_in_parts(num_bytes: int, monkeypatch: pytest.MonkeyPatch):
    node = Node(monkeypatch, bytes(i % 251 for i in range(num_bytes)))
    client = _client(FakeActor(acquire=[node.lease("there")]))
    call = client.links[0].call

    async def calls(method: str, *args: Any, **more: Any) -> Any:
        return await node.read(*args[2:]) if method == "read_image" else await call(method, *args, **more)

    monkeypatch.setattr(client.links[0], "call", calls)
    _, data = asyncio.run(client.lease("a", None, None))
    assert bytes(data) == node.content  # type: ignore[call-overload]
    assert data.ctypes.data % 64 == 0  # type: ignore[attr-defined]
    assert sum(size for _, size in node.asked) == num_bytes


@pytest.mark.parametrize("answer", [None, b"cut"])
def test_an_image_whose_file_goes_while_it_is_copied_is_leased_again(answer: Any, monkeypatch: pytest.MonkeyPatch):
    node = Node(monkeypatch, b"x" * 2500)
    monkeypatch.setattr("ray.get", lambda *_, **__: b"bytes")
    actor = FakeActor(acquire=[node.lease("there"), SimpleNamespace(image="ref")], read_image=[b"x" * 1000, answer])
    _, data = asyncio.run(_client(actor).lease("a", None, None))
    assert data == b"bytes"


def test_a_file_of_this_node_that_this_container_does_not_see_is_copied(monkeypatch: pytest.MonkeyPatch):
    node = Node(monkeypatch, b"x" * 500)
    actor = FakeActor(acquire=[node.lease("here")], read_image=[node.content])
    _, data = asyncio.run(_client(actor).lease("a", None, None))
    assert bytes(data) == node.content  # type: ignore[call-overload]


def test_an_image_that_is_a_file_is_mapped_and_one_that_is_gone_is_leased_again(tmp_path: Path):
    there = tmp_path / "there"
    there.write_bytes(b"bytes")
    images = [SimpleNamespace(image=FileImage(str(path))) for path in (tmp_path / "gone", there)]
    actor = FakeActor(acquire=images)  # type: ignore[arg-type]
    _, data = asyncio.run(_client(actor).lease("a", None, None))
    there.unlink()
    assert bytes(memoryview(data)) == b"bytes"  # type: ignore[arg-type]
    assert [call[0] for call in actor.calls] == ["acquire", "acquire"]


def test_an_image_that_stays_lost_is_unavailable():
    actor = FakeActor(acquire=[SimpleNamespace(image=FileImage("/nowhere/at/all"))])
    with pytest.raises(Refused) as caught:
        asyncio.run(_client(actor, wait_s=0.05).lease("a", None, None))
    assert caught.value.fault.code == "store_unavailable"


@pytest.mark.parametrize(
    ("method", "given", "sent"),
    [
        ("refresh", ("a", "s3"), ("a", "s3")),
        ("prefetch", ("a", "s3"), ("a", None, "s3")),
        ("pin", ("a", "s3"), ("a", "s3")),
        ("unpin", ("a", "s3"), ("a", "s3")),
        ("register", (("row",),), (("row",),)),
        ("unregister", (("a",),), (("a",),)),
        ("warm_set", (5,), ("d", 5)),
    ],
)
def test_changes_are_made_again_when_the_store_restarts_under_them(method: str, given: Any, sent: Any):
    actor = FakeActor(**{method: [RayActorError(), "answer"]})
    answer = asyncio.run(getattr(_client(actor), method)(*given))
    assert answer == (None if method in ("register", "prefetch") else "answer")
    assert actor.calls == [(method, *sent)] * 2


@pytest.mark.parametrize("fault", [ValueError("unforeseen"), TimeoutError("unforeseen")])
def test_a_fault_in_the_store_is_told_and_not_taken_for_a_store_that_is_away(fault: Exception):
    actor = FakeActor(resolve=[RayTaskError("resolve", "traceback", fault).as_instanceof_cause()])
    with pytest.raises(RayTaskError, match="traceback"):
        asyncio.run(_client(actor).resolve("a"))
    assert len(actor.calls) == 1


def test_an_image_that_never_arrives_is_unavailable_after_the_wait(monkeypatch: pytest.MonkeyPatch):
    def get(_: Any, *, timeout: float) -> Any:
        time.sleep(timeout)
        raise GetTimeoutError

    monkeypatch.setattr("ray.get", get)
    actor = FakeActor(acquire=[SimpleNamespace(image="ref")])
    with pytest.raises(Refused) as caught:
        asyncio.run(_client(actor, wait_s=0.05).lease("a", None, None))
    assert caught.value.fault.code == "store_unavailable"


def test_no_fault_of_the_store_ends_the_heartbeats_of_a_replica():
    """Without beats its leases would run out."""

    class Adapters:
        num_beats = 0

        async def beat(self) -> None:
            self.num_beats += 1
            raise (RuntimeError, ValueError, Refused(Fault(code="store_unavailable", message="")))[self.num_beats % 3]

    async def main() -> None:
        replica: Any = SimpleNamespace(_adapters=Adapters(), _lease_ttl_s=0.003)
        beating = asyncio.ensure_future(Replica._beat(replica))
        await until_async(lambda: replica._adapters.num_beats >= 6, "six beats")
        assert not beating.done()
        beating.cancel()

    asyncio.run(main())
