"""Waiting for the adapter store, with a stand-in for its actor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OwnerDiedError, RayActorError

from adapter_store.errors import AdapterNotFound, SpecUnknown
from deployments.calls import Refused
from deployments.store_client import StoreClient

SPEC = {"sites": []}


class FakeActor:
    """Each method answers with the next of its scripted outcomes; the last one is repeated."""

    def __init__(self, **outcomes: list[Any]) -> None:
        self.outcomes = outcomes
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        async def remote(*args: Any) -> Any:
            self.calls.append((method, *args))
            outcomes = self.outcomes.get(method, [None])
            outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return SimpleNamespace(remote=remote)


def _client(actor: FakeActor, *, wait_s: float = 2.0, connect: Callable[[], Any] | None = None) -> StoreClient:
    return StoreClient(connect or (lambda: actor), wait_s=wait_s, owner="r", spec=SPEC, digest="d")


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.store_client.FIRST_PAUSE_S", 0.01)


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
        await client._call("acquire", "a", "d", "r", None, None)

    asyncio.run(lease())
    assert [call[0] for call in actor.calls] == ["acquire", "register_spec", "acquire"]
    assert actor.calls[1] == ("register_spec", SPEC)


def test_an_image_that_died_with_its_owner_is_leased_again(monkeypatch: pytest.MonkeyPatch):
    outcomes: list[Any] = [OwnerDiedError("00", None, ""), b"bytes"]  # type: ignore[arg-type]

    def get(_: Any) -> Any:
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
