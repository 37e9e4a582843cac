"""Brings one version of an adapter from its source to a packed image: downloads, proves, checks and packs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from adapter_store.errors import AdapterRejected, AdapterTooLarge, SourceUnavailable
from adapter_store.fetch.download import Downloaded, in_pool
from adapter_store.fetch.pacing import RoomGate
from adapter_store.fetch.transfer import Downloader, parallel_fetches
from adapter_store.fetch.verify import DigestMismatch
from adapter_store.image.inspect import (
    ADAPTER_FILES,
    UPLOAD_FACTOR,
    WEIGHTS_FILE,
    Limits,
    check_file_names,
    check_upload,
)
from adapter_store.image.packing import PackedImage, pack_checked, plan_image
from adapter_store.image.peft_config import MAX_CONFIG_BYTES
from adapter_store.image.spec import Spec
from adapter_store.names.asking import ask
from adapter_store.names.catalog import Version
from adapter_store.records import StoreConfig
from adapter_store.sources.base import Source, SourceChanged, SourceListing, distrust
from adapter_store.sources.threads import nice_pool

_log = logging.getLogger(__name__)
_NUM_THREADS = 2  # that hash, check and pack: each keeps one core busy
NUM_LARGEST = 4  # so many of the largest files that are taken may be in memory unpacked, of each source


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A packed image, and the sha256 (hex) of each file it was made of, to be expected the next time."""

    packed: PackedImage
    sha256: dict[str, str]


class Fetcher:
    """At most `max_parallel_fetches` at a time from each source, and in memory unpacked at most `NUM_LARGEST` times the
    bytes that the largest may have: many small ones, or a few large.

    From each, so that a source that hangs keeps nobody from the others.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._pool = nice_pool(_NUM_THREADS, "adapters-pack", int(config.niceness))
        self._downloader = Downloader(config, clock, sleep, jitter, self._pool)
        self._gates: dict[str, RoomGate] = {}  # by source: as many as are configured
        self._limits = Limits(max_rank=config.max_rank, max_bytes=config.max_adapter_bytes)

    async def fetch(
        self, version: Version, source: Source, spec: Spec, expected: Mapping[str, str] | None = None
    ) -> Fetched:
        """Downloads and packs `version` for `spec`.

        `expected` are this project's own digests of its files (name -> sha256, hex), registered or seen before.
        Raises: AdapterRejected and AdapterTooLarge, from the names, the sizes and the header alone where they tell;
        SourceUnavailable after all retries; SourceChanged when the version is no longer what the source has.
        """
        name = version.key.name
        try:
            check_file_names(version.listing.names)
            listing = self._wanted(version.listing)
            async with self._gate(source).room(listing.num_bytes):
                downloaded = await self._download(version, listing, source, spec, expected)
                # In a thread: the loop answers others while numpy works.
                packed = await in_pool(self._pool, pack_checked, downloaded.files, spec, self._limits)
                for notice in packed.manifest.get("notices", ()):
                    _log.warning("adapter %s: %s", name, notice)
                return Fetched(packed=packed, sha256=downloaded.sha256)
        except (AdapterRejected, AdapterTooLarge) as error:
            # A listing has no proof of its own, and a damaged one must not be remembered as the adapter's fault.
            await self._ask_again(version, source)
            raise error.named(name) from error

    def close(self) -> None:
        """Ends the threads, when they have done what they are at."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _gate(self, source: Source) -> RoomGate:
        if source.name not in self._gates:
            max_bytes = NUM_LARGEST * UPLOAD_FACTOR * self._config.max_adapter_bytes
            self._gates[source.name] = RoomGate(parallel_fetches(source, self._config), max_bytes)
        return self._gates[source.name]

    def _wanted(self, listing: SourceListing) -> SourceListing:
        wanted = SourceListing(files=tuple(file for file in listing.files if file.name in ADAPTER_FILES))
        for file in wanted.files:
            if file.name == WEIGHTS_FILE:
                check_upload(file.num_bytes, self._limits)
            elif file.num_bytes > MAX_CONFIG_BYTES:
                raise AdapterRejected(f"{file.name} has {file.num_bytes} bytes, the limit is {MAX_CONFIG_BYTES}")
        return wanted

    async def _download(
        self,
        version: Version,
        listing: SourceListing,
        source: Source,
        spec: Spec,
        expected: Mapping[str, str] | None,
    ) -> Downloaded:
        name = version.key.name
        sizes = {file.name: file.num_bytes for file in listing.files}

        def check_header(files: Mapping[str, memoryview]) -> None:
            plan_image(files, spec, self._limits, sizes[WEIGHTS_FILE])

        try:
            downloaded = await self._downloader.download(source, name, listing, check_header, expected)
        except DigestMismatch as error:
            distrust(source, name)
            if error.is_own:
                raise AdapterRejected(str(error), is_own_digest=True) from error
            await self._ask_again(version, source)
            raise SourceUnavailable(source.name, f"adapter {name!r}: {error}") from error
        with contextlib.suppress(SourceUnavailable):  # going down now takes nothing from what was read
            await self._ask_again(version, source)
        return downloaded

    async def _ask_again(self, version: Version, source: Source) -> None:
        """Each file was the listed one when it was read; this proves that all of them were at the same time.

        Raises: SourceChanged, SourceUnavailable.
        """
        now = await ask(source, version.key.name, self._config.stat_timeout_s)
        if now is None or _identity(now) != _identity(version.listing):
            raise SourceChanged(version.key.name)


def _identity(listing: SourceListing) -> list[tuple[str, str, int]]:
    return [(file.name, file.etag, file.num_bytes) for file in listing.files]
