"""Who may do what: every route, with every kind of key, on every kind of server, from every kind of page."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from adapter_store.records import Registration
from deployments.app import build
from deployments.http.auth import ApiKeys
from deployments.http.origin import PROXY_HEADERS, is_loopback
from deployments.settings.app import AppArgs
from tests.serving.fakes import ADMIN_KEY, KEY, URL, EverybodysAnswers, Served, serve
from tests.serving.routes_table import ASK, CHANGE, OPEN, ROUTES
from tests.serving.test_settings import ROOT

SHOUT = Registration(name="shout", source="local")
CHANGES = [(method, path, body) for (method, _), (kind, path, body) in ROUTES.items() if kind is CHANGE]

BOTH = ApiKeys((KEY,), (ADMIN_KEY,))
SERVERS = {
    "loopback": ApiKeys(is_local=True),
    "loopback with keys": ApiKeys((KEY,), (ADMIN_KEY,), is_local=True),
    "loopback with admin keys": ApiKeys((), (ADMIN_KEY,), is_local=True),
    "loopback without admin keys": ApiKeys((KEY,), is_local=True),
    "public and open": ApiKeys(),
    "public with keys": ApiKeys((KEY,), (ADMIN_KEY,)),
    "public and open with admin keys": ApiKeys((), (ADMIN_KEY,)),
    "public without admin keys": ApiKeys((KEY,)),
}
GIVEN = {"no key": None, "a wrong key": "wrong-key-of-sixteen-or-more", "a user's key": KEY, "an admin key": ADMIN_KEY}
PAGES = {"no page": None, "our page": URL, "another page": "http://evil.example", "a hidden page": "null"}
FEW_PAGES = {"no page": None, "another page": "http://evil.example"}
# Without a key of its own a request is judged by what the server wants: (may ask, may change), by server and key.
YES = 200
RIGHTS: dict[str, dict[str, tuple[int, int]]] = {
    "loopback": dict.fromkeys(GIVEN, (YES, YES)),  # but for pages of others, below
    "loopback with keys": {
        "no key": (401, 401),
        "a wrong key": (401, 401),
        "a user's key": (YES, 403),
        "an admin key": (YES, YES),
    },
    "loopback with admin keys": dict.fromkeys(GIVEN, (YES, 403)) | {"an admin key": (YES, YES)},
    "loopback without admin keys": dict.fromkeys(GIVEN, (401, 401)) | {"a user's key": (YES, 403)},
    "public and open": dict.fromkeys(GIVEN, (YES, 403)),
}
NOT_SERVED = {("POST", "/classify"), ("POST", "/classify_batch")}  # refused to those who may ask
RIGHTS["public with keys"] = RIGHTS["loopback with keys"]
RIGHTS["public and open with admin keys"] = RIGHTS["loopback with admin keys"]
RIGHTS["public without admin keys"] = RIGHTS["loopback without admin keys"]


def right(kind: str, server: str, key: str, page: str) -> int:
    may_ask, may_change = RIGHTS[server][key]
    if kind is CHANGE and server == "loopback" and page in ("another page", "a hidden page"):
        return 403
    return {OPEN: YES, ASK: may_ask, CHANGE: may_change}[kind]


def routes_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Also those that no document shows. Routers that were included keep their own list."""
    waiting = list(app.routes)
    for route in waiting:
        if (included := getattr(route, "original_router", None)) is not None:
            waiting += included.routes
            continue
        for method in getattr(route, "methods", None) or {"GET"}:
            if method not in ("HEAD", "OPTIONS"):
                yield method, route.path  # type: ignore[attr-defined]


async def ask(served: Served, method: str, path: str, body: Any, headers: dict[str, str]) -> httpx.Response:
    if body is None:
        return await served.client.request(method, path, headers=headers)
    return await served.client.request(method, path, json=body, headers=headers)


@cache
def served_with(keys: ApiKeys | None) -> Served:
    return serve(keys=keys, kept=EverybodysAnswers())


def changed(served: Served) -> bool:
    return bool(served.adapters.calls or served.adapters.registered)


def test_every_route_has_its_place_in_the_table():
    assert set(routes_of(serve().app)) == set(ROUTES)


@pytest.mark.parametrize("server", SERVERS)
def test_everyone_may_do_what_the_table_says_and_no_more(server: str):
    async def run() -> list[str]:
        wrong = []
        served = serve(keys=SERVERS[server], kept=EverybodysAnswers())
        for (method, path), (kind, example, body) in ROUTES.items():
            for key, given in GIVEN.items():
                for page, origin in (PAGES if kind is CHANGE else FEW_PAGES).items():
                    headers = {"authorization": f"Bearer {given}"} if given else {}
                    headers |= {"origin": origin} if origin else {}
                    expected = right(kind, server, key, page)
                    served.adapters.registered.clear()
                    served.adapters.calls.clear()
                    if method == "DELETE":
                        served.adapters.registered["shout"] = SHOUT
                    before = dict(served.adapters.registered)
                    if (method, path) in NOT_SERVED and expected == YES:
                        expected = 422
                    got = (await ask(served, method, example, body, headers)).status_code
                    did = bool(served.adapters.calls) or served.adapters.registered != before
                    if got != expected or did is not (kind is CHANGE and expected == YES):
                        wrong.append(f"{method} {path} with {key} from {page}: {got} instead of {expected}, {did=}")
        return wrong

    assert asyncio.run(run()) == []


def refused_all(headers: dict[str, str], code: str, keys: ApiKeys | None = None) -> None:
    """No change is made with `headers`, for the reason `code`."""

    async def run() -> None:
        served = served_with(keys)
        served.adapters.registered.clear()
        served.adapters.calls.clear()
        for method, path, body in CHANGES:
            if body is None and code == "unsupported_media_type":
                continue
            response = await ask(served, method, path, body, headers)
            assert response.json()["error"]["code"] == code, f"{method} {path} {headers}: {response.text}"
        assert not changed(served)

    asyncio.run(run())


def allowed_all(headers: dict[str, str], keys: ApiKeys | None = None) -> None:
    async def run() -> None:
        served = served_with(keys)
        for method, path, body in CHANGES:
            served.adapters.registered["shout"] = SHOUT
            response = await ask(served, method, path, body, headers)
            assert response.status_code == 200, f"{method} {path} {headers}: {response.text}"

    asyncio.run(run())


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8000", "localhost:8000", "localhost", "[::1]:8000", "127.8.9.1", "LocalHost:1"]
)
def test_the_own_machines_user_may_change_under_its_names(host: str):
    allowed_all({"host": host})
    allowed_all({"host": host, "origin": f"http://{host}".lower()})


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example@127.0.0.1",
        "127.0.0.1:8000@evil.example",
        "0.0.0.0:8000",
        "[::]:8000",
        "192.168.1.7:8000",
        "10.0.0.1",
        "[fe80::1]:8000",
        "2130706433:8000",
        "127.1:8000",
        "localhost, evil.example",
        "localhost/evil",
        "",
        "chorus",
    ],
)
def test_a_name_that_dns_may_point_here_changes_nothing(host: str):
    refused_all({"host": host}, "cross_origin")
    refused_all({"host": host, "origin": f"http://{host}"}, "cross_origin")


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "https://evil.example",
        "null",
        "",
        "http://127.0.0.1",
        "http://127.0.0.1:8001",
        "http://localhost:8000",  # another origin than 127.0.0.1:8000
        "https://127.0.0.1",
        "http://127.0.0.1:8000.evil.example",
        "http://evil.example#127.0.0.1:8000",
        "http://evil.example/127.0.0.1:8000",
        "http://127.0.0.1:8000@evil.example",
        "http://user@127.0.0.1:8000",
        "http://127.0.0.1:8000/path",
        "http://127.0.0.1:99999",
        "file://",
        "chrome-extension://abcdef",
    ],
)
def test_a_page_of_another_origin_changes_nothing(origin: str):
    refused_all({"origin": origin}, "cross_origin")
    allowed_all({"origin": origin, "authorization": f"Bearer {ADMIN_KEY}"}, BOTH)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_changes_nothing_when_it_hides_its_origin(site: str):
    refused_all({"sec-fetch-site": site}, "cross_origin")


def test_pages_of_our_own_and_programs_may():
    allowed_all({})
    allowed_all({"sec-fetch-site": "same-origin", "origin": URL})
    allowed_all({"sec-fetch-site": "none"})


@pytest.mark.parametrize("name", PROXY_HEADERS)
def test_whoever_asks_through_a_proxy_is_not_this_machines_user(name: str):
    refused_all({name: "127.0.0.1"}, "cross_origin")


@pytest.mark.parametrize(
    "told",
    [
        "text/plain",
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "text/json",
        "application/jsonp",
        "application/json, text/plain",
        "text/plain; application/json",
        "application/octet-stream",
        "",
    ],
)
@pytest.mark.parametrize("keys", [None, BOTH], ids=["local", "keys"])
def test_what_a_form_can_send_changes_nothing(told: str, keys: ApiKeys | None):
    headers = {"content-type": told, "authorization": f"Bearer {ADMIN_KEY}"}
    refused_all(headers, "unsupported_media_type", keys)


def test_a_body_without_a_type_changes_nothing():
    async def run() -> None:
        served = serve()
        request = served.client.build_request("POST", "/adapters/pin", content=b'{"name":"alpha"}')
        assert "content-type" not in request.headers
        response = await served.client.send(request)
        assert (response.status_code, response.json()["error"]["code"]) == (415, "unsupported_media_type")
        assert not changed(served)

    asyncio.run(run())


def test_a_json_body_may_say_its_charset():
    allowed_all({"content-type": "Application/JSON; charset=utf-8"})


LOOPBACK = ["127.0.0.1", "localhost", "LOCALHOST", "::1", "[::1]", "127.0.0.53", "127.255.255.254"]
PUBLIC = [
    None,
    "",
    "0.0.0.0",
    "::",
    "[::]",
    "192.168.0.4",
    "10.1.2.3",
    "8.8.8.8",
    "fe80::1",
    "2001:db8::1",
    "chorus.example",
    "my-laptop",
    "localhost.example",
    "*",
    "127.1",
]


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_server_without_keys_starts_on_a_loopback_address(host: str):
    assert is_loopback(host)
    caller = ApiKeys.from_env(None, host=host).caller(None)
    assert (caller.may_change, caller.has_admin_key) == (True, False)


@pytest.mark.parametrize("host", PUBLIC)
def test_a_server_that_others_reach_starts_with_keys_or_when_it_is_said_to_be_open(
    host: str | None, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match=r"api_keys_env is not set.* 127\.0\.0\.1.* open: true"):
        ApiKeys.from_env(None, host=host)
    monkeypatch.setenv("CHORUS_TEST_ADMINS", ADMIN_KEY)
    with pytest.raises(ValueError, match="api_keys_env"):
        ApiKeys.from_env(None, "CHORUS_TEST_ADMINS", host=host)
    assert not ApiKeys.from_env(None, host=host, is_open=True).caller(None).may_change
    monkeypatch.setenv("CHORUS_TEST_KEYS", KEY)
    assert not ApiKeys.from_env("CHORUS_TEST_KEYS", host=host).caller(f"Bearer {KEY}").may_change


def test_an_application_is_not_built_for_a_serve_that_others_reach(monkeypatch: pytest.MonkeyPatch):
    args = AppArgs.model_validate({"model": str(ROOT / "demo"), "model_id": "demo"})
    monkeypatch.setattr("deployments.app.ray.is_initialized", lambda: True)
    monkeypatch.setattr("deployments.app.listening_host", lambda: "0.0.0.0")
    with pytest.raises(ValueError, match=r"http_options\.host is '0\.0\.0\.0'"):
        build(args)
    assert build(args.model_copy(update={"open": True}))
    monkeypatch.setattr("deployments.app.listening_host", lambda: "127.0.0.1")
    assert build(args)


def test_keys_and_open_contradict_each_other():
    args = {"model": str(ROOT / "demo"), "model_id": "demo"}
    assert AppArgs.model_validate(args | {"open": True}).open
    with pytest.raises(ValueError, match="open: true says that everyone may ask"):
        AppArgs.model_validate(args | {"open": True, "api_keys_env": "KEYS"})
