"""The adapter images that a replica holds: which version a name means now, and leases for as long as they are needed.

An image is held while the engine has it or a request is about to hand it over. A held version never needs the store:
when the store is away, names go on meaning what they meant.

Whether the engine has an image is known from the engine alone, in the order in which things happen there
(`engine.aio.owners`). A reader of answers learns of a step when it comes to read; by then the engine may have dropped
the image, and nobody would hear of it again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from adapter_store.errors import SourceUnavailable, StoreError
from adapter_store.records import Lease
from deployments.calls import Part, Refused
from deployments.replica.leases import Store
from deployments.replica.merges import Merges
from engine.aio.owners import AdapterNews
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage, AdapterManifest
from engine.lora.merging import merge_key

logger = logging.getLogger("ray.serve")

RESOLVE_WAIT_S = 1.0
MAX_NAMES = 10_000
MAX_LOOKED_AT = 16  # meanings, for one that may be forgotten without loss
MAX_MANIFESTS = 256  # of versions that were held before: checking one again takes a millisecond for 200 sites


@dataclass(slots=True)
class Held:
    """One held version."""

    name: str
    version: str
    image: AdapterImage
    lease: Lease | None  # keeps the object's reference as long as its bytes are in use; None: it was made here, of
    parts: tuple[Held, ...] = ()  # these, which are held as long as it is
    users: int = 0  # requests between borrowing and their end
    offers: int = 0  # it was handed to the engine so often without an answer yet
    in_engine: bool = False  # what the engine said last
    pin: str = ""  # what a call says that must have this and nothing newer
    is_gone: bool = False  # its lease was lost, and the store cannot give it again: what is here is the last of it


_Key = tuple[str, str | None, str | None]  # a name, its source, a version


@dataclass(frozen=True, slots=True)
class _Meaning:
    version: str
    until_s: float  # monotonic


class HeldAdapters:
    """Lives on one event loop, an `ImageOwner` of the engine; only `told` may be called from other threads."""

    def __init__(
        self,
        store: Store,
        spec: ImageSpec,
        *,
        refresh_s: float,
        merges: Merges | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._merges = merges or Merges(spec)
        self._spec = spec
        self._refresh_s = refresh_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._meanings: OrderedDict[tuple[str, str | None], _Meaning] = OrderedDict()  # the one used last is last
        self._held: dict[str, Held] = {}
        self._manifests: OrderedDict[str, AdapterManifest] = OrderedDict()  # the latest last
        self._loading: dict[_Key, asyncio.Task[Held]] = {}
        self._renewing: set[tuple[str, str | None]] = set()
        self._background_tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def borrowed(
        self, name: str, source: str | None, version: str | None, parts: Sequence[Part] = ()
    ) -> AsyncIterator[Held]:
        """The version that `name` means now, or exactly `version`; it is held until the block ends.

        With `parts` it is what these come to, and `version` theirs (see `Call`). Raises: a StoreError, Refused
        (`store_unavailable`, `queue_full`), AdapterImageInvalid, AdapterTooLarge.
        """
        if parts:
            async with AsyncExitStack() as stack:
                versions: list[str | None] = [*version.split(",")] if version else [None] * len(parts)
                borrowed = [
                    await stack.enter_async_context(self.borrowed(part.name, part.source, of_part))
                    for part, of_part in zip(parts, versions, strict=True)
                ]
                held = await self._merged(name, tuple(zip(borrowed, (part.weight for part in parts), strict=True)))
                async with self._in_use(held):
                    await stack.aclose()  # it holds its parts itself
                    yield held
            return
        held = await self._find(name, source, version)
        async with self._in_use(held):
            yield held

    @asynccontextmanager
    async def _in_use(self, held: Held) -> AsyncIterator[None]:
        held.users += 1
        try:
            yield
        finally:
            held.users -= 1
            self._drop_unused(held)

    def offered(self, key: str) -> None:
        """See `ImageOwner.offered`: by a borrower, on this event loop."""
        if (held := self._held.get(key)) is not None:
            held.offers += 1

    def told(self, news: AdapterNews) -> None:
        """See `ImageOwner.told`. Callable from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._on_news, news)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    async def beat(self) -> None:
        """Keeps the leases alive. One that the store has lost is taken again; the engine goes on with the bytes it has.

        Raises: what `Store.heartbeat` does.
        """
        beating = {version: held for version, held in self._held.items() if held.lease and not held.is_gone}
        for version in await self._store.heartbeat(tuple(held.lease for held in beating.values() if held.lease)):
            held = beating.get(version)
            if held is not None and self._held.get(version) is held:  # not given back, nor leased anew, meanwhile
                await self._lease_again(held)

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
        self._meanings.move_to_end((name, source))
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
        self._meanings[(name, source)] = _Meaning(version, self._clock() + self._refresh_s)
        self._meanings.move_to_end((name, source))
        if len(self._meanings) > MAX_NAMES:
            self._forget_a_meaning()

    def _forget_a_meaning(self) -> None:
        """One of a version that is not held, as it says nothing any more; else the one that was used longest ago."""
        oldest = tuple(islice(self._meanings, MAX_LOOKED_AT))
        unheld = (key for key in oldest if self._meanings[key].version not in self._held)
        del self._meanings[next(unheld, oldest[0])]

    async def _load(self, name: str, source: str | None, version: str | None) -> Held:
        """Single flight: a caller that goes away does not stop the others."""
        return await self._once((name, source, version), lambda: self._lease(name, source, version))

    async def _once(self, key: _Key, load: Callable[[], Coroutine[Any, Any, Held]]) -> Held:
        task = self._loading.get(key)
        if task is None:
            task = asyncio.ensure_future(load())
            self._loading[key] = task
            task.add_done_callback(lambda done: self._loaded(key, done))
        return await asyncio.shield(task)

    def _loaded(self, key: _Key, task: asyncio.Task[Held]) -> None:
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
            try:
                image = AdapterImage(lease.version, self._manifest(lease), data)
            except BaseException:
                self._give_back(lease)
                raise
            held = Held(name, lease.version, image, lease, pin=lease.version)
            self._held[lease.version] = held
        else:
            held.lease, held.is_gone = lease, False  # the lease that was before has ended with it
        return held

    async def _merged(self, name: str, parts: tuple[tuple[Held, float], ...]) -> Held:
        """What borrowed `parts` come to, each with its weight: held already, or made now, once for all who ask."""
        key = merge_key((part.version, weight) for part, weight in parts)
        if (held := self._held.get(key)) is not None:
            return held
        return await self._once((name, None, key), lambda: self._merge(name, key, parts))

    async def _merge(self, name: str, key: str, parts: tuple[tuple[Held, float], ...]) -> Held:
        async with AsyncExitStack() as stack:
            for part, _ in parts:  # whoever asked first may go away meanwhile
                await stack.enter_async_context(self._in_use(part))
            image = await self._merges.made(
                key, [(part.image, weight) for part, weight in parts], self._unloaded_bytes()
            )
            held = self._held.get(key)
            if held is None:
                pin = ",".join(part.version for part, _ in parts)
                held = Held(name, key, image, None, tuple(part for part, _ in parts), pin=pin)
                self._held[key] = held
                for part in held.parts:
                    part.users += 1
        return held

    def _unloaded_bytes(self) -> int:
        """Of images that were made here and the engine does not have: what waits for room there, or for its request."""
        made = (held for held in self._held.values() if held.lease is None and not held.in_engine)
        return sum(held.image.num_bytes for held in made)

    async def _lease_again(self, held: Held) -> None:
        assert held.lease is not None, "what was made here has none that could be lost"
        try:
            lease = await self._store.lease_again(held.lease)
        except (StoreError, Refused) as error:
            # The engine may be reading the image: nothing is taken from it, whatever the store says.
            held.is_gone = isinstance(error, StoreError) and not error.retryable
            logger.warning("the lease of adapter %r was lost and cannot be had again now: %s", held.name, error)
            return
        if self._held.get(held.version) is held:
            held.lease = lease
        else:
            self._give_back(lease)

    def _manifest(self, lease: Lease) -> AdapterManifest:
        """Raises: AdapterImageInvalid."""
        manifest = self._manifests.pop(lease.version, None) or AdapterManifest.from_dict(lease.manifest, self._spec)
        self._manifests[lease.version] = manifest
        if len(self._manifests) > MAX_MANIFESTS:
            self._manifests.popitem(last=False)
        return manifest

    def _on_news(self, news: AdapterNews) -> None:
        told = [self._held[key] for key in (*(key for key, _ in news.changes), *news.answered) if key in self._held]
        for key, is_held in news.changes:
            if key in self._held:
                self._held[key].in_engine = is_held
        for key in news.answered:
            if key in self._held:
                self._held[key].offers -= 1
        if news.is_over:
            told = list(self._held.values())
            for held in told:
                held.offers, held.in_engine = 0, False
        for held in told:
            self._drop_unused(held)

    def _drop_unused(self, held: Held) -> None:
        if held.users or held.offers or held.in_engine or self._held.get(held.version) is not held:
            return
        del self._held[held.version]
        if held.lease is not None:
            self._give_back(held.lease)
        for part in held.parts:
            part.users -= 1
            self._drop_unused(part)

    def _give_back(self, lease: Lease) -> None:
        self._background(self._store.release(lease), "a lease was not given back and will expire")

    def _background(self, work: Coroutine[Any, Any, None], if_it_fails: str) -> None:
        task = asyncio.ensure_future(work)
        self._background_tasks.add(task)
        task.add_done_callback(lambda done: self._ended(done, if_it_fails))

    def _ended(self, task: asyncio.Task[None], if_it_fails: str) -> None:
        self._background_tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("%s: %s", if_it_fails, error)
