"""Reads an adapter's files from a source as they come, without the downloader and its retries."""

import hashlib

from adapter_store.sources.base import RangeRead, Source, SourceChanged, SourceListing, distrust


async def read_files(source: Source, name: str, listing: SourceListing) -> dict[str, bytes]:
    """The content of the listed files. Raises: SourceChanged, SourceUnavailable."""
    contents = {}
    for file in listing.files:
        content = bytearray(file.num_bytes)
        await source.read(name, file, RangeRead(0, memoryview(content)))
        if file.sha256 is not None and hashlib.sha256(content).hexdigest() != file.sha256:
            distrust(source, name)
            raise SourceChanged(f"{name}/{file.name}")
        contents[file.name] = bytes(content)
    return contents
