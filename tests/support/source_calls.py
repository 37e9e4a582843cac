"""What every test of a source does: run calls, read an adapter whole, and look at the reason of a refusal."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from adapter_store.errors import SourceUnavailable
from adapter_store.sources.base import RangeRead, Source, SourceChanged, SourceFile, SourceListing, distrust
from tests.support.waiting import happened, until_async, within


def run(source: Source, *calls: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Awaits the calls one after the other, closes the source, and returns their results."""

    async def main() -> list[Any]:
        try:
            return [await call() for call in calls]
        finally:
            await source.close()

    return asyncio.run(main())


async def read_range(source: Source, name: str, file: SourceFile, start: int = 0, end: int | None = None) -> bytes:
    """Bytes `start` .. `end - 1` of a file."""
    content = bytearray((file.num_bytes if end is None else end) - start)
    part = RangeRead(start, memoryview(content))
    await source.read(name, file, part)
    assert part.num_missing == 0
    return bytes(content)


async def read_all(source: Source, name: str, listing: SourceListing | None = None) -> dict[str, bytes]:
    """The files of an adapter, each in two ranges."""
    listing = listing or await source.stat(name)
    assert listing is not None
    found = {}
    for file in listing.files:
        middle = file.num_bytes // 2
        found[file.name] = await read_range(source, name, file, 0, middle)
        found[file.name] += await read_range(source, name, file, middle)
    return found


async def read_files(source: Source, name: str, listing: SourceListing) -> dict[str, bytes]:
    """`read_all`, believed as the downloader believes it where the listing tells a digest. Raises: SourceChanged."""
    contents = await read_all(source, name, listing)
    for file in listing.files:
        if file.sha256 is not None and hashlib.sha256(contents[file.name]).hexdigest() != file.sha256:
            distrust(source, name)
            raise SourceChanged(f"{name}/{file.name}")
    return contents


async def refused(call: Callable[[], Awaitable[Any]]) -> str:
    """The reason that the source gives for refusing."""
    with pytest.raises(SourceUnavailable) as caught:
        await call()
    return caught.value.reason


async def all_names(source: Source, limit: int) -> list[str]:
    """What the pages of a listing hold together."""
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page = await source.list(cursor, limit)
        assert len(page.names) <= limit
        seen += page.names
        cursor = page.next_cursor
        if cursor is None:
            return seen


async def look_while_reads_wait(source: Source, name: str, num_reads: int) -> SourceListing | None:
    """What a lookup finds while so many reads of the adapter wait for their rate."""
    listing = await source.stat(name)
    assert listing is not None
    file = listing.files[0]
    paid = threading.Event()
    parts = [
        RangeRead(0, memoryview(bytearray(file.num_bytes)), lambda _: happened(paid, "the pay"))
        for _ in range(num_reads)
    ]
    reads = [asyncio.create_task(source.read(name, file, part)) for part in parts]
    try:
        await until_async(lambda: any(part.num_received for part in parts), "the first byte of a read")
        return await within(source.stat(name), "a look-up beside reads that wait")
    finally:
        paid.set()
        await asyncio.gather(*reads)
