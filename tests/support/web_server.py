"""Web servers for tests: files with or without ranges, ETags and Last-Modified; whatever a test makes them do."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.support.certificates import Certificate
from tests.support.waiting import ended


@dataclass
class Ask:
    """A request: `path` without the query, header names in lower case."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    client_port: int = 0  # one for each connection


@dataclass
class Answer:
    """A response. Content-Length is added unless `headers` has Transfer-Encoding."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class WebServer:
    """Where it is, and what it was asked."""

    address: str
    asked: list[Ask] = field(default_factory=list)


@contextmanager
def web_server(answer: Callable[[Ask], Answer], certificate: Certificate | None = None) -> Iterator[WebServer]:
    """Serves `answer`s on 127.0.0.1 until the context ends, over TLS where there is a certificate."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            parts = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            ask = Ask(self.command, parts.path, parts.query, headers, self.client_address[1])
            serving.asked.append(ask)
            given = answer(ask)
            self.send_response(given.status)
            chunked = "Transfer-Encoding" in given.headers
            for name, value in given.headers.items():
                self.send_header(name, value)
            if not chunked:
                self.send_header("Content-Length", str(len(given.body)))
            self.end_headers()
            if self.command != "HEAD":
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(given.body), given.body) if chunked else given.body
                self.wfile.write(body)

        do_GET = do_HEAD = _handle

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass  # a client that hangs up in the middle is what some tests are about

    with Server(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.bundle, certificate.key)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "http" if certificate is None else "https"
        serving = WebServer(f"{scheme}://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield serving
        finally:
            server.shutdown()
            ended(thread, "the server's thread")


@dataclass
class Site:
    """Files by path, served as told. `modified` counts the seconds of Last-Modified: change it with the content."""

    files: dict[str, bytes]
    ranges: bool = True
    conditions: bool = True  # heeds If-Match and If-Unmodified-Since
    get: bool = True  # else 405
    chunked: bool = False  # tells no length to GET
    etag: str | None = '"{}"'  # around a digest of the content; None: sends none
    modified: int | None = 1000
    more_headers: dict[str, str] = field(default_factory=dict)

    def __call__(self, ask: Ask) -> Answer:
        content = self.files.get(ask.path)
        if content is None:
            return Answer(404)
        if ask.method == "GET" and not self.get:
            return Answer(405)
        headers = dict(self.more_headers)
        if self.etag is not None:
            headers["ETag"] = self.etag.format(sha256(content).hexdigest()[:16])
        if self.modified is not None:
            headers["Last-Modified"] = formatdate(self.modified, usegmt=True)
        if self.conditions and (
            ask.headers.get("if-match", headers.get("ETag")) != headers.get("ETag")
            or ask.headers.get("if-unmodified-since", headers.get("Last-Modified")) != headers.get("Last-Modified")
        ):
            return Answer(412)
        if self.chunked and ask.method == "GET":
            return Answer(200, {**headers, "Transfer-Encoding": "chunked"}, content)
        asked_range = ask.headers.get("range")
        if asked_range is None or not self.ranges or ask.method == "HEAD":
            return Answer(200, headers, content)
        first, last = (int(number) for number in asked_range.removeprefix("bytes=").split("-"))
        if first >= len(content):
            return Answer(416, {**headers, "Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
        return Answer(206, headers, part)
