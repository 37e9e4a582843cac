"""The adapter store as a detached, named Ray actor: one for each thing that is served.

The actor's name holds the protocol version and a digest of what it serves: sources, settings, base model, and the code
itself. Programs that differ in these get two stores and never talk past each other. When an application comes back with
another, the store that it had closes, and the new one finds its index on disk (`disk_path`) or on the head node; one
that nobody calls any more leaves after `idle_exit_s`.
A restarted actor begins with an empty host: names and images are found again on disk or from the sources on demand,
specs are registered again by the callers (SpecUnknown), and `heartbeat` tells owners which leases are gone.

No secret is among what the actor is started with, as Ray keeps that readable: it reads the variables that are named.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adapter_store.cluster import RayBlobs, RayShelf, get_value, put_value
from adapter_store.records import (
    NUM_BUCKETS,
    AdapterPage,
    AdapterRecord,
    Lease,
    Registration,
    StoreConfig,
    StoreStatus,
)
from adapter_store.sources.base import SourceConfig
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore

PROTOCOL_VERSION = 4  # rises with every change to what the actor's methods take and return
NAMESPACE = "chorus"
NAME = "adapter-store"
IDLE_EXIT_S = 300.0
_CLOSE_TIMEOUT_S = 30.0
HANDOVER_S = 40.0  # then the new store begins without the disk, and has it when the old one is gone
# Calls at a time, beside 1,000 of other kinds: leases may wait for downloads, and must not keep heartbeats from coming.
_GROUPS = {"leases": 1000, "beats": 200, "bytes": 64}
_SECRETS = tuple(field.name for field in fields(SourceConfig) if not field.repr)
_NUM_ROUNDS = 600_000  # of PBKDF2 with SHA-256, as OWASP has advised since 2023: 0.2 s

T = TypeVar("T")

_log = logging.getLogger(__name__)


class AdapterStoreActor:
    """`AdapterStore` behind remote calls: the same methods, plus `protocol_version` and the idle exit."""

    def __init__(
        self,
        sources: tuple[SourceConfig, ...],
        config: StoreConfig,
        idle_exit_s: float = IDLE_EXIT_S,
        owner: str = "",
    ) -> None:
        opened = [open_source(source.with_secrets(os.environ), config.niceness) for source in sources]
        shelf = RayShelf(owner) if owner else None
        node = ray.get_runtime_context().get_node_id()
        self._store = AdapterStore(opened, RayBlobs(node), config, shelf=shelf, owner=owner)
        self._loop = asyncio.get_event_loop()
        self._apps: set[str] = set()
        self._idle_exit_s = idle_exit_s
        self._called_at = time.monotonic()
        self._calls = 0  # under way
        self._is_leaving = False
        self._watch = self._loop.create_task(self._leave_when_idle())

    @ray.method(concurrency_group="beats")
    async def protocol_version(self) -> int:
        """What this actor speaks."""
        return PROTOCOL_VERSION

    @ray.method(concurrency_group="beats")
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

    async def expect_all(self, expected: tuple[tuple[str, str | None, int], ...]) -> None:
        """See `AdapterStore.expect_all`."""
        await self._answer(self._store.expect_all(expected))

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

    async def note_pin(self, name: str, source: str | None, is_pinned: bool) -> None:
        """See `AdapterStore.note_pin`."""
        await self._answer(self._store.note_pin(name, source, is_pinned))

    async def described(self, keys: tuple[tuple[str, str], ...]) -> tuple[AdapterRecord, ...]:
        """See `AdapterStore.described`."""
        return await self._answer(self._store.described(keys))

    async def warm_set(self, spec_digest: str, budget_bytes: int) -> tuple[AdapterRecord, ...]:
        """See `AdapterStore.warm_set`."""
        return await self._answer(self._store.warm_set(spec_digest, budget_bytes))

    @ray.method(concurrency_group="leases")
    async def acquire(
        self, name: str, spec_digest: str, owner: str, version: str | None = None, source: str | None = None
    ) -> Lease:
        """See `AdapterStore.acquire`; `image` is an ObjectRef of the uint8 array."""
        return await self._answer(self._store.acquire(name, spec_digest, owner, version, source))

    @ray.method(concurrency_group="beats")
    async def release(self, version: str, owner: str, number: int | None = None) -> None:
        """See `AdapterStore.release`."""
        await self._answer(self._store.release(version, owner, number))

    @ray.method(concurrency_group="beats")
    async def heartbeat(self, owner: str, versions: tuple[str, ...], spec_digest: str | None = None) -> tuple[str, ...]:
        """See `AdapterStore.heartbeat`."""
        return await self._answer(self._store.heartbeat(owner, versions, spec_digest))

    @ray.method(concurrency_group="bytes")
    async def read_image(self, version: str, spec_digest: str, start: int, num_bytes: int) -> bytes | None:
        """See `AdapterStore.read_image`."""
        return await self._answer(self._store.read_image(version, spec_digest, start, num_bytes))

    async def list_adapters(self, cursor: str | None = None, limit: int = 100) -> AdapterPage:
        """See `AdapterStore.list_adapters`."""
        return await self._answer(self._store.list_adapters(cursor, limit))

    @ray.method(concurrency_group="beats")
    async def status(self) -> StoreStatus:
        """See `AdapterStore.status`."""
        return await self._answer(self._store.status())

    @ray.method(concurrency_group="beats")
    async def attach(self, app: str) -> None:
        """An application uses this store from now on."""
        self._apps.add(app)

    @ray.method(concurrency_group="beats")
    async def retire(self, app: str) -> bool:
        """An application has another store now: without any other it leaves, which the caller sees as its death."""
        self._apps.discard(app)
        if not self._apps:
            await self._on_loop(self.leave())
        return False

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
        return await self._on_loop(self._counted(call))

    async def _on_loop(self, call: Coroutine[Any, Any, T]) -> T:
        """Ray gives each concurrency group a thread and an event loop; the store lives on one."""
        if asyncio.get_running_loop() is self._loop:
            return await call
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._loop))

    async def _counted(self, call: Coroutine[Any, Any, T]) -> T:
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


def store_name(sources: tuple[SourceConfig, ...], config: StoreConfig, name: str = NAME, base: str = "") -> str:
    """The actor's full name: `name`, the protocol version, and a digest of what it serves and of its code.

    Whoever may list the cluster's actors reads it, so each guess at a secret in it is made to cost a while. So does the
    first call with a configuration that has any.
    """
    described = repr((sources, config, base, code_digest())).encode()  # which leaves out secrets
    name = _shard_name(name, config.shard)
    secrets = tuple(tuple(getattr(source, secret) for secret in _SECRETS) for source in sources)
    has_secrets = any(any(each) for each in secrets)
    digest = _slow_digest(repr(secrets).encode(), described) if has_secrets else hashlib.sha256(described).digest()
    return f"{name}.v{PROTOCOL_VERSION}.{digest.hex()[:12]}"


def _shard_name(name: str, shard: int) -> str:
    return f"{name}-{shard}" if shard else name


@cache
def code_digest() -> str:
    """Of the store's own program: a store that runs another is another."""
    folder = Path(__file__).parent
    files = [(path, path.read_bytes()) for path in sorted(folder.rglob("*.py"))]
    program = b"".join(f"{path.relative_to(folder)} {len(text)}\n".encode() + text for path, text in files)
    return hashlib.sha256(program).hexdigest()


@cache
def _slow_digest(secret: bytes, salt: bytes) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", secret, salt, _NUM_ROUNDS)


def get_or_create_store(
    sources: tuple[SourceConfig, ...],
    config: StoreConfig | None = None,
    *,
    namespace: str = NAMESPACE,
    name: str = NAME,
    base: str = "",
    app: str | None = None,
    takes_over: bool = True,
    idle_exit_s: float = IDLE_EXIT_S,
) -> Any:
    """A handle of the cluster's store that serves this; the first caller starts it, all others share it.

    Of several shards `config` says which. They share what is registered; each has a name and successors of its own.
    `app` is the application that asks: if it had another store before, that one is closed and this one follows, unless
    `takes_over` is False: a part of an application that was replaced gets the store of its successor.
    A handle outlives a crash of the actor (it is restarted), but not its idle exit: on ActorDiedError get a new one.

    Raises: StoreConfigInvalid for a secret that is given by value only; ValueError when the successor's store is not
    there, or of another protocol; OSError when the head node does not answer.
    """
    config = config or StoreConfig()
    full_name = store_name(sources, config, name, base)
    shown = tuple(source.without_secrets() for source in sources)
    if app is not None:
        own = _shard_name(name, config.shard)
        if (current := _succession(full_name, namespace, own, app, takes_over)) != full_name:
            return ray.get_actor(current, namespace=namespace)
        if takes_over and not config.shard:
            _retire_more(namespace, name, app, config.num_shards)
    on_ray: Any = ray.remote  # its declared types know no concurrency groups
    actor = on_ray(concurrency_groups=_GROUPS)(AdapterStoreActor).options(
        name=full_name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=3,  # a call under way when the actor dies is made again; every method may be repeated
        max_concurrency=1000,
        # Its disk is on this node; without the node it begins elsewhere.
        scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True),
    )
    leader = full_name if not config.shard else store_name(sources, replace(config, shard=0), name, base)
    owner = f"{namespace}/{name}/{app}" if app is not None else f"{namespace}/{leader}"
    handle = actor.remote(shown, config, idle_exit_s, owner)
    if app is not None:
        handle.attach.remote(app)
    return handle


def _succession(full_name: str, namespace: str, name: str, app: str, takes_over: bool) -> str:
    """The store that `app` has now: this one, after the one before was closed, or its successor's."""
    key = f"{namespace}/{name}/{app}/store"
    current = (get_value(key) or b"").decode()
    if current == full_name:
        return full_name
    if current and not takes_over:
        if current.rpartition(".")[0] != full_name.rpartition(".")[0]:
            raise ValueError(f"this application has the store {current} now, which speaks another protocol")
        return current
    put_value(key, full_name.encode())  # first: whoever loses the store before finds this one
    if current:
        _log.info("the adapter store %s follows %s", full_name, current)
        _retire(namespace, current, app)
    return full_name


def _retire(namespace: str, full_name: str, app: str) -> None:
    with suppress(ValueError, RayActorError):  # it is gone, or goes now
        ray.get(ray.get_actor(full_name, namespace=namespace).retire.remote(app), timeout=HANDOVER_S)


def _retire_more(namespace: str, name: str, app: str, num_shards: int) -> None:
    """The shards that `app` had before and has no more."""
    for shard in range(num_shards, NUM_BUCKETS):
        key = f"{namespace}/{_shard_name(name, shard)}/{app}/store"
        if not (current := (get_value(key) or b"").decode()):
            return
        put_value(key, b"")
        _retire(namespace, current, app)
