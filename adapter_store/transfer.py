"""Reads an adapter's files from its source."""

from __future__ import annotations

import asyncio
import hashlib

from adapter_store.sources.base import RangeRead, Source, SourceChanged, SourceFile, SourceListing, distrust


async def read_files(source: Source, name: str, listing: SourceListing) -> dict[str, bytes]:
    """The content of the listed files, read at the same time.

    Raises: SourceChanged, SourceUnavailable.
    """
    contents = await asyncio.gather(*(_read_file(source, name, file) for file in listing.files))
    return {file.name: content for file, content in zip(listing.files, contents, strict=True)}


async def _read_file(source: Source, name: str, file: SourceFile) -> bytes:
    content = bytearray(file.num_bytes)
    part = RangeRead(0, memoryview(content))
    try:
        await source.read(name, file, part)
    finally:
        part.cancel()
    if file.sha256 is not None and hashlib.sha256(content).hexdigest() != file.sha256:
        distrust(source, name)
        raise SourceChanged(f"{name}/{file.name}")
    return bytes(content)
