"""Adapters that were registered by name: rows of the index, each standing for an adapter of a configured source."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from adapter_store.errors import AdapterNameInvalid, AdapterRejected, RegistrationInvalid, SourceUnavailable
from adapter_store.image.inspect import ADAPTER_FILES
from adapter_store.names.database import IndexUnavailable
from adapter_store.names.index import CATALOG, Index
from adapter_store.records import Registration, check_name
from adapter_store.sources.base import (
    RangeRead,
    Source,
    SourceChanged,
    SourceFile,
    SourceKind,
    SourceListing,
    SourcePage,
    distrust,
)

MAX_ROWS = 100_000  # of one call
_MAX_LISTED = 10_000
_MAX_LOCATION_CHARS = 400
_MAX_URL_CHARS = 8192
LOST_URLS = (
    "it was registered with URLs that were not kept over a restart of the store; register it again "
    "(adapters.url_key_env names a key under which they are kept)"
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Parts of a presigned URL that change with every signature, not with the file: S3, Google, CloudFront.
_SIGNATURE = re.compile(r"(?i:x-amz-.*|x-goog-.*|awsaccesskeyid|signature|expires|key-pair-id|policy)")


@runtime_checkable
class ReadsUrls(Protocol):
    """A source that also reads adapters at URLs of its own host."""

    def check_url(self, url: str) -> None:
        """Raises: AdapterRejected when the source may not ask `url`."""

    async def stat_urls(self, urls: Mapping[str, str]) -> SourceListing | None:
        """The files (name -> URL) as they are now; each with its URL as its location."""


class CatalogSource:
    """Named "catalog". It finds the row and leaves listing and reading to the source that the row names.

    A listing says where it comes from, so that a row that is moved elsewhere is another version.
    """

    kind: SourceKind = "catalog"
    name = CATALOG

    def __init__(self, index: Index, sources: Sequence[Source]) -> None:
        self._index = index
        self._sources = {source.name: source for source in sources}
        self._listed: dict[str, tuple[str, str]] = {}  # name -> source and location, of those asked for last

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`."""
        row = await self._row(name)
        self._listed.pop(name, None)
        if row is None:
            return None
        if row.has_lost_urls:
            raise AdapterRejected(LOST_URLS, name)
        self._listed[name] = (row.source, row.location or row.name)
        if len(self._listed) > _MAX_LISTED:
            del self._listed[next(iter(self._listed))]
        source = self._sources.get(row.source)
        if source is None:
            raise SourceUnavailable(
                self.name, f"adapter {name!r} is registered in {row.source!r}, which is not configured"
            )
        try:
            if row.urls and isinstance(source, ReadsUrls):
                listing = await source.stat_urls(dict(row.urls))
            else:
                listing = await source.stat(row.location or row.name)
        except AdapterRejected as error:
            raise error.named(name) from error
        if listing is None:
            return None
        return SourceListing(files=tuple(_wrapped(file, row) for file in listing.files), origin=origin(row))

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """See `Source.list`."""
        try:
            names = await self._index.list_registered(cursor, limit + 1)
        except IndexUnavailable as error:
            raise SourceUnavailable(self.name, str(error)) from error
        more = len(names) > limit
        return SourcePage(names=names[:limit], next_cursor=names[limit - 1] if more else None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`."""
        source_name, location, inner = json.loads(file.location)
        source = self._sources.get(source_name)
        if source is None:
            raise SourceChanged(name)
        await source.read(location, replace(file, location=inner), part)

    async def close(self) -> None:
        """The sources are closed by whoever opened them."""

    def is_registered(self, name: str) -> bool:
        """Whether there was a row when `stat` was asked for `name` last."""
        return name in self._listed

    def distrust(self, name: str) -> None:
        """See `Remembers.distrust`."""
        source, location = self._listed.get(name, ("", ""))
        if source in self._sources:
            distrust(self._sources[source], location)

    async def expected(self, name: str) -> dict[str, str]:
        """The digests that a row says its files have."""
        row = await self._row(name)
        return dict(row.sha256) if row is not None else {}

    async def _row(self, name: str) -> Registration | None:
        try:
            return await self._index.registered(name)
        except IndexUnavailable as error:
            raise SourceUnavailable(self.name, str(error)) from error


def check_rows(rows: Sequence[Registration], sources: Mapping[str, Source]) -> None:
    """Raises: RegistrationInvalid for the first row that can never be served."""
    if len(rows) > MAX_ROWS:
        raise RegistrationInvalid(
            rows[0].name, f"it comes with {len(rows)} rows, a call may have {MAX_ROWS}; send less"
        )
    for row in rows:
        try:
            check_name(row.name)
        except AdapterNameInvalid as error:
            raise RegistrationInvalid(str(row.name), error.reason) from error
        reason = _fault(row, sources)
        if reason:
            raise RegistrationInvalid(row.name, reason)


def _fault(row: Registration, sources: Mapping[str, Source]) -> str | None:
    source = sources.get(row.source)
    if source is None:
        return f"no source is named {row.source!r}; configured: {', '.join(sources) or 'none'}"
    for file, digest in row.sha256:
        if file not in ADAPTER_FILES:
            return f"sha256 names the file {file!r}, not one of {', '.join(sorted(ADAPTER_FILES))}"
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            return f"sha256 of {file} is {digest!r}, not 64 lower-case hexadecimal digits"
    if row.urls:
        return "it has a location and urls; give one of them" if row.location else _url_fault(row, source)
    if not isinstance(row.location, str) or len(row.location) > _MAX_LOCATION_CHARS:
        return f"its location is no string of at most {_MAX_LOCATION_CHARS} characters"
    if source.kind != "hub" and row.location:
        try:
            check_name(row.location)
        except AdapterNameInvalid as error:
            return f"its location is no adapter name: {error.reason}"
    return None


def _url_fault(row: Registration, source: Source) -> str | None:
    if not isinstance(source, ReadsUrls):
        return f"it has urls, and source {row.source!r} is {source.kind!r}; only an http source reads URLs"
    names = [file for file, _ in row.urls]
    if sorted(names) != sorted(ADAPTER_FILES):
        return (
            f"its urls name {', '.join(map(str, names))}; one for each of {', '.join(sorted(ADAPTER_FILES))} is needed"
        )
    for file, url in row.urls:
        if not isinstance(url, str) or len(url) > _MAX_URL_CHARS:
            return f"the URL of {file} is no string of at most {_MAX_URL_CHARS} characters"
        try:
            source.check_url(url)
        except AdapterRejected as error:
            return f"the URL of {file}: {error.reason}"
    return None


def _wrapped(file: SourceFile, row: Registration) -> SourceFile:
    return replace(file, location=json.dumps([row.source, row.location or row.name, file.location]))


def origin(row: Registration) -> str:
    """What tells rows apart that stand for different places or contents."""
    urls = [(file, _unsigned(url)) for file, url in sorted(row.urls)]
    described = json.dumps([row.source, row.location or row.name, urls, sorted(row.sha256)])
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _unsigned(url: str) -> str:
    parts = urlsplit(url)
    query = [(key, value) for key, value in parse_qsl(parts.query, True) if not _SIGNATURE.fullmatch(key)]
    return urlunsplit(parts._replace(query=urlencode(query)))
