"""One download: its parts, the check of its header, and the proof of what came."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from adapter_store.errors import AdapterRejected, AdapterTooLarge
from adapter_store.fetch.parts import PartReader, split
from adapter_store.fetch.verify import Finding, Hasher, examine, mismatch
from adapter_store.image.inspect import WEIGHTS_FILE
from adapter_store.image.safetensors_header import MIN_BYTES, num_header_bytes
from adapter_store.sources.base import SourceFile, SourceListing

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
MAX_READS = 5  # of a range until two of them are equal, the first included

# Is given the small files whole, and of the weights file its header. Raises: AdapterRejected, AdapterTooLarge.
HeaderCheck = Callable[[Mapping[str, memoryview]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Downloaded:
    """The content of each file, and its sha256 (hex): what to expect of the same version the next time."""

    files: dict[str, memoryview]
    sha256: dict[str, str]


class _File:
    """One file on its way: its bytes, its parts, and which of them are there."""

    def __init__(self, file: SourceFile, part_bytes: int) -> None:
        self.file = file
        self.content = _buffer(file.num_bytes)
        self.parts = split(0, file.num_bytes, part_bytes)
        self.received = [0] * len(self.parts)
        self.open_bytes = file.num_bytes  # parts that begin before this byte may be read
        self.hasher: Hasher | None = None  # of the content as it is; None: that has to be looked at as a whole
        self.finding: Finding | None = None

    def is_there(self, index: int) -> bool:
        """Whether all of a part was received."""
        start, end = self.parts[index]
        return self.received[index] == end - start

    @property
    def num_prefix_bytes(self) -> int:
        """How many bytes from the first on are there."""
        prefix = 0
        for index, received in enumerate(self.received):
            prefix += received
            if not self.is_there(index):
                break
        return prefix


class Download:
    """One download. Its tasks are ended by the first of them that fails. `pool` runs what takes long."""

    def __init__(
        self,
        reader: PartReader,
        listing: SourceListing,
        expected: Mapping[str, str],
        part_bytes: int,
        pool: Executor | None,
    ) -> None:
        self.disproved: list[SourceFile] = []  # files whose ETags look like digests and are none
        self._reader = reader
        self._expected = expected
        self._part_bytes = part_bytes
        self._pool = pool
        self._files = {file.name: _File(file, part_bytes) for file in listing.files}
        self._changed = asyncio.Event()

    async def run(self, check_header: HeaderCheck) -> Downloaded:
        """Raises: what `check_header` raises; SourceUnavailable; SourceChanged; DigestMismatch."""
        weights = self._files.get(WEIGHTS_FILE)
        if weights is not None:
            weights.open_bytes = 1  # the first part only, until the header was checked
        parts = [self._read_part(file, index) for file in self._files.values() for index in range(len(file.parts))]
        hashes = [self._hash(file) for file in self._files.values()]
        await all_of(*parts, *hashes, *([self._check_header(weights, check_header)] if weights is not None else []))
        await all_of(*(self._verify(file) for file in self._files.values()))
        return Downloaded(
            files={name: file.content for name, file in self._files.items()},
            sha256={name: file.finding.sha256 for name, file in self._files.items() if file.finding is not None},
        )

    def progress(self) -> str:
        """How far it came."""
        there = ", ".join(
            f"{sum(file.received)} of {file.file.num_bytes} bytes of {name}" for name, file in self._files.items()
        )
        return f"received: {there}"

    async def _read_part(self, file: _File, index: int) -> None:
        start, end = file.parts[index]

        def grew(received: int) -> None:
            file.received[index] = max(received, file.received[index])
            self._notify()

        await self._until(lambda: start < file.open_bytes)
        await self._reader.read(file.file, start, file.content[start:end], grew)
        grew(end - start)

    async def _hash(self, file: _File) -> None:
        """While the later parts are on their way."""
        file.hasher = hasher = Hasher(file.file, self._expected.get(file.file.name))
        for index, (start, end) in enumerate(file.parts):
            await self._until(partial(file.is_there, index))
            await in_pool(self._pool, hasher.update, file.content[start:end])

    # The header

    async def _check_header(self, weights: _File, check_header: HeaderCheck) -> None:
        """Lets the body come once what is known of it passes.

        The bytes it looks at have no proof yet, so a refusal is told only when a second look finds the same bytes.
        """
        small = [file for file in self._files.values() if file is not weights]
        for _ in range(MAX_READS):
            try:
                await self._until(lambda: all(sum(file.received) == file.file.num_bytes for file in small))
                header = await self._header(weights)
                files = {file.file.name: file.content for file in small} | {WEIGHTS_FILE: header}
                await in_pool(self._pool, check_header, files)
            except (AdapterRejected, AdapterTooLarge):
                if not await self._look_again(weights):
                    raise
            else:
                break
        weights.open_bytes = weights.file.num_bytes
        self._notify()

    async def _header(self, weights: _File) -> memoryview:
        num_bytes = weights.file.num_bytes
        await self._until_prefix(weights, min(MIN_BYTES, num_bytes))
        end = num_header_bytes(weights.content[: min(MIN_BYTES, num_bytes)], num_bytes)
        await self._until_prefix(weights, end)
        return weights.content[:end]

    async def _until_prefix(self, weights: _File, num_bytes: int) -> None:
        weights.open_bytes = max(weights.open_bytes, num_bytes)
        self._notify()
        await self._until(lambda: weights.num_prefix_bytes >= num_bytes)

    async def _look_again(self, weights: _File) -> bool:
        """Makes sure of the bytes that were refused; whether any of them had been wrong."""
        num_bytes = weights.file.num_bytes
        try:
            end = num_header_bytes(weights.content[:MIN_BYTES], num_bytes)
        except AdapterRejected:
            end = min(num_bytes, MIN_BYTES)
        small = [file for file in self._files.values() if file is not weights]
        corrected = await all_of(
            self._make_sure(weights, end), *(self._make_sure(file, file.file.num_bytes) for file in small)
        )
        return any(corrected)

    async def _make_sure(self, file: _File, end: int) -> bool:
        """Of the bytes up to `end`; by a digest of the file, where it is there or about to be."""
        if end == file.file.num_bytes or len(file.parts) == 1:
            await self._until(lambda: file.num_prefix_bytes == file.file.num_bytes)
            if (await self._examine(file)).belief == "confirmed":
                return False
        return await self._read_again(file, end)

    # The proof

    async def _verify(self, file: _File) -> None:
        finding = await self._examine(file, file.hasher)
        if finding.belief == "confirmed":
            return
        if await self._read_again(file, file.file.num_bytes):
            _log.warning("adapter %s: %s came damaged and was read again", self._reader.name, file.file.name)
        finding = await self._examine(file)
        if finding.belief == "contradicted":
            raise mismatch(file.file, finding)
        if finding.belief == "doubtful" and finding.has_digest_etag:
            self.disproved.append(file.file)

    async def _examine(self, file: _File, hasher: Hasher | None = None) -> Finding:
        name = file.file.name
        expected, told = self._expected.get(name), self._reader.told.get(name)
        file.finding = await in_pool(self._pool, examine, file.content, file.file, expected, told, hasher)
        return file.finding

    async def _read_again(self, file: _File, end: int) -> bool:
        """Reads the bytes up to `end` until two reads of each part agree; whether any byte was corrected."""
        parts = split(0, end, self._part_bytes)
        return any(await all_of(*(self._agree(file, start, stop) for start, stop in parts)))

    async def _agree(self, file: _File, start: int, end: int) -> bool:
        """Part by part, so that it takes little memory, and only what differs is read a third time."""
        seen = {await in_pool(self._pool, _sha256, file.content[start:end])}
        for number in range(1, MAX_READS):
            again = _buffer(end - start)
            await self._reader.read(file.file, start, again)
            digest = await in_pool(self._pool, _sha256, again)
            if digest in seen:
                if number == 1:
                    return False
                file.content[start:end], file.hasher = again, None
                return True
            seen.add(digest)
        raise self._reader.unavailable(
            f"{file.file.name}, bytes {start} to {end - 1}: no two of {MAX_READS} reads are equal; something between "
            "the source and here damages data"
        )

    # Waiting

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self._changed.wait()


def _buffer(num_bytes: int) -> memoryview:
    """Not zeroed, which would keep the loop busy: nothing of it is looked at before it was received."""
    return np.empty(num_bytes, dtype=np.uint8).data


async def in_pool(pool: Executor | None, call: Callable[..., _T], *arguments: Any) -> _T:
    """Runs what takes long in the pool's threads."""
    return await asyncio.get_running_loop().run_in_executor(pool, call, *arguments)


def _sha256(content: memoryview) -> bytes:
    return hashlib.sha256(content).digest()


async def all_of(*coroutines: Coroutine[Any, Any, _T]) -> list[_T]:
    """The results of all of them. The first that fails ends the others, and what it raised is raised."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
