"""Brings one version of an adapter from its source to a packed image: downloads, checks, packs, and tries again."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from adapter_store.catalog import Version
from adapter_store.errors import AdapterRejected, AdapterTooLarge, SourceUnavailable
from adapter_store.image import PackedImage, pack_checked
from adapter_store.inspect import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, Limits, check_file_names
from adapter_store.peft_config import MAX_CONFIG_BYTES
from adapter_store.records import StoreConfig
from adapter_store.sources.base import Source, SourceChanged, SourceListing
from adapter_store.spec import Spec
from adapter_store.transfer import read_files

MAX_PAUSE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A packed image, and the sha256 (hex) of the files it was packed from."""

    packed: PackedImage
    sha256: dict[str, str]


class Fetcher:
    """At most `max_parallel_fetches` at a time, so that at most that many adapters are in memory unpacked."""

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._jitter = jitter
        self._slots = asyncio.Semaphore(config.max_parallel_fetches)
        self._limits = Limits(max_rank=config.max_rank, max_bytes=config.max_adapter_bytes)

    async def fetch(
        self, version: Version, source: Source, spec: Spec, expected: Mapping[str, str] | None = None
    ) -> Fetched:
        """Downloads and packs `version` for `spec`. `expected`: the sha256 that files must have, where they are known.

        Raises: AdapterRejected and AdapterTooLarge, from the names and sizes alone where they tell; SourceUnavailable
        after all retries; SourceChanged when the version is no longer what the source has.
        """
        name = version.key.name
        try:
            check_file_names(version.listing.names)
            listing = self._wanted(version.listing)
            async with self._slots:
                files = await self._download(version, listing, source)
                # In a thread: the loop answers others while numpy works.
                sha256 = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
                for file, digest in (expected or {}).items():
                    if sha256.get(file, digest) != digest:
                        raise AdapterRejected(f"{file} has the sha256 {sha256[file]}, {digest} is expected")
                packed = await asyncio.to_thread(pack_checked, files, spec, self._limits)
                return Fetched(packed=packed, sha256=sha256)
        except (AdapterRejected, AdapterTooLarge) as error:
            raise error.named(name) from error

    def close(self) -> None:
        """Nothing is kept open between two downloads."""

    def _wanted(self, listing: SourceListing) -> SourceListing:
        wanted = SourceListing(files=tuple(file for file in listing.files if file.name in ADAPTER_FILES))
        limits = {CONFIG_FILE: MAX_CONFIG_BYTES, WEIGHTS_FILE: self._config.max_adapter_bytes}
        for file in wanted.files:
            if file.num_bytes > limits[file.name]:
                raise AdapterTooLarge(file.name, file.num_bytes, limits[file.name])
        return wanted

    async def _download(self, version: Version, listing: SourceListing, source: Source) -> dict[str, bytes]:
        deadline = self._clock() + self._config.fetch_timeout_s
        for attempt in range(self._config.fetch_retries + 1):
            try:
                left_s = deadline - self._clock()
                files = await asyncio.wait_for(read_files(source, version.key.name, listing), left_s)
                await self._check_unchanged(version, source)
                return files
            except TimeoutError as error:
                reason = f"the download took longer than fetch_timeout_s={self._config.fetch_timeout_s:g}"
                raise SourceUnavailable(source.name, reason) from error
            except SourceUnavailable:
                pause_s = self._pause_s(attempt)
                if attempt == self._config.fetch_retries or self._clock() + pause_s >= deadline:
                    raise
                await self._sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    async def _check_unchanged(self, version: Version, source: Source) -> None:
        """Each file was the listed one when it was read; this proves that all of them were at the same time."""
        try:
            now = await asyncio.wait_for(source.stat(version.key.name), self._config.stat_timeout_s)
        except (SourceUnavailable, TimeoutError):
            return  # what was read is what was listed; a source that went down since takes nothing from that
        if now is None or now.etags != version.listing.etags:
            raise SourceChanged(version.key.name)

    def _pause_s(self, attempt: int) -> float:
        """Exponential with full jitter, so that many stores do not come back at once."""
        return float(min(MAX_PAUSE_S, self._config.retry_base_s * 2**attempt) * (0.5 + 0.5 * self._jitter()))
