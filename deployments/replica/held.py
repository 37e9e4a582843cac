"""The adapter images that a replica holds: which version a name means now, and leases for as long as they are needed.

An image is held while the engine has it or a request is about to hand it over. A held version never needs the store:
when the store is away, names go on meaning what they meant.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from adapter_store.errors import SourceUnavailable, StoreError
from adapter_store.records import AdapterRecord, Lease
from deployments.calls import Refused
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage, AdapterManifest

logger = logging.getLogger("ray.serve")

RESOLVE_WAIT_S = 1.0
MAX_NAMES = 10_000
MAX_MANIFESTS = 256  # of versions that were held before: checking one again takes a millisecond for 200 sites


class Store(Protocol):
    """The adapter store, as a replica uses it. Every method waits for a restarting store, then raises Refused."""

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord: ...

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        """The lease and the bytes of the image (a view of shared memory)."""
        ...

    def release(self, version: str) -> Coroutine[Any, Any, None]: ...


@dataclass(slots=True)
class Held:
    """One held version."""

    name: str
    version: str
    image: AdapterImage
    lease: Lease  # keeps the object's reference as long as its bytes are in use
    users: int = 0  # requests between borrowing and their end
    in_engine: bool = False  # the engine accepted a request with it and has not dropped it since


@dataclass(frozen=True, slots=True)
class _Meaning:
    version: str
    until_s: float  # monotonic


class HeldAdapters:
    """Lives on one event loop; only `dropped` may be called from other threads."""

    def __init__(
        self, store: Store, spec: ImageSpec, *, refresh_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._spec = spec
        self._refresh_s = refresh_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._meanings: dict[tuple[str, str | None], _Meaning] = {}
        self._held: dict[str, Held] = {}
        self._manifests: OrderedDict[str, AdapterManifest] = OrderedDict()  # the latest last
        self._loading: dict[tuple[str, str | None, str | None], asyncio.Task[Held]] = {}
        self._renewing: set[tuple[str, str | None]] = set()
        self._background_tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def borrowed(self, name: str, source: str | None, version: str | None) -> AsyncIterator[Held]:
        """The version that `name` means now, or exactly `version`; it is held until the block ends.

        Raises: a StoreError, Refused (`store_unavailable`), AdapterImageInvalid.
        """
        held = await self._find(name, source, version)
        held.users += 1
        try:
            yield held
        finally:
            held.users -= 1
            self._drop_unused(held)

    def dropped(self, version: str) -> None:
        """The engine has dropped `version`. Callable from any thread."""
        self._loop.call_soon_threadsafe(self._on_dropped, version)

    async def settled(self) -> None:
        """Until the leases that nobody needs any more were given back, as far as that is under way."""
        await asyncio.gather(*self._background_tasks, return_exceptions=True)

    @property
    def versions(self) -> tuple[str, ...]:
        return tuple(self._held)

    def names_of(self, versions: tuple[str, ...]) -> list[str]:
        return sorted({self._held[version].name for version in versions if version in self._held})

    @property
    def names(self) -> list[str]:
        return sorted({held.name for held in self._held.values()})

    async def _find(self, name: str, source: str | None, version: str | None) -> Held:
        if version is None:
            version = await self._meaning(name, source)
        held = self._held.get(version) if version is not None else None
        return held if held is not None else await self._load(name, source, version)

    async def _meaning(self, name: str, source: str | None) -> str | None:
        """The version that `name` means, if that one is held; None: ask for whatever it means now."""
        known = self._meanings.get((name, source))
        if known is None or known.version not in self._held:
            return None
        if self._clock() < known.until_s:
            if self._clock() >= known.until_s - self._refresh_s / 2 and (name, source) not in self._renewing:
                self._renewing.add((name, source))
                self._background(self._renew(name, source), "a name is asked for again when it is needed")
            return known.version
        try:
            return await self._ask(name, source)
        except (Refused, SourceUnavailable) as error:
            logger.warning("adapter %r goes on as version %s: %s", name, known.version[:12], error)
            self._mean(name, source, known.version)
            return known.version

    async def _ask(self, name: str, source: str | None) -> str | None:
        """What the store says that `name` means, if that version is held."""
        record = await self._store.resolve(name, source, wait_s=RESOLVE_WAIT_S)
        if record.version is None or record.version not in self._held:
            return None
        self._mean(name, source, record.version)
        return record.version

    async def _renew(self, name: str, source: str | None) -> None:
        """Asks ahead of time, so that requests for a name in steady use never wait for the store."""
        try:
            if await self._ask(name, source) is None:
                self._meanings.pop((name, source), None)
        except StoreError as error:
            if not error.retryable:
                self._meanings.pop((name, source), None)  # the next request is told why
        finally:
            self._renewing.discard((name, source))

    def _mean(self, name: str, source: str | None, version: str) -> None:
        if len(self._meanings) >= MAX_NAMES:
            self._meanings.pop(next(iter(self._meanings)))
        self._meanings[(name, source)] = _Meaning(version, self._clock() + self._refresh_s)

    async def _load(self, name: str, source: str | None, version: str | None) -> Held:
        """Single flight: a caller that goes away does not stop the others."""
        key = (name, source, version)
        task = self._loading.get(key)
        if task is None:
            task = asyncio.ensure_future(self._lease(name, source, version))
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(task)

    def _loaded(self, key: tuple[str, str | None, str | None], task: asyncio.Task[Held]) -> None:
        del self._loading[key]
        if task.cancelled() or task.exception() is not None:
            return  # told to whoever waits
        # Waiters resume after this callback: whoever is still there takes it before this check runs.
        self._loop.call_soon(self._loop.call_soon, self._drop_unused, task.result())

    async def _lease(self, name: str, source: str | None, version: str | None) -> Held:
        lease, data = await self._store.lease(name, source, version)
        if version is None:
            self._mean(name, source, lease.version)
        held = self._held.get(lease.version)
        if held is None:
            image = AdapterImage(lease.version, self._manifest(lease), data)
            held = Held(name, lease.version, image, lease)
            self._held[lease.version] = held
        return held

    def _manifest(self, lease: Lease) -> AdapterManifest:
        """Raises: AdapterImageInvalid."""
        manifest = self._manifests.pop(lease.version, None) or AdapterManifest.from_dict(lease.manifest, self._spec)
        self._manifests[lease.version] = manifest
        if len(self._manifests) > MAX_MANIFESTS:
            self._manifests.popitem(last=False)
        return manifest

    def _on_dropped(self, version: str) -> None:
        held = self._held.get(version)
        if held is not None:
            held.in_engine = False
            self._drop_unused(held)

    def _drop_unused(self, held: Held) -> None:
        if held.users or held.in_engine or self._held.get(held.version) is not held:
            return
        del self._held[held.version]
        self._background(self._store.release(held.version), "a lease was not given back and will expire")

    def _background(self, work: Coroutine[Any, Any, None], if_it_fails: str) -> None:
        task = asyncio.ensure_future(work)
        self._background_tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, if_it_fails))

    def _ended(self, task: asyncio.Task[None], if_it_fails: str) -> None:
        self._background_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: %s", if_it_fails, error)
