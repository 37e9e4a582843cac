"""What Ray's exceptions mean to a caller: the one place that knows them.

`meaning` places every exception that a handle call, a stream or an actor call of Ray can end with. A test walks the
exceptions of the installed Ray: a new one fails it until it is placed here.
"""

from __future__ import annotations

import enum
import logging
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import grpc
import ray
import ray._private.state
from ray import exceptions as ray_errors
from ray.serve import exceptions as serve_errors

logger = logging.getLogger("ray.serve")

FATE_WAIT_S = 2.0
FATE_POLL_S = 0.05


class Meaning(enum.Enum):
    """What became of a call."""

    KILLED = "the other side was stopped by somebody, or went with its node"  # no fault of the request
    DIED = "the other side's process ended, and nobody ordered it"  # perhaps because of the request
    AWAY = "the other side cannot be reached, or its answer was lost on the way"
    OVERLOADED = "there is no room for the call now"
    CANCELLED = "the call was taken back"
    OWN = "the other side raised an error of its own"
    BUG = "a mistake in how the call was made"


LOST = frozenset({Meaning.KILLED, Meaning.DIED, Meaning.AWAY})
"""Meanings after which the same call may be made elsewhere, or later."""

# By class; a subclass without an entry means what its nearest base means. ActorDiedError and gRPC's errors are looked
# into as well, and a RayTaskError means what its cause does.
MEANINGS: Mapping[type[BaseException], Meaning] = MappingProxyType(
    {
        ray_errors.RayError: Meaning.BUG,
        # An actor or its node.
        ray_errors.RayActorError: Meaning.DIED,
        ray_errors.ActorDiedError: Meaning.DIED,
        ray_errors.ActorUnavailableError: Meaning.AWAY,  # "the task may or may not have been executed"
        ray_errors.WorkerCrashedError: Meaning.DIED,
        ray_errors.OutOfMemoryError: Meaning.DIED,
        ray_errors.NodeDiedError: Meaning.KILLED,
        ray_errors.LocalRayletDiedError: Meaning.KILLED,
        ray_errors.AsyncioActorExit: Meaning.KILLED,
        ray_errors.ActorPlacementGroupRemoved: Meaning.KILLED,
        ray_errors.TaskPlacementGroupRemoved: Meaning.KILLED,
        ray_errors.ActorUnschedulableError: Meaning.AWAY,
        ray_errors.TaskUnschedulableError: Meaning.AWAY,
        ray_errors.RuntimeEnvSetupError: Meaning.AWAY,
        # What was sent back.
        ray_errors.ObjectLostError: Meaning.AWAY,
        ray_errors.ObjectFetchTimedOutError: Meaning.AWAY,
        ray_errors.ReferenceCountingAssertionError: Meaning.AWAY,
        ray_errors.ObjectFreedError: Meaning.AWAY,
        ray_errors.OwnerDiedError: Meaning.AWAY,
        ray_errors.ObjectReconstructionFailedError: Meaning.AWAY,
        ray_errors.ObjectRefStreamEndOfStreamError: Meaning.AWAY,
        ray_errors.StreamingGeneratorReplayInconsistentError: Meaning.AWAY,
        ray_errors.PlasmaObjectNotAvailable: Meaning.AWAY,
        ray_errors.GetTimeoutError: Meaning.AWAY,
        # The ways between.
        ray_errors.RaySystemError: Meaning.AWAY,
        ray_errors.RpcError: Meaning.AWAY,
        ray_errors.RayChannelError: Meaning.AWAY,
        ray_errors.RayChannelTimeoutError: Meaning.AWAY,
        ray_errors.RayDirectTransportError: Meaning.AWAY,
        ConnectionError: Meaning.AWAY,
        TimeoutError: Meaning.AWAY,
        # No room.
        ray_errors.PendingCallsLimitExceeded: Meaning.OVERLOADED,
        ray_errors.ObjectStoreFullError: Meaning.OVERLOADED,
        ray_errors.OutOfDiskError: Meaning.OVERLOADED,
        ray_errors.RayCgraphCapacityExceeded: Meaning.OVERLOADED,
        # Others' errors, and ours.
        ray_errors.TaskCancelledError: Meaning.CANCELLED,
        ray_errors.RayTaskError: Meaning.OWN,
        ray_errors.UserCodeException: Meaning.OWN,
        ray_errors.CrossLanguageError: Meaning.OWN,
        ray_errors.UnserializableException: Meaning.OWN,
        ray_errors.AuthenticationError: Meaning.BUG,
        ray_errors.OufOfBandObjectRefSerializationException: Meaning.BUG,
        ray_errors.ActorAlreadyExistsError: Meaning.BUG,
        ray_errors.ActorHandleNotFoundError: Meaning.BUG,
        # Serve.
        serve_errors.RayServeException: Meaning.BUG,
        serve_errors.gRPCStatusError: Meaning.OWN,
        serve_errors.BackPressureError: Meaning.OVERLOADED,
        serve_errors.RequestCancelledError: Meaning.CANCELLED,
        serve_errors.DeploymentUnavailableError: Meaning.AWAY,  # no replica could be started so far
        serve_errors.ReplicaUnavailableError: Meaning.AWAY,
        grpc.RpcError: Meaning.AWAY,
    }
)

# A cancellation of our own is an asyncio.CancelledError: CANCELLED comes from a server that goes.
GRPC_MEANINGS: Mapping[grpc.StatusCode, Meaning] = MappingProxyType(
    {
        grpc.StatusCode.OK: Meaning.BUG,
        grpc.StatusCode.CANCELLED: Meaning.AWAY,
        grpc.StatusCode.UNKNOWN: Meaning.AWAY,
        grpc.StatusCode.INVALID_ARGUMENT: Meaning.BUG,
        grpc.StatusCode.DEADLINE_EXCEEDED: Meaning.AWAY,
        grpc.StatusCode.NOT_FOUND: Meaning.AWAY,
        grpc.StatusCode.ALREADY_EXISTS: Meaning.BUG,
        grpc.StatusCode.PERMISSION_DENIED: Meaning.BUG,
        grpc.StatusCode.RESOURCE_EXHAUSTED: Meaning.OVERLOADED,
        grpc.StatusCode.FAILED_PRECONDITION: Meaning.BUG,
        grpc.StatusCode.ABORTED: Meaning.AWAY,
        grpc.StatusCode.OUT_OF_RANGE: Meaning.BUG,
        grpc.StatusCode.UNIMPLEMENTED: Meaning.BUG,
        grpc.StatusCode.INTERNAL: Meaning.AWAY,  # RST_STREAM: the connection broke
        grpc.StatusCode.UNAVAILABLE: Meaning.AWAY,
        grpc.StatusCode.DATA_LOSS: Meaning.AWAY,
        grpc.StatusCode.UNAUTHENTICATED: Meaning.BUG,
    }
)

# Ray keeps an actor's cause of death as text only: what its control store and its raylets write for deaths that
# somebody ordered. INTENDED_*: exit_actor, a drained worker, a process that ends itself in good order.
_ORDERED = (
    "killed by `ray.kill`",
    "node has died",
    "actor's node was terminated",
    "actor's node was preempted",
    "died by preemption",
    "worker exit type: intended_",
    "its owner has died",
    "all references to the actor were removed",
    "could not load it during initialization",
    "cancelled before it started running",
    "the actor is killed",
    "by an user request",
    "receives a sigterm",
)


_TOLD_FROM_THERE = (
    serve_errors.BackPressureError,
    serve_errors.RequestCancelledError,
    ray_errors.TaskCancelledError,
    ray_errors.AsyncioActorExit,
)


def meaning(error: BaseException) -> Meaning:
    """What became of the call that ended with `error`."""
    if isinstance(error, ray_errors.RayTaskError):
        # Raised over there, also where it tells of a third side that was lost. These alone are about the call itself.
        cause = getattr(error, "cause", None)
        return next((MEANINGS[kind] for kind in _TOLD_FROM_THERE if isinstance(cause, kind)), Meaning.OWN)
    if isinstance(error, ray_errors.RayActorError) and _is_ordered(error):
        return Meaning.KILLED
    if isinstance(error, grpc.RpcError):
        return _grpc_meaning(error)
    return next((MEANINGS[kind] for kind in type(error).__mro__ if kind in MEANINGS), Meaning.BUG)


def actor_of(error: BaseException) -> str | None:
    """The hex id of the actor that was lost, where `error` tells it."""
    return error.actor_id if isinstance(error, ray_errors.RayActorError) else None


def fate(actor_id: str, wait_s: float = FATE_WAIT_S) -> Meaning:
    """What became of an actor that could not be reached: calls over gRPC hear of a death as of a broken connection.

    Ray's control store is asked until it knows of a death, for `wait_s` at most. Blocks. AWAY: it lives, or who knows.
    """
    deadline = time.monotonic() + wait_s
    while ray.is_initialized():
        try:
            known = _actor_table(actor_id)
        except Exception as error:
            logger.info("Ray does not say what became of actor %s: %s", actor_id, error)
            break
        if known.get("State") == "DEAD":
            context = getattr(known.get("DeathCause"), "actor_died_error_context", None)
            is_ordered = _tells_of_an_order(str(getattr(context, "error_message", "")))
            return Meaning.KILLED if is_ordered else Meaning.DIED
        if time.monotonic() >= deadline:
            break
        time.sleep(FATE_POLL_S)
    return Meaning.AWAY


def _actor_table(actor_id: str) -> Mapping[str, Any]:
    return ray._private.state.actors(actor_id) or {}


def _is_ordered(error: ray_errors.RayActorError) -> bool:
    return bool(error.preempted) or _tells_of_an_order(str(error.error_msg))


def _tells_of_an_order(text: str) -> bool:
    return any(words in text.lower() for words in _ORDERED)


def _grpc_meaning(error: grpc.RpcError) -> Meaning:
    code = getattr(error, "code", None)
    found = GRPC_MEANINGS.get(code(), Meaning.AWAY) if callable(code) else Meaning.AWAY
    details = getattr(error, "details", None)
    told = str(details() or "") if callable(details) else ""
    if found is Meaning.OVERLOADED and "larger than max" in told:
        return Meaning.BUG  # a message over gRPC's limit: it never fits
    return found
