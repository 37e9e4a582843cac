"""What bodies of all APIs say of an answer's form, as the one grammar that a replica gets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from engine.grammar.spec import GrammarSpec
from tests.serving.fakes import FakeBackend, serve

CHAT, COMPLETIONS, GENERATE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/generate", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
TEXT = json.dumps(SCHEMA)
TAG = {"structures": [{"begin": "<f>", "schema": {}, "end": "</f>"}], "triggers": ["<f"]}
NEW_TAG = {"format": {"type": "const_string", "value": "x"}}
R, S = "response_format", "structured_outputs"
OBJECT, OF_SCHEMA = GrammarSpec("json_object", "", R), GrammarSpec("json_schema", TEXT, R)

TAKEN: list[tuple[str, dict[str, Any], GrammarSpec | None]] = [
    *((path, {R: {"type": "text"}}, None) for path in (CHAT, COMPLETIONS, GENERATE)),
    *((path, {R: {"type": "json_object"}}, OBJECT) for path in (CHAT, COMPLETIONS, GENERATE)),
    (CHAT, {R: {"type": "json_object", "schema": SCHEMA}}, OF_SCHEMA),
    *(
        (path, {R: {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}}, OF_SCHEMA)
        for path in (CHAT, COMPLETIONS)
        for more in ({}, {"strict": True}, {"strict": False, "description": "d"}, {"strict": None})
    ),
    (CHAT, {R: {"type": "json_schema", "schema": SCHEMA}}, OF_SCHEMA),
    (CHAT, {R: {"type": "structural_tag", **TAG}}, GrammarSpec("structural_tag", json.dumps(TAG), R)),
    (CHAT, {R: {"type": "structural_tag", **NEW_TAG}}, GrammarSpec("structural_tag", json.dumps(NEW_TAG), R)),
    (CHAT, {S: {"json": SCHEMA}}, GrammarSpec("json_schema", TEXT, S)),
    (CHAT, {S: {"json": TEXT}}, GrammarSpec("json_schema", TEXT, S)),
    (COMPLETIONS, {S: {"regex": "a+/"}}, GrammarSpec("regex", "a+/", S)),
    (COMPLETIONS, {S: {"choice": ["a", "ü"]}}, GrammarSpec("choice", '["a", "\\u00fc"]', S)),
    (CHAT, {S: {"grammar": "start: x"}}, GrammarSpec("grammar", "start: x", S)),
    (CHAT, {S: {"json_object": True, "regex": None}}, GrammarSpec("json_object", "", S)),
    (CHAT, {S: {"structural_tag": TAG}}, GrammarSpec("structural_tag", json.dumps(TAG), S)),
    (CHAT, {S: {"structural_tag": json.dumps(NEW_TAG)}}, GrammarSpec("structural_tag", json.dumps(NEW_TAG), S)),
    (CHAT, {"regex": "a"}, GrammarSpec("regex", "a", "regex")),
    (COMPLETIONS, {"ebnf": 'root ::= "a"'}, GrammarSpec("grammar", 'root ::= "a"', "ebnf")),
    (CHAT, {"json_schema": TEXT}, GrammarSpec("json_schema", TEXT, "json_schema")),
    (GENERATE, {R: {"type": "json_object", "schema": SCHEMA}}, OF_SCHEMA),
    (GENERATE, {R: {"type": "json_schema", "schema": TEXT}}, OF_SCHEMA),
    (RESPONSES, {"text": {"format": {"type": "text"}}}, None),
    (RESPONSES, {"text": {"format": {"type": "json_object"}}}, GrammarSpec("json_object", "", R)),
    (
        RESPONSES,
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}},
        OF_SCHEMA,
    ),
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {R: {"type": "json"}}, R, "json_schema"),
    (CHAT, {R: {"type": "json_schema"}}, "response_format.json_schema", "schema"),
    (CHAT, {R: {"type": "text", "schema": {}}}, "response_format.schema", "no part"),
    (CHAT, {R: {"type": "structural_tag"}}, R, "triggers"),
    (CHAT, {R: {"type": "json_object", "dance": 1}}, "response_format.dance", "unknown"),
    (CHAT, {S: {}}, S, "exactly one"),
    (CHAT, {S: {"json_object": False}}, S, "exactly one"),
    (CHAT, {S: {"regex": "a", "choice": ["b"]}}, S, "regex and choice"),
    (CHAT, {S: {"choice": []}}, "structured_outputs.choice", "at least 1"),
    (CHAT, {S: {"choice": [""]}}, "structured_outputs.choice", "at least 1"),
    (CHAT, {S: {"regex": "a"}, R: {"type": "json_object"}}, S, "response_format already"),
    (CHAT, {"regex": "a", "ebnf": "b"}, "ebnf", "regex already"),
    (CHAT, {S: {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", "one space"),
    (CHAT, {"guided_json": SCHEMA}, "guided_json", "structured_outputs, which has json"),
    (COMPLETIONS, {"guided_choice": ["a"]}, "guided_choice", "structured_outputs, which has choice"),
    (GENERATE, {R: {"type": "json_schema"}}, "response_format.schema", "missing"),
]


def _post(backend: FakeBackend, path: str, **fields: Any) -> httpx.Response:
    if path == GENERATE:
        body: dict[str, Any] = {"inputs": "hi", "parameters": fields}
    elif path == CHAT:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
    else:
        body = {"model": "demo", ("input" if path == RESPONSES else "prompt"): "hi", **fields}
    return asyncio.run(serve(backend).client.post(path, json=body))


@pytest.mark.parametrize(("path", "fields", "spec"), TAKEN, ids=lambda value: str(value)[:60])
def test_the_replica_is_asked_for_that_form(path: str, fields: dict[str, Any], spec: GrammarSpec | None) -> None:
    backend = FakeBackend()
    response = _post(backend, path, **fields)
    assert response.status_code == 200, response.text
    assert backend.calls[-1].params.grammar == spec


@pytest.mark.parametrize(("path", "fields", "param", "says"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_says_nothing_or_two_things_is_refused_by_name(
    path: str, fields: dict[str, Any], param: str, says: str
) -> None:
    backend = FakeBackend()
    response = _post(backend, path, **fields)
    assert response.status_code in (400, 422), response.text
    told = response.json()["error"]
    message = told if isinstance(told, str) else told["message"]
    assert param in message
    assert says in message
    assert not backend.calls


def test_what_has_no_effect_is_named() -> None:
    named = {"type": "json_schema", "json_schema": {"name": "n", "description": "d", "schema": {}, "strict": True}}
    response = _post(FakeBackend(), CHAT, response_format=named)
    assert response.headers["x-chorus-inert"] == "name, description"
    response = _post(FakeBackend(), CHAT, structured_outputs={"regex": "a", "disable_fallback": True})
    assert response.headers["x-chorus-inert"] == "disable_fallback"
