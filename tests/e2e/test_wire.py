"""HTTP as clients other than httpx write it: the same answers behind HAProxy and behind Serve's own proxy."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPResponse

import pytest

from tests.e2e.server import KEY, Server

LINE = "One base, many voices\n"
WAIT_S = 60.0
TEXT = LINE.strip().upper()
BODY = json.dumps({"model": "upper", "prompt": LINE, "max_tokens": 64, "temperature": 0}).encode()
STREAM = json.dumps({**json.loads(BODY), "stream": True}).encode()
LARGE = b" " * (5 << 20)


def head(line: str, *headers: str) -> bytes:
    fields = ("Host: 127.0.0.1", f"Authorization: Bearer {KEY}", "Content-Type: application/json", *headers)
    return "\r\n".join((line, *fields, "", "")).encode()


def post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    return head(f"POST /v1/completions HTTP/{version}", f"Content-Length: {len(body)}", *headers) + body


def chunked(body: bytes, size: int) -> bytes:
    parts = [body[i : i + size] for i in range(0, len(body), size)]
    written = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    return head("POST /v1/completions HTTP/1.1", "Transfer-Encoding: chunked") + written


@contextmanager
def connected(server: Server) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as connection:
        yield connection


def answer(connection: socket.socket) -> tuple[HTTPResponse, bytes]:
    response = HTTPResponse(connection)
    response.begin()
    return response, response.read()


def send(connection: socket.socket, data: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # it has heard enough, and has answered
        connection.sendall(data)


def text_of(body: bytes) -> str:
    if body.startswith(b"data: "):
        events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)
    text: str = json.loads(body)["choices"][0]["text"]
    return text


RIGHT = {
    "length": post(BODY),
    "chunks": chunked(BODY, 7),
    "one chunk": chunked(BODY, 4096),
    "stream": post(STREAM),
    "HTTP/1.0": post(BODY, version="1.0"),
    "HTTP/1.0 stream": post(STREAM, version="1.0"),
    "HTTP/1.0 that keeps alive": post(BODY, "Connection: keep-alive", version="1.0"),
    "closes": post(BODY, "Connection: close"),
    "small letters": post(BODY).replace(b"Content-Length", b"content-length").replace(b"Host", b"host"),
    "absolute form": post(BODY).replace(b" /v1", b" http://127.0.0.1/v1", 1),
}


def check_right(server: Server, request: bytes) -> None:
    with connected(server) as connection:
        send(connection, request)
        response, body = answer(connection)
    assert response.status == 200, body
    assert text_of(body) == TEXT
    assert response.getheader("x-request-id")


@pytest.mark.parametrize("name", RIGHT)
def test_a_request_is_answered_however_it_is_written(server: Server, name: str) -> None:
    check_right(server, RIGHT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_a_request_is_answered_however_it_is_written_by_either_proxy(either: Server, name: str) -> None:
    check_right(either, RIGHT[name])


UPGRADE = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==",
)
WRONG = {
    "large": (post(LARGE), 413),
    "large in chunks": (chunked(LARGE, 1 << 16), 413),
    "no HTTP": (b"HELLO\r\n\r\n", 400),
    "two lengths": (post(BODY, "Content-Length: 3"), 400),
    "WebSocket": (head("GET /v1/completions HTTP/1.1", *UPGRADE), 403),
    "no such path": (head("GET /v2/nothing HTTP/1.1"), 404),
    "method": (head("DELETE /v1/completions HTTP/1.1"), 405),
    "key": (post(BODY).replace(KEY.encode(), b"e2e-no-key-0123456789ab"), 401),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_alike(either: Server, name: str) -> None:
    request, status = WRONG[name]
    with connected(either) as connection:
        send(connection, request)
        response, body = answer(connection)
    assert response.status == status, body


@pytest.mark.slow
def test_a_client_may_be_slow_keep_its_connection_and_name_its_requests(either: Server) -> None:
    with connected(either) as connection:
        for name in ("mine-1", "mine-2"):
            request = post(BODY, f"X-Request-Id: {name}")
            for start in range(0, len(request), 40):
                send(connection, request[start : start + 40])
                time.sleep(0.02)
            response, body = answer(connection)
            assert (response.status, text_of(body)) == (200, TEXT)
            assert response.getheader("x-request-id") == name


@pytest.mark.slow
def test_who_asks_first_whether_to_go_on_is_told_so(either: Server) -> None:
    with connected(either) as connection:
        send(connection, post(BODY, "Expect: 100-continue").removesuffix(BODY))
        assert connection.recv(4096).startswith(b"HTTP/1.1 100 ")
        send(connection, BODY)
        response, body = answer(connection)
        assert (response.status, text_of(body)) == (200, TEXT)


def test_until_the_application_is_there_clients_are_told_to_try_again(server: Server) -> None:
    *refused, last = server.first_answers
    assert last[0] == 200
    assert refused, "nobody asked while it started"
    assert all(status == 503 and wait is not None for status, wait in refused), refused
