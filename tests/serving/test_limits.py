"""Every limit of docs/limits.md holds: what is at it is taken, what is one beyond it is refused by name."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.http import json_shape, limits, reading
from deployments.http.limits import (
    ADAPTERS,
    BODY,
    CHAT,
    DECISIONS,
    LIMITS,
    LORAX,
    OPENAI,
    QUERY,
    VECTORS,
    Limit,
)
from deployments.settings.app import LimitSettings
from tests.serving.fakes import FakeBackend, Served, serve
from tests.serving.limit_bodies import BUILD, Built, completion

ROOT = Path(__file__).parents[2]
SMALL = {
    "max_body_bytes": 1000,
    "max_prompt_bytes": 100,
    "max_prompt_ids": 50,
    "max_prompts": 3,
    "max_inputs": 4,
    "max_samples": 5,
}

# Within the limit, and yet nothing that is served: what it says then.
ELSEWHERE = {
    (OPENAI, "model", "characters"): "200",  # an adapter's name is shorter
    (OPENAI, "adapter_source", "characters"): "not configured",
    (VECTORS, "model", "characters"): "200",
    (DECISIONS, "model", "characters of a name"): "200",
    (DECISIONS, "adapter_source", "characters"): "not configured",
    (VECTORS, "adapter_source", "characters"): "not configured",
    (OPENAI, "logit_bias", "tokens"): "is outside",  # the vocabulary
    (CHAT, "reasoning_effort", "characters"): "chat template",
    (LORAX, "adapter_id", "characters"): "200",
    (LORAX, "adapter_source", "characters"): "not configured",
    (ADAPTERS, "source", "characters"): "not configured",
    (QUERY, "name", "characters of a name in the path"): "not found",
}


def _ask(built: Built, settings: LimitSettings) -> httpx.Response:
    path, body = built
    client = SERVED.client if settings == LimitSettings() else _serve(settings).client
    if body is None:
        return asyncio.run(client.get(path))
    text = body if isinstance(body, str) else json.dumps(body)
    return asyncio.run(client.post(path, content=text, headers={"content-type": "application/json"}))


def _serve(settings: LimitSettings) -> Served:
    return serve(FakeBackend(reply=lambda call: "x"), limits=settings)


SERVED = _serve(LimitSettings())


def _case(limit: Limit) -> tuple[Callable[[int], Built], int, LimitSettings]:
    build = BUILD[limit.where, limit.field, limit.what]
    if limit.setting is None:
        return build, limit.most, LimitSettings()
    most = SMALL[limit.setting]
    return build, most, LimitSettings(**{limit.setting: most})


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.where}: {limit.field} {limit.what}")
def test_what_is_at_a_limit_is_taken_and_one_more_is_refused_by_name(limit: Limit):
    build, most, settings = _case(limit)
    taken = _ask(build(most), settings)
    key = (limit.where, limit.field, limit.what)
    if key in ELSEWHERE:
        assert ELSEWHERE[key] in taken.text
    else:
        assert taken.status_code == 200, taken.text
    refused = _ask(build(most + 1), settings)
    assert 400 <= refused.status_code < 500
    shown = most + limits.MAX_OTHER_VALUES if limit.setting == "max_prompt_ids" and limit.where == BODY else most
    assert str(shown) in refused.text or f"{shown:,}" in refused.text
    assert limit.field.rpartition(".")[2] in refused.text
    assert refused.text != taken.text


@pytest.mark.parametrize("limit", [limit for limit in LIMITS if limit.setting], ids=lambda limit: limit.setting)
def test_a_limit_that_is_a_setting_is_told_by_its_default(limit: Limit):
    assert getattr(LimitSettings(), limit.setting or "") == limit.most


def test_the_page_tells_the_limits_that_hold():
    assert (ROOT / "docs" / "limits.md").read_text() == limits.page()


def test_every_size_in_the_schema_is_on_the_page():
    """A bound that a wire model has and the table has not would be told nowhere."""
    schema = asyncio.run(serve().client.get("/openapi.json")).json()
    told = {limit.field.rpartition(".")[2] for limit in LIMITS}
    names = ("ChatRequest", "CompletionRequest", "Message", "GenerateRequest", "Parameters", "Row", "NamedRequest")
    for name in names:
        for field, told_schema in schema["components"]["schemas"][name]["properties"].items():
            if "maxLength" in json.dumps(told_schema) or "maxItems" in json.dumps(told_schema):
                assert field in told or field == "lora_path", f"{name}.{field}"  # lora_path is model, or refused


@pytest.mark.parametrize(
    "text",
    ["[" * 1000, "{}," * 20_000, '"a",' * 40_000, "1," * 300_000, '{"a":' * 40 + "1" + "}" * 40],
    ids=["levels", "objects", "strings", "numbers", "objects in objects"],
)
def test_a_body_beyond_its_shape_is_never_parsed(monkeypatch: pytest.MonkeyPatch, text: str):
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(reading, "from_json", parse)
    response = _ask(("/v1/completions", "[" + text), LimitSettings())
    assert response.status_code == 400
    assert "the limit is" in response.text


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 64])
@pytest.mark.parametrize(
    ("value", "shape"),
    [
        ({}, (1, 1, 0, 0, 2)),
        ([], (1, 1, 0, 0, 2)),
        ("{[,:]}", (0, 0, 1, 0, 1)),
        ('a"b', (0, 0, 1, 0, 1)),
        ("\\", (0, 0, 1, 0, 1)),
        ('\\"', (0, 0, 1, 0, 1)),
        ([1, [2, [3]]], (3, 3, 0, 0, 6)),
        ({"a": {"b": [{}]}, "c": "d"}, (4, 4, 4, 3, 6)),
        (["é", "\n", None, True], (1, 1, 2, 0, 5)),
        ({'"': "\\\\", ":": ","}, (1, 1, 4, 2, 3)),
        (7, (0, 0, 0, 0, 1)),
    ],
)
def test_a_text_is_counted_as_its_parser_would(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, value: Any, shape: tuple[int, ...]
):
    monkeypatch.setattr(json_shape, "PIECE_BYTES", piece_bytes)
    for ascii_only, small_bytes in itertools.product((True, False), (0, json_shape.SMALL_BYTES)):
        monkeypatch.setattr(json_shape, "SMALL_BYTES", small_bytes)
        text = json.dumps(value, ensure_ascii=ascii_only).encode()
        assert json_shape.shape_of(text) == json_shape.Shape(*shape)


def test_a_large_body_is_read_in_another_thread_and_a_small_one_here(monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []
    real = reading.read_json

    def note(*args: Any) -> Any:
        names.append(threading.current_thread().name)
        return real(*args)

    monkeypatch.setattr(reading, "read_json", note)
    for prompt in ("x", "x" * reading.INLINE_BYTES):
        assert _ask(completion(prompt=prompt), LimitSettings()).status_code == 200
    assert names[0] == "MainThread"
    assert names[1].startswith("bodies")
