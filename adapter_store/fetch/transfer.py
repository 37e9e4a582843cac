"""Downloads adapters: in parallel ranges, refused as soon as their headers tell, believed only with proof."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor

from adapter_store.fetch.download import Download, Downloaded, HeaderCheck
from adapter_store.fetch.pacing import Pacer, SourceGate
from adapter_store.fetch.parts import PartReader, Surroundings
from adapter_store.fetch.verify import EtagMemory
from adapter_store.records import StoreConfig
from adapter_store.sources.base import Source, SourceFile, SourceListing

_log = logging.getLogger(__name__)
NUM_NEAR, NUM_FAR = 4, 16  # fetches at a time: a folder keeps the packing threads busy, what is far away is waited for


def parallel_fetches(source: Source, config: StoreConfig) -> int:
    """How many adapters of `source` are fetched at a time. A registered one may lie anywhere."""
    if config.max_parallel_fetches is not None:
        return config.max_parallel_fetches
    return NUM_NEAR if source.kind == "local" else NUM_FAR


class Downloader:
    """One for all downloads of a store: they share a rate, and what is known of each source. For one event loop.

    `pool` runs what takes long: hashing and checking.
    """

    def __init__(
        self,
        config: StoreConfig,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        pool: Executor | None = None,
    ) -> None:
        self._around = Surroundings(
            config=config, pacer=Pacer(config.fetch_bytes_per_s), clock=clock, sleep=sleep, jitter=jitter
        )
        self._config = config
        self._pool = pool
        self._gates: dict[str, SourceGate] = {}  # by source: as many as are configured
        self._etags = EtagMemory()

    async def download(
        self,
        source: Source,
        name: str,
        listing: SourceListing,
        check_header: HeaderCheck,
        expected: Mapping[str, str] | None = None,
    ) -> Downloaded:
        """Reads the files of `listing`, all of them within `fetch_timeout_s`.

        `expected` are the sha256 (hex) that the files must have, by file name, as far as they are known.
        Raises: what `check_header` raises, before the weights were read; SourceUnavailable; SourceChanged;
        DigestMismatch.
        """
        timeout_s = self._config.fetch_timeout_s
        reader = PartReader(source, name, self._around, self._gate(source), self._around.clock() + timeout_s)
        download = Download(reader, listing, expected or {}, self._config.part_bytes, self._pool)
        try:
            async with asyncio.timeout(timeout_s):
                downloaded = await download.run(check_header)
        except TimeoutError as error:
            reason = f"the download took longer than fetch_timeout_s={timeout_s:g}; {download.progress()}"
            raise reader.unavailable(reason) from error
        finally:
            reader.stop()
        for file in download.disproved:
            self._disproved(source.name, name, file)
        return downloaded

    def _disproved(self, source: str, name: str, file: SourceFile) -> None:
        """Two equal reads of `file` contradict its ETag, so that one is no digest."""
        if self._etags.learn(source):
            _log.warning(
                "source %s: the ETag %s of %s/%s is no digest of its content; what has none is read twice",
                source, file.etag, name, file.name,
            )  # fmt: skip

    def _gate(self, source: Source) -> SourceGate:
        if source.name not in self._gates:
            num_fetches = parallel_fetches(source, self._config)
            self._gates[source.name] = SourceGate(self._config.max_parallel_parts * num_fetches)
        return self._gates[source.name]
