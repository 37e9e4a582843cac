"""A body is read however it is packed and marked, as long as that is told; else its refusal says what to send."""

from __future__ import annotations

import asyncio
import codecs
import gzip
import json
import tracemalloc
import zlib

import httpx
import pytest

from deployments.settings.app import LimitSettings
from tests.serving.fakes import Served, serve

BODIES = {
    "/v1/completions": {"model": "demo", "prompt": "hello\n"},
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "hello"}]},
    "/generate": {"inputs": "hello\n"},
}
JSON = "application/json"
SERVED = serve()


def _raw_deflate(text: bytes) -> bytes:
    writer = zlib.compressobj(wbits=-15)
    return writer.compress(text) + writer.flush()


def _post(path: str, content: bytes, headers: dict[str, str], served: Served | None = None) -> httpx.Response:
    headers = {"content-type": JSON, **headers}
    return asyncio.run((served or SERVED).client.post(path, content=content, headers=headers))


def _message(response: httpx.Response) -> str:
    error = response.json()["error"]
    return error if isinstance(error, str) else error["message"]


READ = {
    "plain": (lambda text: text, {}),
    "identity": (lambda text: text, {"content-encoding": "identity"}),
    "a byte order mark": (lambda text: codecs.BOM_UTF8 + text, {}),
    "gzip": (gzip.compress, {"content-encoding": "gzip"}),
    "GZIP": (gzip.compress, {"content-encoding": "GZIP"}),
    "x-gzip": (gzip.compress, {"content-encoding": "x-gzip"}),
    "gzip and identity": (gzip.compress, {"content-encoding": "identity, gzip"}),
    "deflate": (zlib.compress, {"content-encoding": "deflate"}),
    "deflate without a frame": (_raw_deflate, {"content-encoding": "deflate"}),
    "gzip of a mark": (lambda text: gzip.compress(codecs.BOM_UTF8 + text), {"content-encoding": "gzip"}),
    "charset utf-8": (lambda text: text, {"content-type": JSON + "; charset=utf-8"}),
    "charset UTF8": (lambda text: text, {"content-type": JSON + '; charset="UTF8"'}),
    "charset us-ascii": (lambda text: text, {"content-type": JSON + "; charset=us-ascii"}),
    "utf-16": (lambda text: text.decode().encode("utf-16"), {"content-type": JSON + "; charset=utf-16"}),
    "utf-16 without a mark": (lambda text: text.decode().encode("utf-16-le"), {}),
    "utf-32": (lambda text: text.decode().encode("utf-32"), {}),
    "a type of JSON": (lambda text: text, {"content-type": "application/vnd.api+json"}),
}
REFUSED = {
    "br": (415, {"content-encoding": "br"}, b"x", "gzip or deflate"),
    "zstd": (415, {"content-encoding": "zstd"}, b"x", "gzip or deflate"),
    "compress": (415, {"content-encoding": "compress"}, b"x", "gzip or deflate"),
    "twice": (415, {"content-encoding": "gzip, gzip"}, gzip.compress(gzip.compress(b"{}")), "packed once"),
    "a long name": (415, {"content-encoding": "x" * 5000}, b"x", "gzip or deflate"),
    "latin-1": (415, {"content-type": JSON + "; charset=latin-1"}, b"{}", "send UTF-8"),
    "cp1252": (415, {"content-type": JSON + "; charset=windows-1252"}, b"{}", "send UTF-8"),
    "utf-7": (415, {"content-type": JSON + "; charset=utf-7"}, b"{}", "send UTF-8"),
    "no charset": (415, {"content-type": JSON + "; charset=klingon"}, b"{}", "send UTF-8"),
    "a codec that is none of texts": (415, {"content-type": JSON + "; charset=base64"}, b"{}", "send UTF-8"),
    "not gzip": (400, {"content-encoding": "gzip"}, b"{}", "pack it again"),
    "not deflate": (400, {"content-encoding": "deflate"}, b"\xff{}", "pack it again"),
    "gzip cut": (400, {"content-encoding": "gzip"}, gzip.compress(b'{"model": 1}')[:-9], "pack it again"),
    "gzip damaged": (400, {"content-encoding": "gzip"}, gzip.compress(b"{}")[:-8] + bytes(8), "pack it again"),
    "gzip and more": (400, {"content-encoding": "gzip"}, gzip.compress(b"{}") + b"{}", "pack it again"),
    "gzip of nothing": (400, {"content-encoding": "gzip"}, gzip.compress(b""), "the body is empty"),
    "nothing": (400, {}, b"", "the body is empty"),
    "a mark alone": (400, {}, codecs.BOM_UTF8, "the body is empty"),
    "half of utf-16": (400, {}, "{}".encode("utf-16")[:-1], "send UTF-8"),
    "form": (415, {"content-type": "application/x-www-form-urlencoded"}, b"a=b", "application/json"),
    "text": (415, {"content-type": "text/json"}, b"{}", "application/json"),
}  # fmt: skip


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", READ)
def test_a_body_is_read_as_it_was_meant(name: str, path: str):
    write, headers = READ[name]
    body = BODIES[path]
    text = json.dumps(body | {"max_tokens": 32} if path != "/generate" else body).encode()
    response = _post(path, write(text), headers)
    assert response.status_code == 200, response.text
    assert "hello" in response.text


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", REFUSED)
def test_a_body_that_cannot_be_read_is_refused_with_what_to_send(name: str, path: str):
    status, headers, content, told = REFUSED[name]
    response = _post(path, content, headers)
    assert response.status_code == (422 if path == "/generate" and status == 400 else status), response.text
    assert told in _message(response)
    assert len(response.content) < 600
    assert response.headers.get("accept-encoding") == ("gzip, deflate" if "gzip or deflate" in told or name == "twice"
                                                       else None)  # fmt: skip


def test_text_beyond_ascii_survives_each_encoding():
    for codec in ("utf-8", "utf-8-sig", "utf-16", "utf-32-be"):
        served = serve(None)
        body = json.dumps({"model": "demo", "prompt": "grüß 🙂"}, ensure_ascii=False)
        _post("/v1/completions", body.encode(codec), {}, served)
        (call,) = served.backend.calls
        assert bytes(call.prompt_token_ids).decode() == "grüß 🙂"


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_of_a_bomb_no_more_is_unpacked_than_the_limit(wbits: int):
    limit = 200_000
    writer = zlib.compressobj(9, wbits=wbits)
    bomb = b"".join(writer.compress(b"[" * 2**20) for _ in range(100)) + writer.flush()
    assert len(bomb) < limit
    served = serve(limits=LimitSettings(max_body_bytes=limit))
    coding = "gzip" if wbits == 31 else "deflate"
    tracemalloc.start()
    try:
        response = _post("/v1/completions", bomb, {"content-encoding": coding}, served)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert response.status_code == 413
    assert str(limit) in _message(response)
    assert peak < 20 * limit  # 100 MiB are 500 of them


def test_a_packed_body_of_just_the_limit_is_read():
    text = json.dumps(BODIES["/v1/completions"]).encode() + b" " * 500
    served = serve(limits=LimitSettings(max_body_bytes=len(text)))
    assert _post("/v1/completions", zlib.compress(text), {"content-encoding": "deflate"}, served).status_code == 200
    longer = zlib.compress(text + b" ")
    assert _post("/v1/completions", longer, {"content-encoding": "deflate"}, served).status_code == 413
