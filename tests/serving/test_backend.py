"""What `ServeBackend` makes of a deployment handle, with a handle that needs no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from deployments.calls import Call, Refused, StreamItem
from deployments.router.replicas import ServeBackend
from deployments.router.streams import ReplicaLost
from engine.request import SamplingParams

CALL = Call(request_id="q", prompt_token_ids=(1,), params=SamplingParams(), seed=0)
ITEMS = (StreamItem(replica="a"), StreamItem(replica="a", adapter_version="v"))


class FakeResponse:
    """Items in turn; an exception is raised, None never comes."""

    def __init__(self, items: Sequence[StreamItem | BaseException | None]) -> None:
        self._items = list(items)
        self.cancelled = False

    def __aiter__(self) -> FakeResponse:
        return self

    async def __anext__(self) -> StreamItem:
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, BaseException):
            raise item
        assert item is not None
        return item

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    def __init__(self, *items: StreamItem | BaseException | None) -> None:
        self.response = FakeResponse(items)
        self.generate = self

    def options(self, *, stream: bool) -> FakeHandle:
        assert stream
        return self

    def remote(self, call: Call) -> FakeResponse:
        assert call is CALL
        return self.response


async def items_of(handle: Any, wait_s: float = 60.0) -> list[StreamItem]:
    stream: AsyncGenerator[StreamItem] = ServeBackend(handle, wait_s=wait_s).stream(CALL)
    return [item async for item in stream]


def test_items_are_handed_on():
    handle = FakeHandle(*ITEMS)
    assert asyncio.run(items_of(handle)) == list(ITEMS)


def test_a_call_that_no_replica_takes_is_refused_and_taken_back():
    handle = FakeHandle(None)
    with pytest.raises(Refused, match=r"no_replica: no replica took the request within 0\.01 s") as caught:
        asyncio.run(items_of(handle, wait_s=0.01))
    assert caught.value.fault.code == "no_replica"
    assert handle.response.cancelled


@pytest.mark.parametrize("before", [(), ITEMS])
def test_a_replica_that_dies_is_lost_whenever_it_dies(before: tuple[StreamItem, ...]):
    with pytest.raises(ReplicaLost):
        asyncio.run(items_of(FakeHandle(*before, ActorDiedError())))


def test_a_stream_without_items_is_of_a_lost_replica():
    with pytest.raises(ReplicaLost):
        asyncio.run(items_of(FakeHandle()))


def test_back_pressure_of_serve_is_a_full_queue():
    with pytest.raises(Refused) as caught:
        asyncio.run(items_of(FakeHandle(BackPressureError(1, 1))))
    assert caught.value.fault.code == "queue_full"
