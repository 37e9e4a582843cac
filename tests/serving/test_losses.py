"""Every exception that the installed Ray can raise has a place in the one table, and a call is treated accordingly."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import grpc
import pytest
import ray
import ray.exceptions
import ray.serve._private.exceptions
import ray.serve.exceptions
from ray.core.generated import common_pb2
from ray.serve._private.common import DeploymentID

from deployments.calls import Refused
from deployments.errors import answer_for, fault_of
from deployments.losses import GRPC_MEANINGS, LOST, MEANINGS, Meaning, actor_of, meaning
from deployments.router.streams import ReplicaLost
from deployments.store.client import StoreClient
from engine.errors import QueueFull
from tests.serving.test_backend import ITEMS, FakeHandle, items_of
from tests.serving.test_store_client import FakeActor

# Raised where Serve is started, deployed or scaled, never by a call.
ELSEWHERE = {"DeploymentIsBeingDeletedError", "ExternalScalerDisabledError"}


def tree(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    yield kind
    for child in kind.__subclasses__():
        yield from tree(child)


def rays_own() -> list[type[BaseException]]:
    """The classes of Ray's modules of exceptions, and whatever else it derives from them; dual classes are made."""
    modules = [ray.exceptions, ray.serve.exceptions, ray.serve._private.exceptions]
    found = {
        kind
        for module in modules
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and kind.__module__ == module.__name__
    }
    for root in (ray.exceptions.RayError, ray.serve.exceptions.RayServeException, grpc.RpcError):
        found |= {kind for kind in tree(root) if kind.__module__.split(".")[0] in ("ray", "grpc")}
    return sorted((kind for kind in found if not kind.__name__.startswith("RayTaskError(")), key=lambda k: k.__name__)


def test_the_walk_finds_what_ray_has():
    assert len(rays_own()) > 45
    for module in pkgutil.iter_modules(ray.serve.__path__, "ray.serve."):
        if module.name.endswith("exceptions"):
            importlib.import_module(module.name)


@pytest.mark.parametrize("kind", rays_own(), ids=lambda kind: kind.__name__)
def test_every_exception_of_ray_is_placed(kind: type[BaseException]):
    """By its own name: one that a new Ray brings must be looked at, not inherit a meaning."""
    assert kind in MEANINGS or kind.__name__ in ELSEWHERE or kind is grpc.aio.AioRpcError


def test_the_table_has_no_class_that_ray_has_not():
    assert set(MEANINGS) - {ConnectionError, TimeoutError} <= set(rays_own())


@pytest.mark.parametrize("code", list(grpc.StatusCode))
def test_every_status_of_grpc_is_placed(code: grpc.StatusCode):
    error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "details")
    assert meaning(error) is GRPC_MEANINGS[code]


def death(text: str, **fields: object) -> ray.exceptions.ActorDiedError:
    context = common_pb2.ActorDiedErrorContext(error_message=text, actor_id=b"a" * 16, **fields)  # type: ignore[arg-type]
    return ray.exceptions.ActorDiedError(context)


# As Ray 2.60 writes them; seen with SIGSEGV, abort, os._exit, SIGKILL, SIGTERM, ray.kill, exit_actor.
CRASH = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)
WORKER = "The actor is dead because its worker process has died. Worker exit type: "
DEATHS = {
    CRASH: Meaning.DIED,
    f"{WORKER}SYSTEM_ERROR Worker exit detail: Worker exits with an exit code 70.": Meaning.DIED,
    f"{WORKER}NODE_OUT_OF_MEMORY Worker exit detail: Task was killed, low on memory.": Meaning.DIED,
    f"{WORKER}USER_ERROR Worker exit detail: Worker exits unexpectedly.": Meaning.DIED,
    "": Meaning.DIED,
    "The actor is dead because it was killed by `ray.kill`.": Meaning.KILLED,
    f"{WORKER}INTENDED_USER_EXIT Worker exit detail: Worker exits by an user request.": Meaning.KILLED,
    f"{WORKER}INTENDED_SYSTEM_EXIT Worker exit detail: Worker exits because the actor is killed.": Meaning.KILLED,
    f"{WORKER}SYSTEM_ERROR Worker exit detail: Worker exits unexpectedly by a signal. SystemExit is raised (sys.exit "
    "is called). Exit code: 1. The process receives a SIGTERM.": Meaning.KILLED,
    "The actor died because its node has died. Node Id: 0123\n\tthe actor's node was terminated expectedly: drained": (
        Meaning.KILLED
    ),
    "The actor is dead because its owner has died. Owner Id: 01": Meaning.KILLED,
    "The actor is dead because all references to the actor were removed.": Meaning.KILLED,
}


@pytest.mark.parametrize("text", DEATHS, ids=lambda text: text[-40:])
def test_what_ray_tells_of_a_death_decides_who_may_be_blamed(text: str):
    assert meaning(death(text)) is DEATHS[text]


def test_a_preempted_node_is_nobodys_fault():
    reason = common_pb2.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    error = death("gone", node_death_info=common_pb2.NodeDeathInfo(reason=reason))
    assert meaning(error) is Meaning.KILLED
    assert actor_of(error) == (b"a" * 16).hex()


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["ALIVE", "ALIVE", CRASH], Meaning.DIED),
        ([CRASH], Meaning.DIED),
        (["RESTARTING", "The actor is dead because it was killed by `ray.kill`."], Meaning.KILLED),
        (["The actor died because its node has died."], Meaning.KILLED),
        (["ALIVE"], Meaning.AWAY),
        ([], Meaning.AWAY),
        ([OSError("no control store")], Meaning.AWAY),
    ],
    ids=str,
)
def test_a_broken_connection_is_a_death_when_ray_knows_of_one(
    states: list[object], expected: Meaning, monkeypatch: pytest.MonkeyPatch
):
    """With calls over gRPC every death is told as a broken connection first."""
    waiting = list(states)

    def table(actor_id: str) -> dict[str, object]:
        assert actor_id == (b"a" * 16).hex()
        state = waiting.pop(0) if len(waiting) > 1 else waiting[0] if waiting else None
        if isinstance(state, Exception):
            raise state
        if state in ("ALIVE", "RESTARTING", None):
            return {"State": state} if state else {}
        context = common_pb2.ActorDiedErrorContext(error_message=str(state))
        return {"State": "DEAD", "DeathCause": common_pb2.ActorDeathCause(actor_died_error_context=context)}

    monkeypatch.setattr("deployments.losses.ray.is_initialized", lambda: True)
    monkeypatch.setattr("deployments.losses._actor_table", table)
    monkeypatch.setattr("deployments.losses.FATE_POLL_S", 0.0)
    monkeypatch.setattr("deployments.losses.fate.__defaults__", (0.05,))
    error = ray.exceptions.ActorUnavailableError("connection lost", b"a" * 16)
    with pytest.raises(ReplicaLost) as caught:
        asyncio.run(items_of(FakeHandle(*ITEMS, error)))
    assert caught.value.meaning is expected


def raised_there(cause: Exception) -> ray.exceptions.RayTaskError:
    error = ray.exceptions.RayTaskError("generate", "a traceback", cause, "title", 1, "127.0.0.1")
    return error.as_instanceof_cause()


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (ValueError("x"), Meaning.OWN),
        (death(CRASH), Meaning.OWN),  # of another actor, which the replica asked
        (TimeoutError(), Meaning.OWN),
        (ConnectionResetError(), Meaning.OWN),
        (QueueFull("x"), Meaning.OWN),
        (ray.serve.exceptions.BackPressureError(1, 1), Meaning.OVERLOADED),
        (ray.serve.exceptions.RequestCancelledError("x"), Meaning.CANCELLED),
        (ray.exceptions.TaskCancelledError(), Meaning.CANCELLED),
        (ray.exceptions.AsyncioActorExit(), Meaning.KILLED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_replicas_code_raised_is_its_own_error(cause: Exception, expected: Meaning):
    assert meaning(raised_there(cause)) is expected


ERRORS = [
    death(CRASH),
    death("killed by `ray.kill`"),
    ray.exceptions.RayActorError(),
    ray.exceptions.ActorUnavailableError("connection lost", b"a" * 16),
    ray.exceptions.NodeDiedError("the node died"),
    ray.exceptions.WorkerCrashedError(),
    ray.exceptions.LocalRayletDiedError(),
    ray.exceptions.OutOfMemoryError("killed"),
    ray.exceptions.OwnerDiedError("01", None, ""),
    ray.exceptions.ObjectLostError("01", None, ""),
    ray.exceptions.ObjectFetchTimedOutError("01", None, ""),
    ray.exceptions.RaySystemError("raylet"),
    ray.exceptions.RpcError("broken"),
    ray.exceptions.GetTimeoutError("late"),
    ray.exceptions.TaskUnschedulableError("no node"),
    ray.exceptions.ActorUnschedulableError("no node"),
    ray.exceptions.RayChannelTimeoutError("late"),
    ray.exceptions.ActorPlacementGroupRemoved(),
    ray.serve.exceptions.DeploymentUnavailableError(DeploymentID("Replica", "chorus")),
    ray.serve.exceptions.ReplicaUnavailableError("r1"),
    ConnectionResetError(),
    *(
        grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "RST_STREAM")
        for code in grpc.StatusCode
        if GRPC_MEANINGS[code] in LOST
    ),
]


@pytest.mark.parametrize("before", [(), ITEMS], ids=["first", "later"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{str(error)[:30]}")
def test_a_lost_replica_is_lost_however_ray_says_it(
    error: Exception, before: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        "deployments.losses.fate.__defaults__", (0.0,)
    )  # no wait for a Ray of another test to know more
    with pytest.raises(ReplicaLost) as caught:
        asyncio.run(items_of(FakeHandle(*before, error)))  # type: ignore[arg-type]
    assert caught.value.meaning is meaning(error)


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (ray.serve.exceptions.BackPressureError(1, 1), "queue_full", 429),
        (raised_there(ray.serve.exceptions.BackPressureError(1, 1)), "queue_full", 429),
        (ray.exceptions.PendingCallsLimitExceeded(), "replica_overloaded", 503),
        (ray.exceptions.ObjectStoreFullError(), "replica_overloaded", 503),
        (ray.exceptions.OutOfDiskError(), "replica_overloaded", 503),
        (ray.serve.exceptions.RequestCancelledError("x"), "request_cancelled", 503),
        (raised_there(QueueFull("24 wait")), "queue_full", 429),
        (raised_there(ValueError("/secret")), "internal_error", 500),
        (ray.exceptions.AuthenticationError("token"), "internal_error", 500),
        (KeyError("/secret"), "internal_error", 500),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("before", [(), ITEMS], ids=["first", "later"])
def test_what_is_no_loss_is_told(before: tuple[object, ...], error: Exception, code: str, status: int):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        asyncio.run(items_of(FakeHandle(*before, error)))  # type: ignore[arg-type]
    assert not isinstance(caught.value, ReplicaLost)
    fault = fault_of(caught.value)
    assert (fault.code, answer_for(fault.code).status) == (code, status)
    assert "secret" not in fault.message
    if isinstance(caught.value, Refused) and status != 500:
        assert answer_for(code).retry_after_s


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{str(error)[:30]}")
def test_a_lost_store_is_asked_again_however_ray_says_it(error: Exception):
    actor = FakeActor(status=[error, "well"])
    client = StoreClient([lambda: actor], wait_s=10.0)
    assert asyncio.run(client.status()) == "well"  # type: ignore[comparison-overlap]
    assert [name for name, *_ in actor.calls] == ["status", "status"]


def test_a_call_that_is_cancelled_over_there_is_told_and_one_of_ours_ends():
    """Serve raises an asyncio.CancelledError for both."""

    async def run() -> None:
        with pytest.raises(Refused, match="request_cancelled"):
            await items_of(FakeHandle(asyncio.CancelledError()))  # type: ignore[arg-type]
        task = asyncio.ensure_future(items_of(FakeHandle(None)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
