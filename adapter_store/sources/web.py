"""An HTTP client for sources: a token for one origin alone, few redirects, ranges.

httpx in threads, not in the event loop: whoever reads may be slowed down (`RangeRead.write` blocks), and downloads have
a niceness, which only threads have.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import httpx

from adapter_store.errors import SourceUnavailable, StoreConfigInvalid
from adapter_store.sources.base import RangeRead, SourceChanged, SourceConfig, SourceFile
from adapter_store.sources.ranges import WrongRange, num_bytes_to_skip, range_header
from adapter_store.sources.redirects import may_follow
from adapter_store.sources.threads import MAX_LOOKUPS

MAX_REDIRECTS = 5
MAX_REPLY_BYTES = 8 << 20  # of an answer that is read whole
# Where hubs keep the files themselves.
_KNOWN_REDIRECTS = {"huggingface.co": ("*.huggingface.co", "*.hf.co")}
_PAUSE_S = 0.1
_SHORT_BYTES = 4096  # a body that is read to its end although nobody wants it
_BUSY = (502, 503, 504)  # tried again


class WebClient:
    """Requests of one source. `base` is the only origin that gets the token.

    All methods block and raise SourceUnavailable when the server does not answer, or not as HTTP says.
    """

    def __init__(self, name: str, base: str, config: SourceConfig, max_lookups: int = MAX_LOOKUPS) -> None:
        self.base = httpx.URL(base)
        self._name = name
        self._token = config.token
        self._redirect_hosts = (*config.redirect_hosts, *_KNOWN_REDIRECTS.get(self.base.host, ()))
        self._is_closed = False
        self._max_attempts = max(1, config.max_attempts)
        self._client = httpx.Client(
            verify=_tls(config.verify_tls),
            timeout=httpx.Timeout(config.read_timeout_s, connect=config.connect_timeout_s),
            limits=httpx.Limits(max_connections=config.max_connections + max_lookups),
            # Bodies as they are stored: a compressed range is no range of the file.
            headers={"Accept-Encoding": "identity", "User-Agent": "chorus-adapter-store"},
        )

    def close(self) -> None:
        """Closes all connections."""
        self._is_closed = True
        self._client.close()

    def is_own(self, url: httpx.URL) -> bool:
        """Whether `url` has the scheme, host and port of the base."""
        return (url.scheme, url.host, url.port) == (self.base.scheme, self.base.host, self.base.port)

    @contextmanager
    def open(
        self, method: str, url: httpx.URL, headers: dict[str, str], with_token: bool = True
    ) -> Iterator[httpx.Response]:
        """The answer behind all redirects, its body not read yet."""
        try:
            response = self._send(method, url, headers, with_token)
            try:
                yield response
            finally:
                if not self._is_closed:  # nobody would close what comes back to a pool that was
                    _finish(response)
                response.close()  # of a body that was not read to its end this closes the connection
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise SourceUnavailable(self._name, f"{type(error).__name__}: {error} ({shown(url)})") from error

    def read(
        self,
        url: httpx.URL,
        headers: dict[str, str],
        file: SourceFile,
        part: RangeRead,
        check: Callable[[httpx.Response], None],
        with_token: bool = True,
    ) -> None:
        """Writes what `part` misses of `file`. `check` looks at the answer's status and headers first."""
        if not part.num_missing:
            return
        with self.open("GET", url, {**headers, "Range": range_header(part)}, with_token) as response:
            if response.status_code in (404, 410, 412, 416):
                raise SourceChanged(f"{shown(url)}: {response.status_code}")
            check(response)
            if response.status_code not in (200, 206):
                raise SourceUnavailable(self._name, f"{shown(url)} answered {response.status_code}")
            try:
                skip = num_bytes_to_skip(file, part, response.headers.get("Content-Range"), content_length(response))
            except WrongRange as error:
                raise SourceUnavailable(self._name, str(error)) from error
            _receive(response, skip, part)
        if part.num_missing:
            raise SourceUnavailable(self._name, f"{shown(url)} ended {part.num_missing} bytes early")

    def reply(self, url: httpx.URL, headers: dict[str, str]) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and body of an answer that must be small."""
        with self.open("GET", url, headers) as response:
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MAX_REPLY_BYTES:
                    raise SourceUnavailable(self._name, f"{shown(url)} answered more than {MAX_REPLY_BYTES} bytes")
            return response.status_code, response.headers, bytes(body)

    def _send(self, method: str, url: httpx.URL, headers: dict[str, str], with_token: bool) -> httpx.Response:
        first = url
        for _ in range(MAX_REDIRECTS + 1):
            # Whoever is redirected to does not get the token.
            own = {"Authorization": f"Bearer {self._token}"} if with_token and self._token and self.is_own(url) else {}
            response = self._try(self._client.build_request(method, url, headers={**headers, **own}))
            if not response.has_redirect_location:
                if response.headers.get("Content-Encoding", "identity") not in ("identity", ""):
                    response.close()
                    raise SourceUnavailable(self._name, f"{shown(url)} is compressed; let the server send it as it is")
                return response
            response.close()
            target = url.join(response.headers["Location"])
            if not may_follow(url, target, self._redirect_hosts):
                raise SourceUnavailable(
                    self._name,
                    f"{shown(url)} redirects to {shown(target)}; only the same host is followed, and those that "
                    "redirect_hosts names, and never from https to http",
                )
            url = target
        raise SourceUnavailable(self._name, f"{shown(first)} redirects more than {MAX_REDIRECTS} times")

    def _try(self, request: httpx.Request) -> httpx.Response:
        for attempt in range(1, self._max_attempts + 1):
            try:
                response = self._client.send(request, stream=True)
            except httpx.TransportError:
                if attempt == self._max_attempts:
                    raise
            else:
                if response.status_code not in _BUSY or attempt == self._max_attempts:
                    return response
                response.close()
            time.sleep(_PAUSE_S * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def shown(url: httpx.URL) -> str:
    """`url` without what may be secret in it: a presigned one has its signature in the query."""
    return str(url.copy_with(query=None, fragment=None, userinfo=b""))


def content_length(response: httpx.Response) -> int | None:
    """Bytes of the body, if the answer tells."""
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _receive(response: httpx.Response, skip: int, part: RangeRead) -> None:
    ends_with_part = content_length(response) == skip + part.num_missing
    for chunk in response.iter_raw():  # as it arrives: what came before a break counts
        fresh = memoryview(chunk)[skip:]
        skip -= len(chunk) - len(fresh)
        part.write(fresh[: part.num_missing])
        if not part.num_missing and not ends_with_part:
            return


def _finish(response: httpx.Response) -> None:
    """Reads a short body that nobody wanted: its connection is worth more than its bytes."""
    num_bytes = content_length(response)
    if response.is_stream_consumed or num_bytes is None or num_bytes > _SHORT_BYTES:
        return
    with suppress(httpx.HTTPError, OSError):
        for _ in response.iter_raw():
            pass


def _tls(verify: bool | str) -> ssl.SSLContext | bool:
    if not isinstance(verify, str):
        return verify and _known_authorities()
    try:
        return ssl.create_default_context(cafile=verify)
    except (OSError, ssl.SSLError) as error:
        raise StoreConfigInvalid("verify_tls", f"{verify!r} is no bundle of certificates: {error}") from error


@cache  # reading the bundle takes a while, and all sources may share it
def _known_authorities() -> ssl.SSLContext:
    return httpx.create_ssl_context()
