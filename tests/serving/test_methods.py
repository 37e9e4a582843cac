"""HEAD, OPTIONS, methods that a path does not have and query parameters that a route does not have, on every path."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from deployments.http.auth import ApiKeys
from tests.serving.fakes import KEY, Served, serve

SERVED = serve()
GETS = ["/health", "/stats", "/v1/models", "/v1/models/demo", "/v1/models/alpha", "/adapters", "/adapters?limit=2",
        "/openapi.json", "/docs", "/v1/models/none", "/adapters?limit=0", "/nowhere",
        "/", "/info", "/startup"]  # fmt: skip
POSTS = ["/v1/chat/completions", "/v1/completions", "/generate", "/generate_stream", "/", "/adapters/pin", "/tokenize"]


def _ask(method: str, path: str, served: Served = SERVED, **more: Any) -> httpx.Response:
    return asyncio.run(served.client.request(method, path, **more))


def _methods(path: str) -> set[str]:
    """By asking each: what is not 405 is there."""
    return {m for m in ("GET", "POST", "PUT", "PATCH", "DELETE") if _ask(m, path).status_code != 405}


@pytest.mark.parametrize("path", GETS)
def test_head_tells_what_get_would_without_its_body(path: str):
    get, head = _ask("GET", path), _ask("HEAD", path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert dict(head.headers) == dict(get.headers)


@pytest.mark.parametrize("path", [path for path in POSTS if path not in GETS])
def test_head_of_a_path_without_get_is_refused_with_what_it_has(path: str):
    response = _ask("HEAD", path)
    assert (response.status_code, response.content) == (405, b"")
    assert "POST" in response.headers["allow"]


def test_head_needs_a_key_where_get_needs_one():
    served = serve(keys=ApiKeys([KEY]))
    assert _ask("HEAD", "/v1/models", served).status_code == 401
    assert _ask("HEAD", "/health", served).status_code == 200
    assert _ask("HEAD", "/v1/models", served, headers={"authorization": f"Bearer {KEY}"}).status_code == 200


@pytest.mark.parametrize("path", [*POSTS, "/adapters", "/v1/models", "/health", "/stats", "/v1/models/a"])
def test_options_and_refusals_name_all_methods_of_a_path(path: str):
    there = _methods(path)
    allowed = there | {"OPTIONS"} | ({"HEAD"} if "GET" in there else set())
    options = _ask("OPTIONS", path)
    assert (options.status_code, options.content) == (204, b"")
    assert set(options.headers["allow"].split(", ")) == allowed
    for method in {"PUT", "PATCH", "TRACE", "BREW"} - there:
        response = _ask(method, path)
        assert response.status_code == 405
        assert set(response.headers["allow"].split(", ")) == allowed
        error = response.json()["error"]
        assert ", ".join(sorted(allowed)) == ", ".join(sorted(response.headers["allow"].split(", ")))
        assert response.headers["allow"] in (error if isinstance(error, str) else error["message"])


def test_options_of_a_path_that_is_not_there_is_not_found():
    assert _ask("OPTIONS", "/nowhere").status_code == 404


BODIES: dict[str, Any] = {
    "/v1/chat/completions": {"model": "demo", "messages": [{"role": "user", "content": "a"}]},
    "/v1/completions": {"model": "demo", "prompt": "a"},
    "/generate": {"inputs": "a"},
    "/generate_stream": {"inputs": "a"},
    "/": {"inputs": "a"},
    "/adapters/pin": {"name": "alpha"},
    "/adapters": {"name": "shout", "source": "local", "location": "upper"},
}


@pytest.mark.parametrize("path", ["/stats", "/v1/models", "/v1/models/demo", "/adapters"])
@pytest.mark.parametrize("query", ["mystery=1", "mystery", "Limit=1", "%F0%9F%99%82=1", "limit[]=3", "m" * 3000])
def test_an_unknown_query_parameter_is_refused_by_name(path: str, query: str):
    response = _ask("GET", f"{path}?{query}")
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "unknown_parameter"
    assert error["param"] in error["message"]
    assert len(response.content) < 600


@pytest.mark.parametrize("path", BODIES)
def test_fields_of_a_body_are_not_looked_for_in_the_query(path: str):
    response = _ask("POST", f"{path}?temperature=0", json=BODIES[path])
    assert 400 <= response.status_code < 500
    assert "'temperature'" in response.text


def test_a_misspelt_query_parameter_is_told_its_name_and_a_repeated_one_refused():
    assert "did you mean 'limit'?" in _ask("GET", "/adapters?limt=3").text
    response = _ask("GET", "/v1/models?limit=3&limit=4")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "limit")


@pytest.mark.parametrize("path", BODIES)
def test_what_asks_for_nothing_is_taken_and_named(path: str):
    response = _ask("POST", f"{path}?api-version=2024-10-21", json=BODIES[path])
    assert response.status_code == 200, response.text
    assert response.headers["x-chorus-inert"] == "api-version"
    assert _ask("GET", "/v1/models?api-version=1").headers["x-chorus-inert"] == "api-version"


def test_a_probe_may_keep_caches_away():
    response = _ask("GET", "/health?_=17&probe=kubelet")
    assert (response.status_code, response.headers["x-chorus-inert"]) == (200, "_, probe")
