"""What `ServeBackend` makes of a deployment handle, with a handle that needs no Ray."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from deployments import frames
from deployments.calls import Aim, Batch, Call, Receipt, Refused, StreamItem
from deployments.losses import MEANINGS
from deployments.router.replicas import ServeBackend
from deployments.router.streams import ReplicaLost
from engine.request import FinishReason, OutputDelta, SamplingParams
from tests.support.waiting import for_ever

CALL = Call(request_id="q", prompt_token_ids=(1,), params=SamplingParams(), seed=0)
DONE = OutputDelta("", 0, (7,), "g", finish_reason=FinishReason.LENGTH)
ITEMS = (StreamItem(replica="a"), StreamItem(replica="a", adapter_version="v"))
WHOLE = (*ITEMS, StreamItem(replica="a", adapter_version="v", deltas=(DONE,)))


class FakeResponse:
    """Outcomes in turn; an exception is raised, None never comes."""

    def __init__(self, outcomes: Sequence[object]) -> None:
        self._outcomes = list(outcomes)
        self.cancelled = False

    def __aiter__(self) -> FakeResponse:
        return self

    async def __anext__(self) -> Any:
        if not self._outcomes:
            raise StopAsyncIteration
        outcome = self._outcomes.pop(0)
        if outcome is None:
            await for_ever()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def __await__(self) -> Any:
        return self.__anext__().__await__()

    def cancel(self) -> None:
        self.cancelled = True


class FakeHandle:
    """One replica. The first outcome is that of submitting; the others come in frames, and then these end."""

    def __init__(self, first: StreamItem | BaseException | None, *later: StreamItem | BaseException | None) -> None:
        receipt = Receipt(first.replica, 1, first.fault) if isinstance(first, StreamItem) else first
        self.response = FakeResponse([Receipt.write([receipt]) if isinstance(receipt, Receipt) else receipt])
        self._later = later
        self.cancelled: list[int] = []
        self.submit = SimpleNamespace(remote=self._submitted)
        self.subscribe = SimpleNamespace(remote=self._subscribed)
        self.cancel = SimpleNamespace(remote=self._cancelled)

    def options(self, *, stream: bool) -> FakeHandle:
        assert stream
        return self

    def _submitted(self, batch: Batch) -> FakeResponse:
        (submission,) = batch.submissions()
        assert submission.call == CALL
        self.number = submission.number
        return self.response

    def _subscribed(self, aim: Aim, router: str, reading: int) -> FakeResponse:
        later = [frames.write(1, [(self.number, i)]) if isinstance(i, StreamItem) else i for i in self._later]
        return FakeResponse([frames.write(0, ()), *later])

    def _cancelled(self, aim: Aim, router: str, numbers: tuple[int, ...]) -> FakeResponse:
        self.cancelled += numbers
        return FakeResponse(["told"])


async def items_of(handle: Any, wait_s: float = 60.0) -> list[StreamItem]:
    backend = ServeBackend(handle, wait_s=wait_s)
    try:
        stream: AsyncGenerator[StreamItem] = backend.stream(CALL)
        return [item async for item in stream]
    finally:
        await backend.close()


def test_items_are_handed_on():
    assert asyncio.run(items_of(FakeHandle(*WHOLE))) == list(WHOLE)


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


def test_frames_that_end_are_of_a_lost_replica():
    with pytest.raises(ReplicaLost):
        asyncio.run(items_of(FakeHandle(*ITEMS)))


def test_back_pressure_of_serve_is_a_full_queue():
    with pytest.raises(Refused) as caught:
        asyncio.run(items_of(FakeHandle(BackPressureError(1, 1))))
    assert caught.value.fault.code == "queue_full"


class ReplicaId(NamedTuple):
    unique_id: str


class Member:
    """One replica's pending answer to a broadcast: a value, an exception, or nothing for ever (None)."""

    def __init__(self, outcome: object) -> None:
        self._outcome = outcome

    async def get_async(self) -> object:
        if self._outcome is None:
            await for_ever()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class FleetHandle:
    """A handle of some replicas, by name; `first` is what the one says that Serve would choose."""

    def __init__(self, replicas: dict[str, object], first: object = None, broadcast: object = ()) -> None:
        self._replicas, self._first, self._broadcast = replicas, first, broadcast
        ids = {ReplicaId(name): None for name in replicas}
        self._router = SimpleNamespace(
            _asyncio_router=SimpleNamespace(request_router=SimpleNamespace(curr_replicas=ids))
        )
        self.ping = SimpleNamespace(remote=lambda: Member(first).get_async())
        self.num_broadcasts = 0

    def options(self, **_: object) -> FleetHandle:
        return self

    def broadcast(self, method: str) -> Any:
        self.num_broadcasts += 1
        if isinstance(self._broadcast, Exception):
            raise self._broadcast

        async def members() -> list[Member]:
            return [Member(outcome) for outcome in self._replicas.values() if outcome != "not asked"]

        return SimpleNamespace(_fetch_replica_results_async=members)


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATS_TIMEOUT_S", "FIRST_PING_S"):
        monkeypatch.setattr(f"deployments.router.replicas.{name}", 0.02)
    monkeypatch.setattr("deployments.router.replicas.PING_TIMEOUT_S", 0.2)


DEAD = ActorDiedError()
AWAY = ActorUnavailableError("lost", None)
UNAVAILABLE = DeploymentUnavailableError(DeploymentID("Replica", "chorus"))
FLEETS: list[dict[str, object]] = [
    {"a": "well"},
    {"a": "well", "b": "well", "c": "well"},
    {"a": "well", "b": DEAD},
    {"a": AWAY, "b": "well"},
    {"a": "well", "b": None},
    {"a": None, "b": "well", "c": DEAD},
    {"a": "well", "b": "not asked"},
    {"a": "not asked", "b": None, "c": "well", "d": "well"},
    {"a": RaySystemError("x"), "b": "well"},
    {"a": WorkerCrashedError(), "b": ValueError("x"), "c": "well"},
    {"a": DEAD, "b": DEAD},
    {"a": None},
    {"a": "not asked"},
]


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("fleet", FLEETS, ids=str)
def test_what_replicas_say_is_told_and_the_others_are_named(fleet: dict[str, object]):
    said = {name: {"replica": name, "pid": 1} if outcome == "well" else outcome for name, outcome in fleet.items()}
    stats = asyncio.run(ServeBackend(FleetHandle(said), wait_s=1).stats())  # type: ignore[arg-type]
    assert [part for part in stats if "missing" not in part] == [said[name] for name in fleet if fleet[name] == "well"]
    missing = [part for part in stats if "missing" in part]
    assert {part["replica"] for part in missing} == {name for name in fleet if fleet[name] != "well"}
    assert all(part["missing"] for part in missing)


def _bare(kind: type[Any]) -> Any:
    """An exception without what its constructor wants: only its class is looked at."""
    quiet: dict[str, Any] = {"__init__": lambda self: None, "__str__": lambda self: "words of its own"}
    return type(kind.__name__, (kind,), quiet)()


LOOKED_INTO = (ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError)  # by what they carry
FAILURES = [
    UNAVAILABLE,
    DEAD,
    AWAY,
    RayActorError(),
    ValueError("words of its own"),
    TimeoutError(),
    ConnectionError("words of its own"),
    *(_bare(kind) for kind in MEANINGS if issubclass(kind, RayError | RayServeException) and kind not in LOOKED_INTO),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
def test_why_nothing_was_heard_is_told_in_own_words(failure: Exception):
    """Whoever reads GET /stats or /health knows nothing of exceptions: they stand in the log."""
    backend = ServeBackend(FleetHandle({}, broadcast=failure), wait_s=1)  # type: ignore[arg-type]
    (part,) = asyncio.run(backend.stats())
    (silent,) = asyncio.run(ServeBackend(FleetHandle({"a": failure}), wait_s=1).stats())  # type: ignore[arg-type]
    with pytest.raises(Refused) as caught:
        asyncio.run(ServeBackend(FleetHandle({"a": failure}, failure), wait_s=1).ping())  # type: ignore[arg-type]
    for text in (part["missing"], silent["missing"], caught.value.fault.message):
        assert len(str(text)) > 15
        assert not re.search(r"Error|Exception|\b[A-Z]\w+[A-Z]\w+\b|words of its own", str(text)), text


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("first", [None, DEAD, AWAY, ValueError("x")], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("fleet", FLEETS, ids=str)
def test_the_server_is_well_while_one_replica_answers(fleet: dict[str, object], first: object):
    """Whichever is asked first: the one that hangs has the shortest queue."""
    backend = ServeBackend(FleetHandle(fleet, first), wait_s=1)  # type: ignore[arg-type]
    if "well" in fleet.values():
        asyncio.run(backend.ping())
    else:
        with pytest.raises(Refused, match="no replica answered within") as caught:
            asyncio.run(backend.ping())
        assert caught.value.fault.code == "engine_dead"


def test_a_replica_that_answers_at_once_is_asked_alone():
    handle: Any = FleetHandle({"a": "well"}, "well")
    asyncio.run(ServeBackend(handle, wait_s=1).ping())
    assert handle.num_broadcasts == 0
