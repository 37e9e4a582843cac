"""A source of one adapter whose every read does what a script says: arrive, break, end early, lie, hang."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from adapter_store.errors import SourceUnavailable
from adapter_store.sources.base import RangeRead, SourceFile, SourceKind, SourceListing, SourcePage
from tests.support.fake_sources import Files
from tests.support.waiting import for_ever


class Fault(NamedTuple):
    """What goes wrong in one read, after (of "flip": with) `at` bytes of what it was to bring, modulo their number."""

    kind: Literal["reset", "short", "flip", "hang", "overload"]
    at: int = 0


@dataclass
class ScriptedSource:
    """Its n-th read meets the n-th fault of `script` (None: goes well); what comes after the script goes well."""

    files: Files
    script: Iterable[Fault | None] = ()
    etag: str | None = None  # of every file; None: the MD5 of its content, as S3 has it
    sha256: str | None = None  # that comes with every answer
    listed_sha256: bool = False
    chunk_bytes: int = 1 << 20
    name: str = "scripted"
    kind: SourceKind = "local"
    reads: list[tuple[str, int, int]] = field(default_factory=list)  # file, first byte asked for, bytes written
    num_running: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self._faults: Iterator[Fault | None] = iter(self.script)
        self._num_flips = 0

    @property
    def num_bytes(self) -> int:
        """Written by all reads."""
        return sum(written for _, _, written in self.reads)

    def listing(self) -> SourceListing:
        return SourceListing(
            files=tuple(
                SourceFile(
                    name=file,
                    etag=hashlib.md5(content).hexdigest() if self.etag is None else self.etag,
                    num_bytes=len(content),
                    sha256=hashlib.sha256(content).hexdigest() if self.listed_sha256 else None,
                )
                for file, content in sorted(self.files.items())
            )
        )

    async def stat(self, name: str) -> SourceListing | None:
        return self.listing()

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        return SourcePage(names=("a",), next_cursor=None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        fault = next(self._faults, None)
        first = part.start + part.num_received
        data = bytearray(self.files[file.name][first : part.end])
        part.sha256 = self.sha256
        end = len(data)
        if fault is not None and fault.kind == "flip":
            self._num_flips += 1
            data[fault.at % len(data)] ^= self._num_flips % 256  # no two reads lie in the same way
        elif fault is not None:
            end = fault.at % len(data)
        index = len(self.reads)
        self.reads.append((file.name, first, 0))
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for start in range(0, end, self.chunk_bytes):
                part.write(bytes(data[start : min(start + self.chunk_bytes, end)]))
                self.reads[index] = (file.name, first, min(start + self.chunk_bytes, end))
                await asyncio.sleep(0)
            if fault is not None:
                await self._end(fault)
        finally:
            self.num_running -= 1

    async def close(self) -> None:
        pass

    async def _end(self, fault: Fault) -> None:
        if fault.kind == "reset":
            raise SourceUnavailable(self.name, "connection reset")
        if fault.kind == "overload":
            raise SourceUnavailable(self.name, "Please reduce your request rate (SlowDown)")
        if fault.kind == "hang":
            await for_ever()
