"""What a listing shows, a request finds; what no request can ask for is neither listed nor registered."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.settings.app import AppArgs
from tests.serving.fakes import Served, serve

# In a store: the base's id, names that are none, and good ones on both sides of them in the order of names.
NAMES = ("-odd", "..", "a//b", "a/b", "alpha", "beta", "demo", "demo/x", "demo2", "gamma", "sp ace", "x" * 201, "zeta")
PATTERNS = [None, ("*",), ("a*", "z*"), ("demo*",), ("demo",), ("nothing",), ("a/*",), ("[a-d]*",), ("?eta",), ("*2",)]


def _served(allowed: tuple[str, ...] | None) -> Served:
    served = serve(allowed=allowed)
    served.adapters.names = NAMES
    return served


def _ask(served: Served, method: str, path: str, body: Any = None) -> httpx.Response:
    return asyncio.run(served.client.request(method, path, json=body))


def _listed(served: Served, path: str, key: str, limit: int) -> list[str]:
    """Names of all pages."""
    names: list[str] = []
    after = ""
    for _ in range(60):
        page = _ask(served, "GET", f"{path}?limit={limit}{after}").json()
        names += [entry["id" if key == "data" else "name"] for entry in page[key]]
        if page["next"] is None:
            return names
        after = f"&after={page['next']}"
    raise AssertionError("the pages did not end within 60")


@pytest.mark.parametrize("limit", [1, 2, 5, 100])
@pytest.mark.parametrize("allowed", PATTERNS)
def test_each_listed_name_is_found_by_a_request_and_no_other_is(allowed: tuple[str, ...] | None, limit: int):
    served = _served(allowed)
    listed = _listed(served, "/adapters", "adapters", limit)
    models = _listed(served, "/v1/models", "data", limit)
    assert models == ["demo", *listed]
    assert len(set(models)) == len(models)
    for name in NAMES:
        response = _ask(served, "POST", "/v1/completions", {"model": name, "prompt": "hi\n"})
        assert (response.status_code == 200) == (name in models), name
    assert [call.adapter for call in served.backend.calls] == [
        None if name == "demo" else name for name in NAMES if name in models
    ]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/adapters", {"name": "demo", "source": "local", "location": "alpha"}, "name"),
        ("/adapters", [{"name": "demo", "source": "local"}], "[0].name"),
        ("/adapters", [{"name": "one", "source": "local"}, {"name": "demo", "source": "local"}], "[1].name"),
        ("/adapters", {"name": "demo", "source": "s3", "urls": {"f": "http://h/x"}}, "name"),
        ("/adapters/refresh", {"name": "demo"}, "name"),
        ("/adapters/refresh", {"name": "demo", "source": "local"}, "name"),
        ("/adapters/prefetch", {"name": "demo"}, "name"),
        ("/adapters/pin", {"name": "demo"}, "name"),
        ("/adapters/pin", {"name": "demo", "source": "local"}, "name"),
        ("/adapters/unpin", {"name": "demo"}, "name"),
    ],
)
def test_the_bases_id_is_no_adapters_name(path: str, body: Any, param: str):
    served = _served(None)
    response = _ask(served, "POST", path, body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], "'demo' is the base model" in error["message"]) == (param, True)
    assert served.adapters.calls == []
    assert served.adapters.registered == {}


@pytest.mark.parametrize("name", ["demo", "forbidden"])
def test_what_may_no_longer_be_registered_can_be_taken_back(name: str):
    served = serve(allowed=("a*",))
    served.adapters.registered[name] = object()  # type: ignore[assignment]  # of an earlier start
    assert _ask(served, "DELETE", f"/adapters/{name}").json() == {"unregistered": [name]}


def test_a_pinned_base_stops_the_start():
    with pytest.raises(ValidationError, match=r"adapters\.pinned: 'demo' is the base"):
        AppArgs.model_validate({"model": "demo/base", "model_id": "demo", "adapters": {"pinned": ["demo"]}})


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_wrong_name_is_told_by_the_field_that_holds_it(path: str):
    body = (
        {"model": "../x", "prompt": "a"}
        if path != "/generate"
        else {"inputs": "a", "parameters": {"adapter_id": "../x"}}
    )
    error = _ask(serve(), "POST", path, body).json()["error"]
    assert (error["param"] == "model") if path != "/generate" else "adapter_id" in error
