"""Pages of the origins that `cors` names may ask from a browser; without the setting those of its own machine."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.http.auth import ApiKeys
from deployments.settings.app import AppArgs
from tests.serving.fakes import KEY, FakeBackend, serve

PAGE = "http://localhost:3000"
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/models", "/generate", "/generate_stream", "/", "/adapters",
         "/adapters/pin", "/health", "/stats", "/nowhere"]  # fmt: skip


def _ask(method: str, path: str, cors: tuple[str, ...] | None, origin: str = PAGE, **options: Any) -> httpx.Response:
    served = serve(FakeBackend(), keys=ApiKeys((KEY,)), cors=cors)
    headers = {"origin": origin, **options.pop("headers", {})}
    return asyncio.run(served.client.request(method, path, headers=headers, **options))


def _preflight(path: str, cors: tuple[str, ...] | None, origin: str = PAGE, method: str = "POST") -> httpx.Response:
    asked = {"access-control-request-method": method, "access-control-request-headers": "authorization,content-type"}
    return _ask("OPTIONS", path, cors, origin, headers=asked)


@pytest.mark.parametrize("path", PATHS)
def test_a_browsers_first_question_needs_no_key_and_names_the_origin(path: str):
    answer = _preflight(path, (PAGE,))
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert {"authorization", "content-type"} <= set(answer.headers["access-control-allow-headers"].lower().split(","))


@pytest.mark.parametrize("path", PATHS)
def test_where_the_setting_names_nobody_no_page_may_ask(path: str):
    answer = _preflight(path, ())
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


LOOPBACK = [
    "http://localhost",
    PAGE,
    "https://localhost:8443",
    "http://127.0.0.1:8501",
    "http://127.1.2.3",
    "http://[::1]:80",
]
FOREIGN = ["https://chat.example", "http://192.168.0.7:3000", "http://localhost.evil.example", "http://evil-localhost",
           "http://localhost:3000.evil.example", "http://127.0.0.1.evil.example", "http://evil.example/localhost",
           "http://localhost@evil.example", "null", "file://", "http://localhost:80\n", "http://127x0x0x1"]  # fmt: skip


@pytest.mark.parametrize("origin", LOOPBACK)
def test_without_the_setting_pages_of_the_browsers_own_machine_may_ask(origin: str):
    for path in PATHS:
        answer = _preflight(path, None, origin)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    headers = {"authorization": f"Bearer {KEY}"}
    answer = _ask("POST", "/v1/completions", None, origin, json={"model": "demo", "prompt": "hi\n"}, headers=headers)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("origin", FOREIGN)
def test_without_the_setting_no_other_page_may_ask(origin: str):
    assert "access-control-allow-origin" not in _preflight("/v1/completions", None, origin).headers
    assert "access-control-allow-origin" not in _ask("GET", "/health", None, origin).headers


@pytest.mark.parametrize("path", ["/adapters", "/adapters/pin"])
def test_a_page_of_another_port_changes_nothing_without_a_key(path: str):
    """Every program of this machine can serve pages; what is served they may not change."""
    served = serve(FakeBackend())
    body = {"name": "x", "source": "local", "location": "alpha"} if path == "/adapters" else {"name": "alpha"}
    answer = asyncio.run(served.client.post(path, json=body, headers={"origin": PAGE}))
    assert (answer.status_code, answer.json()["error"]["code"], served.adapters.calls) == (403, "cross_origin", [])


@pytest.mark.parametrize("origin", ["http://localhost:3001", "https://localhost:3000", "null", PAGE + ".evil.example"])
def test_another_page_may_not_ask(origin: str):
    assert _preflight("/v1/completions", (PAGE,), origin).status_code == 400
    assert "access-control-allow-origin" not in _ask("GET", "/health", (PAGE,), origin).headers


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_reads_answers_streams_and_the_header_of_inert_fields(stream: bool):
    body = {"model": "demo", "prompt": "hi\n", "stream": stream, "length_penalty": 1}
    headers = {"authorization": f"Bearer {KEY}"}
    answer = _ask("POST", "/v1/completions", (PAGE,), json=body, headers=headers)
    assert (answer.status_code, answer.headers["x-chorus-inert"]) == (200, "length_penalty")
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-chorus-inert" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("POST", "/v1/completions", 401), ("GET", "/nowhere", 401), ("GET", "/health", 200)]
)
def test_a_page_can_read_a_refusal_too(method: str, path: str, status: int):
    answer = _ask(method, path, (PAGE,))
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)


def test_all_pages_may_ask_where_the_setting_says_so():
    assert (
        _preflight("/v1/completions", ("*",), "https://anywhere.example").headers["access-control-allow-origin"] == "*"
    )


@pytest.mark.parametrize(
    "origin", ["localhost:3000", "http://h/", "http://h/path", "http://", "http://a b", "http://h?x", "*.example", ""]
)
def test_what_is_no_origin_is_refused_at_the_start(origin: str):
    with pytest.raises(ValidationError, match="no origin"):
        AppArgs.model_validate({"model": "demo/base", "model_id": "demo", "cors": [origin]})


@pytest.mark.parametrize("origin", ["*", PAGE, "https://chat.example", "app://obsidian.md", "http://[::1]:80"])
def test_origins_are_written_as_browsers_do(origin: str):
    assert AppArgs.model_validate({"model": "demo/base", "model_id": "demo", "cors": [origin]}).cors == (origin,)
