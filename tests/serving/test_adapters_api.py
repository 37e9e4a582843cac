"""Adapters are listed for everyone who may ask, and changed by those who may change them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from adapter_store.records import Registration
from deployments.http.adapters import examples
from deployments.http.auth import ApiKeys
from tests.serving.fakes import ADMIN_KEY, KEY, Served, serve

ROW = {"name": "shout", "source": "local", "location": "upper"}
DIGEST = "0" * 64
CHANGES = [
    ("POST", "/adapters", ROW),
    ("DELETE", "/adapters/alpha", None),
    *(("POST", f"/adapters/{action}", {"name": "alpha"}) for action in ("refresh", "prefetch", "pin", "unpin")),
]


def _ask(method: str, path: str, body: Any = None, served: Served | None = None, key: str = "") -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return asyncio.run((served or serve()).client.request(method, path, json=body, headers=headers))


def _error(response: httpx.Response) -> tuple[int, str, str | None]:
    error = response.json()["error"]
    return response.status_code, error["code"], error["param"]


def test_adapters_are_listed_page_by_page():
    served = serve()
    first = _ask("GET", "/adapters?limit=2", None, served).json()
    assert [entry["name"] for entry in first["adapters"]] == ["alpha", "beta"]
    second = _ask("GET", f"/adapters?limit=2&after={first['next']}", None, served).json()
    assert ([entry["name"] for entry in second["adapters"]], second["next"]) == (["gamma"], None)
    assert set(first["adapters"][0]) == set(examples.RECORD)
    assert _error(_ask("GET", "/adapters?limit=1001", None, served)) == (400, "invalid_request", "limit")


@pytest.mark.parametrize("path", ["/adapters?limit=50", "/v1/models?limit=50"])
def test_a_page_of_few_allowed_names_among_many_costs_no_more_than_a_page(path: str):
    served = serve(allowed=("zz*",))
    served.adapters.names = [f"a{index:03}" for index in range(300)] + ["zz"]
    page = _ask("GET", path, None, served).json()
    assert sum(served.adapters.pages) <= 50
    assert page["next"], "an empty page is not the last one"
    seen = [page]
    while page["next"]:
        page = _ask("GET", f"{path}&after={page['next']}", None, served).json()
        seen.append(page)
    assert sum("zz" in str(page) for page in seen) == 1


def test_what_is_registered_can_be_asked_for_and_taken_back():
    served = serve()
    assert _ask("POST", "/adapters", ROW, served).json() == {"registered": 1}
    assert "shout" in [entry["id"] for entry in _ask("GET", "/v1/models", None, served).json()["data"]]
    assert _ask("GET", "/v1/models/shout", None, served).status_code == 200
    assert _ask("DELETE", "/adapters/shout", None, served).json() == {"unregistered": ["shout"]}
    assert _ask("GET", "/v1/models/shout", None, served).status_code == 404
    assert _error(_ask("DELETE", "/adapters/shout", None, served)) == (404, "model_not_found", "name")


def test_a_list_is_registered_as_it_was_written():
    served = serve()
    rows = [ROW, {"name": "a/b", "source": "s3", "urls": {"x.json": "https://h/x"}, "sha256": {"x.json": DIGEST}}]
    assert _ask("POST", "/adapters", rows, served).json() == {"registered": 2}
    assert served.adapters.registered == {
        "shout": Registration(name="shout", source="local", location="upper"),
        "a/b": Registration(
            name="a/b", source="s3", urls=(("x.json", "https://h/x"),), sha256=(("x.json", DIGEST),)
        ),
    }  # fmt: skip
    assert _ask("DELETE", "/adapters/a/b", None, served).json() == {"unregistered": ["a/b"]}


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (ROW | {"location": "nowhere"}, 400, "registration_invalid", None),
        (ROW | {"name": "../etc"}, 400, "adapter_name_invalid", "name"),
        (ROW | {"name": "other"}, 404, "model_not_found", "name"),
        (ROW | {"source": "ftp"}, 400, "invalid_request", "source"),
        ([ROW, ROW | {"name": "sha", "source": "ftp"}], 400, "invalid_request", "[1].source"),
        ([ROW, ROW], 400, "invalid_request", "[1].name"),
        ([ROW, ROW | {"name": "sha"}, ROW | {"location": "beta"}], 400, "invalid_request", "[2].name"),
        (ROW | {"path": "x"}, 400, "unknown_parameter", "path"),
        ([ROW, ROW | {"path": "x"}], 400, "unknown_parameter", "[1].path"),
        (ROW | {"urls": {"x": "file:///etc/passwd"}}, 400, "invalid_request", "urls.x"),
        (ROW | {"sha256": {"x": "123"}}, 400, "invalid_request", "sha256.x"),
        ({"name": "shout"}, 400, "invalid_request", "source"),
        ([], 400, "invalid_request", None),
        (7, 400, "invalid_request", None),
    ],
)
def test_a_registration_that_cannot_be_served_is_refused_whole(body: Any, status: int, code: str, param: str | None):
    served = serve(allowed=("sh*", "al*"))
    assert _error(_ask("POST", "/adapters", body, served)) == (status, code, param)
    assert served.adapters.registered == {}


@pytest.mark.parametrize("action", ["refresh", "prefetch", "pin", "unpin"])
def test_an_adapter_is_refreshed_fetched_pinned_and_let_go_by_name(action: str):
    served = serve(allowed=("al*", "no*"))
    response = _ask("POST", f"/adapters/{action}", {"name": "alpha", "source": "s3"}, served)
    assert response.status_code == 200
    assert response.json()["pinned"] is (action == "pin")
    assert set(response.json()) == set(examples.RECORD)
    assert served.adapters.calls == [(action, "alpha", "s3")]
    assert _error(_ask("POST", f"/adapters/{action}", {"name": "nobody"}, served))[:2] == (404, "model_not_found")
    assert _error(_ask("POST", f"/adapters/{action}", {"name": "beta"}, served)) == (404, "model_not_found", "name")
    assert _error(_ask("POST", f"/adapters/{action}", {"name": "alpha", "x": 1}, served))[1] == "unknown_parameter"
    wrong_source = {"name": "alpha", "source": "ftp"}
    assert _error(_ask("POST", f"/adapters/{action}", wrong_source, served)) == (400, "invalid_request", "source")


def test_a_pin_beyond_the_budget_is_a_conflict_that_says_what_to_do():
    response = _ask("POST", "/adapters/pin", {"name": "gamma"})
    assert _error(response)[:2] == (409, "pin_refused")
    assert "unpin another" in response.json()["error"]["message"]


def test_a_key_that_may_ask_may_not_change_what_is_served():
    for keys in (ApiKeys((KEY,)), ApiKeys((KEY,), (ADMIN_KEY,))):
        served = serve(keys=keys)
        for method, path, body in CHANGES:
            response = _ask(method, path, body, served, KEY)
            assert _error(response)[:2] == (403, "admin_key_required")
            assert "admin_keys_env" in response.json()["error"]["message"]
        assert (served.adapters.calls, served.adapters.registered) == ([], {})


def test_an_admin_key_may_change_and_ask():
    served = serve(keys=ApiKeys((KEY,), (ADMIN_KEY,)))
    served.adapters.registered["alpha"] = Registration(name="alpha", source="local")
    for method, path, body in CHANGES:
        assert _ask(method, path, body, served, "wrong-key-of-sixteen-or-more").status_code == 401
        assert _ask(method, path, body, served, ADMIN_KEY).status_code == 200
    assert _ask("GET", "/adapters", None, served, ADMIN_KEY).status_code == 200
    assert _ask("GET", "/adapters", None, served, KEY).status_code == 200
    assert _ask("GET", "/adapters", None, served).status_code == 401


def test_with_admin_keys_alone_everyone_may_ask_and_they_alone_may_change():
    served = serve(keys=ApiKeys((), (ADMIN_KEY,)))
    served.adapters.registered["alpha"] = Registration(name="alpha", source="local")
    for key in ("", "whatever"):
        assert _ask("GET", "/adapters", None, served, key).status_code == 200
    for method, path, body in CHANGES:
        assert _ask(method, path, body, served).status_code == 403
        assert _ask(method, path, body, served, ADMIN_KEY).status_code == 200


def test_admin_keys_come_from_the_environment_and_a_missing_one_stops_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CHORUS_TEST_KEYS", KEY)
    with pytest.raises(ValueError, match="admin_keys_env names 'CHORUS_TEST_ADMINS'"):
        ApiKeys.from_env("CHORUS_TEST_KEYS", "CHORUS_TEST_ADMINS")
    monkeypatch.setenv("CHORUS_TEST_ADMINS", ADMIN_KEY)
    keys = ApiKeys.from_env("CHORUS_TEST_KEYS", "CHORUS_TEST_ADMINS")
    assert [keys.caller(f"Bearer {key}").may_change for key in (KEY, ADMIN_KEY)] == [False, True]
