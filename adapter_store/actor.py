"""The adapter store as a detached, named Ray actor: one per cluster and configuration. The only module with ray.

The actor's name holds the protocol version and a digest of its configuration: programs of two versions, or with other
sources, get two stores and never talk past each other; the one nobody calls any more leaves after `idle_exit_s`.
A restarted actor begins with an empty host: names and images are found again on disk (`disk_path`) or from the sources
on demand, specs are registered again by the callers (SpecUnknown), and `heartbeat` tells owners which leases are gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Coroutine, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError

from adapter_store.records import AdapterPage, AdapterRecord, Lease, Registration, StoreConfig, StoreStatus
from adapter_store.sources.base import SourceConfig
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import BlobsFull

PROTOCOL_VERSION = 3  # rises with every change to what the actor's methods take and return
NAMESPACE = "chorus"
NAME = "adapter-store"
IDLE_EXIT_S = 300.0
_LOOK_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 30.0
_SECRETS = tuple(field.name for field in fields(SourceConfig) if not field.repr)
_NUM_ROUNDS = 600_000  # of PBKDF2 with SHA-256, as OWASP has advised since 2023: 0.2 s

T = TypeVar("T")

_log = logging.getLogger(__name__)


class RayBlobs:
    """Images in Ray's object store. This process owns them: they die with it, which consumers treat as a miss."""

    async def put(self, data: NDArray[np.uint8]) -> Any:
        """Copies `data` into shared memory, in a thread: the first touch of fresh pages takes a while."""
        try:
            return await asyncio.to_thread(ray.put, data)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise BlobsFull(
                f"Ray's object store has no room for {data.nbytes} bytes: {type(error).__name__}"
            ) from error

    async def has(self, handle: Any) -> bool:
        """A get on the own node maps the pages, it copies nothing; what was spilled is brought back."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(handle.future()), _LOOK_TIMEOUT_S)
        except (TimeoutError, GetTimeoutError):
            return True  # on its way back from disk
        except RayError:
            return False
        return True

    async def view(self, handle: Any) -> NDArray[np.uint8] | None:
        """A view of the shared memory."""
        try:
            array: NDArray[np.uint8] = await asyncio.wait_for(asyncio.wrap_future(handle.future()), _LOOK_TIMEOUT_S)
        except (TimeoutError, GetTimeoutError, RayError):
            return None
        return array

    def drop(self, handle: Any) -> None:
        """Nothing to do: Ray frees the object with its last reference."""


class AdapterStoreActor:
    """`AdapterStore` behind remote calls: the same methods, plus `protocol_version` and the idle exit."""

    def __init__(
        self, sources: tuple[SourceConfig, ...], config: StoreConfig, idle_exit_s: float = IDLE_EXIT_S
    ) -> None:
        self._store = AdapterStore([open_source(source, config.niceness) for source in sources], RayBlobs(), config)
        self._idle_exit_s = idle_exit_s
        self._called_at = time.monotonic()
        self._calls = 0  # under way
        self._is_leaving = False
        self._watch = asyncio.get_event_loop().create_task(self._leave_when_idle())

    async def protocol_version(self) -> int:
        """What this actor speaks."""
        return PROTOCOL_VERSION

    async def register_spec(self, spec: Mapping[str, Any], owner: str = "") -> str:
        """See `AdapterStore.register_spec`."""
        return await self._answer(self._store.register_spec(spec, owner))

    async def resolve(self, name: str, source: str | None = None) -> AdapterRecord:
        """See `AdapterStore.resolve`."""
        return await self._answer(self._store.resolve(name, source))

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        """See `AdapterStore.refresh`."""
        return await self._answer(self._store.refresh(name, source))

    async def prefetch(self, name: str, spec_digest: str | None = None, source: str | None = None) -> None:
        """See `AdapterStore.prefetch`."""
        await self._answer(self._store.prefetch(name, spec_digest, source))

    async def expect(self, name: str, source: str | None = None) -> None:
        """See `AdapterStore.expect`."""
        await self._answer(self._store.expect(name, source))

    async def register(self, rows: tuple[Registration, ...]) -> None:
        """See `AdapterStore.register`."""
        await self._answer(self._store.register(rows))

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `AdapterStore.unregister`."""
        return await self._answer(self._store.unregister(names))

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord:
        """See `AdapterStore.pin`."""
        return await self._answer(self._store.pin(name, source))

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord:
        """See `AdapterStore.unpin`."""
        return await self._answer(self._store.unpin(name, source))

    async def warm_set(self, spec_digest: str, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        """See `AdapterStore.warm_set`."""
        return await self._answer(self._store.warm_set(spec_digest, budget_bytes))

    async def acquire(
        self, name: str, spec_digest: str, owner: str, version: str | None = None, source: str | None = None
    ) -> Lease:
        """See `AdapterStore.acquire`; `image` is an ObjectRef of the uint8 array."""
        return await self._answer(self._store.acquire(name, spec_digest, owner, version, source))

    async def release(self, version: str, owner: str, number: int | None = None) -> None:
        """See `AdapterStore.release`."""
        await self._answer(self._store.release(version, owner, number))

    async def heartbeat(self, owner: str, versions: tuple[str, ...], spec_digest: str | None = None) -> tuple[str, ...]:
        """See `AdapterStore.heartbeat`."""
        return await self._answer(self._store.heartbeat(owner, versions, spec_digest))

    async def list_adapters(self, cursor: str | None = None, limit: int = 100) -> AdapterPage:
        """See `AdapterStore.list_adapters`."""
        return await self._answer(self._store.list_adapters(cursor, limit))

    async def status(self) -> StoreStatus:
        """See `AdapterStore.status`."""
        return await self._answer(self._store.status())

    async def leave(self) -> None:
        """Ends this actor for good; the next `get_or_create_store` makes a new one. The caller sees it die.

        `ray.actor.exit_actor` is not enough: it may only be called in a task, and a retry of that task restarts the
        actor. `ray.kill` also says that nothing is to be restarted.
        """
        self._is_leaving = True
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._store.close()
        except Exception:
            _log.exception("the adapter store leaves, but could not be closed")
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    async def _answer(self, call: Coroutine[Any, Any, T]) -> T:
        if self._is_leaving:
            call.close()
            await asyncio.Event().wait()  # until this process ends, which sends the caller to the next store
        self._calls += 1
        self._called_at = time.monotonic()
        try:
            return await call
        finally:
            self._calls -= 1
            self._called_at = time.monotonic()

    def _is_idle(self) -> bool:
        return not self._calls and time.monotonic() - self._called_at >= self._idle_exit_s

    async def _leave_when_idle(self) -> None:
        while not self._is_idle():
            await asyncio.sleep(max(0.05, self._called_at + self._idle_exit_s - time.monotonic()))
        await self.leave()


def store_name(sources: tuple[SourceConfig, ...], config: StoreConfig, name: str = NAME) -> str:
    """The actor's full name: `name`, the protocol version, and a digest of what it is configured with.

    Whoever may list the cluster's actors reads it, so each guess at a secret in it is made to cost a while. So does the
    first call with a configuration that has any.
    """
    described = repr((sources, config)).encode()  # which leaves out secrets
    secrets = tuple(tuple(getattr(source, secret) for secret in _SECRETS) for source in sources)
    has_secrets = any(any(each) for each in secrets)
    digest = _slow_digest(repr(secrets).encode(), described) if has_secrets else hashlib.sha256(described).digest()
    return f"{name}.v{PROTOCOL_VERSION}.{digest.hex()[:12]}"


@cache
def _slow_digest(secret: bytes, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", secret, salt, _NUM_ROUNDS)


def get_or_create_store(
    sources: tuple[SourceConfig, ...],
    config: StoreConfig | None = None,
    *,
    namespace: str = NAMESPACE,
    name: str = NAME,
    idle_exit_s: float = IDLE_EXIT_S,
) -> Any:
    """A handle of the cluster's store with this configuration; the first caller starts it, all others share it.

    A handle outlives a crash of the actor (it is restarted), but not its idle exit: on ActorDiedError get a new one.
    """
    config = config or StoreConfig()
    actor = ray.remote(AdapterStoreActor).options(
        name=store_name(sources, config, name),
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=3,  # a call under way when the actor dies is made again; every method may be repeated
        max_concurrency=1000,
    )
    return actor.remote(sources, config, idle_exit_s)
