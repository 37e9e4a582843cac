"""Around the answers: models, keys, tenants, limits, health, statistics."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import Any

import httpx
import pytest
from ray.exceptions import TaskCancelledError
from starlette.types import Message, Receive, Scope, Send

from adapter_store.errors import SourceUnavailable
from adapter_store.records import AdapterPage
from deployments.http.api import respond
from deployments.http.auth import ApiKeys
from deployments.http.gate import Gate
from deployments.settings.app import LimitSettings
from tests.serving.fakes import KEY, FakeBackend, Served, serve
from tests.support.waiting import for_ever

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def _post(path: str, body: Any, served: Served | None = None, **options: Any) -> httpx.Response:
    return asyncio.run((served or serve()).client.post(path, json=body, **options))


def _get(path: str, served: Served | None = None, **options: Any) -> httpx.Response:
    return asyncio.run((served or serve()).client.get(path, **options))


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "hello"}], **fields}


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hello\n", "max_tokens": 50, **fields}


def test_models_are_listed_page_by_page_and_found_by_id():
    served = serve()
    first = _get("/v1/models?limit=2", served).json()
    assert [entry["id"] for entry in first["data"]] == ["demo", "alpha"]
    assert first["has_more"] is True
    second = _get(f"/v1/models?limit=2&after={first['next']}", served).json()
    assert [entry["id"] for entry in second["data"]] == ["beta", "gamma"]
    assert second["has_more"] is False
    assert _get("/v1/models/beta", served).json()["parent"] == "demo"
    assert _get("/v1/models/nope", served).status_code == 404
    assert second["next"] is None
    assert _get("/v1/models?limit=0", served).json()["error"]["param"] == "limit"
    assert _get("/v1/models?after=alpha", served).json()["error"]["param"] == "after"


def test_an_adapter_outside_the_allow_list_does_not_exist():
    served = serve(allowed=("al*",))
    assert _post(CHAT, _chat(model="alpha"), served).status_code == 200
    response = _post(CHAT, _chat(model="beta"), served)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert [entry["id"] for entry in _get("/v1/models", served).json()["data"]] == ["demo", "alpha"]
    assert served.adapters.expected == [("alpha", None)]


@pytest.mark.parametrize("name", ["../etc", "a//b", "/abs", "a/../b", "-x", "x" * 201])
def test_a_name_that_is_a_path_is_refused_before_the_store_hears_of_it(name: str):
    served = serve()
    assert _post(CHAT, _chat(model=name), served).status_code == 400
    assert served.adapters.expected == []


def test_only_known_keys_may_ask_and_health_and_docs_are_open():
    served = serve(keys=ApiKeys((KEY,)))
    assert _post(CHAT, _chat(), served, headers={"authorization": f"Bearer {KEY}"}).status_code == 200
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
        response = _post(CHAT, _chat(), served, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert _get("/v1/models", served).status_code == 401
    assert _get("/stats", served).status_code == 401
    assert _get("/health", served).status_code == 200
    assert _get("/docs", served).status_code == 200
    assert len(served.backend.calls) == 1


def test_the_docs_page_loads_nothing_from_elsewhere_and_needs_no_key():
    served = serve(keys=ApiKeys((KEY,)))
    page = _get("/docs", served).text
    loaded = re.findall(r"(?:src|href)=\"([^\"]+)\"", page)
    assert loaded
    for url in loaded:
        assert url.startswith("/docs/files/")
        assert _get(url, served).status_code == 200
    assert _get("/docs/files/../../pyproject.toml", served).status_code in (401, 404)


def test_a_key_is_the_tenant_and_shares_no_prefix_with_others():
    served = serve(keys=ApiKeys((KEY, KEY + "2")))
    for key in (KEY, KEY + "2"):
        _post(CHAT, _chat(user="u"), served, headers={"authorization": f"Bearer {key}"})
    first, second = served.backend.calls
    assert first.tenant != second.tenant
    assert first.cache_salt != second.cache_salt
    assert KEY not in repr(first)


def test_on_an_open_server_the_user_is_the_tenant():
    served = serve()
    _post(CHAT, _chat(user="u"), served)
    assert (served.backend.calls[0].tenant, served.backend.calls[0].cache_salt) == ("u", "")


def test_a_body_or_a_prompt_that_is_too_large_is_refused():
    served = serve(limits=LimitSettings(max_body_bytes=500, max_prompt_bytes=100))
    assert _post(COMPLETIONS, _completion(prompt="x" * 600), served).status_code == 413
    assert _post(COMPLETIONS, _completion(prompt="x" * 200), served).status_code == 413

    async def chunked() -> httpx.Response:
        async def body():
            for _ in range(10):
                yield b" " * 100

        return await served.client.post(CHAT, content=body(), headers={"content-type": "application/json"})

    assert asyncio.run(chunked()).json()["error"]["code"] == "body_too_large"


def test_the_store_hears_of_an_adapter_before_its_prompt_is_tokenised():
    served = serve(limits=LimitSettings(max_prompt_bytes=100))
    body = {"inputs": "x" * 200, "parameters": {"adapter_id": "alpha", "adapter_source": "s3"}}
    assert _post("/generate", body, served).status_code == 413
    assert served.adapters.expected == [("alpha", "s3")]


def test_a_list_of_too_many_prompts_is_refused():
    served = serve(limits=LimitSettings(max_prompts=2, max_samples=4))
    assert _post(COMPLETIONS, _completion(prompt=["a"] * 3), served).json()["error"]["param"] == "prompt"
    assert _post(COMPLETIONS, _completion(prompt=["a"] * 2, n=3), served).json()["error"]["param"] == "n"


@pytest.mark.parametrize("content", [b"{", b"[]", b'"x"', b""])
def test_a_body_that_is_no_object_is_refused_in_openai_shape(content: bytes):
    client = serve().client
    response = asyncio.run(client.post(CHAT, content=content, headers={"content-type": "application/json"}))
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_answer_in_openai_shape():
    assert (_get("/v1/nothing").status_code, _get("/v1/nothing").json()["error"]["code"]) == (404, "not_found")
    assert _get(CHAT).json()["error"]["code"] == "method_not_allowed"


def test_health_is_503_while_no_replica_answers():
    assert _get("/health").status_code == 200
    response = _get("/health", serve(FakeBackend(alive=False)))
    assert (response.status_code, "retry-after" in response.headers) == (503, True)


def test_stats_show_every_replica_and_the_store():
    body = _get("/stats").json()
    assert body["replicas"] == [{"replica": "replica-1"}]
    assert body["store"]["sources"] == ["local"]


@pytest.mark.parametrize(
    "outcome", [SourceUnavailable("s3", "down"), RuntimeError("x"), TimeoutError(), None], ids=repr
)
def test_what_is_away_is_missing_from_the_statistics_and_named(
    outcome: Exception | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("deployments.http.api.STORE_TIMEOUT_S", 0.02)
    served = serve()

    async def stats() -> list[dict[str, object]]:
        return [{"part": "replica", "replica": "r2", "missing": "it hangs"}, {"replica": "r1"}]

    async def status() -> None:
        if outcome is None:
            await for_ever()
        raise outcome  # type: ignore[misc]

    monkeypatch.setattr(served.backend, "stats", stats)
    monkeypatch.setattr(served.adapters, "status", status)
    response = _get("/stats", served)
    assert response.status_code == 200
    body = response.json()
    assert (body["replicas"], body["store"]) == ([{"replica": "r1"}], None)
    assert [(part["part"], bool(part["missing"])) for part in body["missing"]] == [
        ("replica", True),
        ("adapter store", True),
    ]


@pytest.mark.parametrize("path", ["/adapters", "/v1/models"])
def test_a_listing_names_the_sources_that_are_away(path: str, monkeypatch: pytest.MonkeyPatch):
    served = serve()
    listed = served.adapters.list_adapters

    async def page(cursor: str | None, limit: int) -> AdapterPage:
        return replace(await listed(cursor, limit), unavailable=("s3",))

    assert _get(path, served).json()["unavailable"] == []
    monkeypatch.setattr(served.adapters, "list_adapters", page)
    assert _get(path, served).json()["unavailable"] == ["s3"]


def test_the_seed_is_drawn_when_absent_and_kept_when_given():
    served = serve()
    for fields in ({}, {}, {"seed": 5}):
        _post(CHAT, _chat(**fields), served)
    first, second, third = (call.seed for call in served.backend.calls)
    assert first != second
    assert third == 5


def test_a_client_that_serve_no_longer_reads_from_has_gone():
    heard: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        heard.append(await receive())

    async def receive() -> Message:
        raise TaskCancelledError

    async def send(message: Message) -> None:
        raise AssertionError(message)

    gate = Gate(app, keys=ApiKeys(()), max_body_bytes=1, refuse=respond)
    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(gate(scope, receive, send))
    assert heard == [{"type": "http.disconnect"}]
