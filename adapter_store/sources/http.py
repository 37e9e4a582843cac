"""Adapters on a web server: `https://host/prefix/<adapter name>/adapter_config.json`, or at registered URLs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx

from adapter_store.errors import AdapterRejected, SourceUnavailable
from adapter_store.image.inspect import ADAPTER_FILES, KNOWN_FILES
from adapter_store.records import check_name
from adapter_store.sources.base import (
    RangeRead,
    SourceChanged,
    SourceConfig,
    SourceFile,
    SourceKind,
    SourceListing,
    SourcePage,
)
from adapter_store.sources.ranges import WrongRange, digest_or_none, parse_content_range
from adapter_store.sources.threads import MAX_LOOKUPS, SourceThreads
from adapter_store.sources.web import WebClient, content_length, shown

_NO_FILE = (404, 410)
_NO_SUCH_METHOD = (405, 501)
_MAX_LOOKUPS = len(ADAPTER_FILES) * MAX_LOOKUPS  # a name that is not there takes a request for each file
_OTHER_FILES = tuple(name for name in KNOWN_FILES if name not in ADAPTER_FILES)


class HttpSource:
    """One host. A version is the strong ETags of its files; where a server has none, Last-Modified and the size.

    The server must answer 404 for a file that is not there.
    """

    kind: SourceKind = "http"

    def __init__(self, config: SourceConfig, niceness: int = 0) -> None:
        self.name = config.label
        self._prefix = config.uri.rstrip("/")
        self._web = WebClient(self.name, config.uri, config, _MAX_LOOKUPS)
        self._threads = SourceThreads(config.max_connections, "adapters-http", niceness, _MAX_LOOKUPS)

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`. Two requests for an adapter that is not there, one a known file for one that is."""
        folder = f"{self._prefix}/{check_name(name)}"
        found = await self._look({file: f"{folder}/{file}" for file in ADAPTER_FILES})
        if not found:
            return None
        # Files that mean something that is not served; a web server does not list what it has.
        found += await self._look({file: f"{folder}/{file}" for file in _OTHER_FILES})
        return SourceListing(files=tuple(sorted(found, key=lambda file: file.name)))

    async def stat_urls(self, urls: Mapping[str, str]) -> SourceListing | None:
        """The files of an adapter at these URLs (file name -> URL), presigned ones say; None when none is there.

        They carry their own right: the source's token is not sent with them. Their host is the source's, or they are
        refused: what is registered must not make the store ask anybody else.
        Raises: AdapterRejected for a file name or a host that is not allowed; SourceUnavailable.
        """
        for file, url in urls.items():
            if file not in KNOWN_FILES:
                raise AdapterRejected(f"{file!r} is no file of an adapter; register {' and '.join(ADAPTER_FILES)}")
            self._own(url)
        found = await self._look(urls, explicit=True)
        if not found:
            return None
        return SourceListing(files=tuple(sorted(found, key=lambda file: file.name)))

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """An empty page: a web server cannot be listed."""
        return SourcePage(names=(), next_cursor=None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`. Asks for the range, and only if the file is the listed one."""
        await self._threads.read(self._read, name, file, part)

    async def close(self) -> None:
        """See `Source.close`."""
        self._threads.close()
        self._web.close()

    async def _look(self, urls: Mapping[str, str], explicit: bool = False) -> tuple[SourceFile, ...]:
        looks = (self._threads.look(self._stat, file, url, explicit) for file, url in urls.items())
        return tuple(file for file in await asyncio.gather(*looks) if file is not None)

    def _stat(self, file: str, address: str, explicit: bool) -> SourceFile | None:
        """Asks with GET for one byte: a presigned URL is signed for its method, so HEAD would be refused."""
        url = self._own(address) if explicit else httpx.URL(address)
        found = self._head("GET", url, {"Range": "bytes=0-0"}, explicit)
        if found is not None and found[0] is None and not explicit:
            found = self._head("HEAD", url, {}, explicit)
        if found is None:
            return None
        num_bytes, headers = found
        if num_bytes is None:
            raise SourceUnavailable(
                self.name, f"{shown(url)} has no known size; let the server send Content-Length or Content-Range"
            )
        etag = _validator(headers, num_bytes)
        if etag is None:
            raise SourceUnavailable(
                self.name,
                f"{shown(url)} has neither a strong ETag nor Last-Modified, so a new upload could not be told from the "
                "old one; let the server send one of them",
            )
        digest = digest_or_none(headers.get("x-amz-meta-sha256"))
        location = address if explicit else ""
        return SourceFile(name=file, etag=etag, num_bytes=num_bytes, sha256=digest, location=location)

    def _head(
        self, method: str, url: httpx.URL, headers: dict[str, str], explicit: bool
    ) -> tuple[int | None, httpx.Headers] | None:
        """(bytes of the whole file if told, headers); None when there is no such file."""
        with self._web.open(method, url, headers, with_token=not explicit) as response:
            status = response.status_code
            if status in _NO_FILE:
                return None
            if status in _NO_SUCH_METHOD and method == "GET":
                return None, response.headers
            if status not in (200, 206, 416):
                raise self._refused(url, status, explicit)
            content_range = response.headers.get("Content-Range")
            if content_range is None:
                return (content_length(response) if status == 200 else None), response.headers
            try:
                return parse_content_range(content_range)[2], response.headers
            except WrongRange as error:
                raise SourceUnavailable(self.name, f"{shown(url)}: {error}") from error

    def _read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        explicit = bool(file.location)
        url = self._own(file.location) if explicit else httpx.URL(f"{self._prefix}/{check_name(name)}/{file.name}")

        def check(response: httpx.Response) -> None:
            if response.status_code not in (200, 206):
                raise self._refused(url, response.status_code, explicit)
            if _validator(response.headers, file.num_bytes) != file.etag:  # a server may ignore conditions
                raise SourceChanged(f"{name}/{file.name}")

        self._web.read(url, _condition(file.etag), file, part, check, with_token=not explicit)

    def check_url(self, url: str) -> None:
        """Raises: AdapterRejected when the source may not ask `url`."""
        self._own(url)

    def _own(self, address: str) -> httpx.URL:
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL as error:
            raise AdapterRejected(f"{address[:80]!r} is no URL: {error}") from error
        if not self._web.is_own(url) or url.userinfo:
            raise AdapterRejected(
                f"{shown(url)} is not at {self._web.base.scheme}://{self._web.base.netloc.decode()}, the only place "
                f"that source {self.name!r} may ask; configure a source for that host"
            )
        return url

    def _refused(self, url: httpx.URL, status: int, explicit: bool) -> SourceUnavailable:
        remedy = ""
        if status in (400, 401, 403) and explicit:
            remedy = "; its signature may have expired: register a new one"
        elif status in (401, 403):
            remedy = "; check token, and let the server answer 404 for what is not there"
        return SourceUnavailable(self.name, f"{shown(url)} answered {status}{remedy}")


def _validator(headers: httpx.Headers, num_bytes: int) -> str | None:
    """What identifies the content: a weak ETag promises no equal bytes."""
    etag = headers.get("ETag", "")
    if etag.startswith('"'):
        return str(etag)
    modified = headers.get("Last-Modified")
    return f"{modified};{num_bytes}" if modified else None


def _condition(etag: str) -> dict[str, str]:
    # Not If-Range: an answer to that may leave out Last-Modified, and then there is nothing to compare.
    return {"If-Match": etag} if etag.startswith('"') else {"If-Unmodified-Since": etag.rsplit(";", 1)[0]}
