"""What /docs shows is true: its requests are answered, its answers have the fields of real ones."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from deployments.http.adapters import examples as adapters
from deployments.http.anthropic import examples as anthropic
from deployments.http.api import LORAX_PATHS
from deployments.http.decisions import examples as decisions
from deployments.http.lorax import examples as lorax
from deployments.http.openai import examples as openai
from deployments.http.responses_api import examples as responses
from deployments.http.vectors import examples as vectors
from tests.serving.fakes import serve

SCHEMA = asyncio.run(serve().client.get("/openapi.json")).json()
POSTS = [path for path, operations in SCHEMA["paths"].items() if "post" in operations]


def _fields(value: Any) -> Any:
    """The names and the nesting; of a list its first item, of a number its kind only."""
    if isinstance(value, dict):
        return {key: _fields(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fields(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


def _events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data:").strip() for line in text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/v1/chat/completions", openai.CHAT_REQUEST, openai.CHAT_ANSWER),
        ("/v1/completions", openai.COMPLETION_REQUEST, openai.COMPLETION_ANSWER),
        ("/v1/responses", responses.REQUEST, responses.ANSWER),
        ("/v1/messages", anthropic.REQUEST, anthropic.ANSWER),
        ("/v1/messages/count_tokens", anthropic.COUNT_REQUEST, anthropic.COUNT_ANSWER),
        ("/v1/decisions", decisions.REQUEST, decisions.ANSWER),
        ("/v1/embeddings", vectors.EMBEDDING_REQUEST, vectors.EMBEDDING_ANSWER),
        ("/pooling", vectors.POOLING_REQUEST, vectors.POOLING_ANSWER),
        ("/v1/score", vectors.SCORE_REQUEST, vectors.SCORE_ANSWER),
        ("/score", vectors.SCORE_REQUEST, vectors.SCORE_ANSWER),
        ("/v1/rerank", vectors.RERANK_REQUEST, vectors.RERANK_ANSWER),
        ("/v2/rerank", vectors.RERANK_REQUEST, vectors.RERANK_ANSWER),
        ("/rerank", vectors.RERANK_REQUEST, vectors.RERANK_ANSWER),
        ("/embed", lorax.EMBED_REQUEST, lorax.EMBED_ANSWER),
        ("/generate", lorax.REQUEST, lorax.ANSWER),
        ("/", lorax.REQUEST, [lorax.ANSWER]),
        ("/adapters", adapters.REGISTER, adapters.REGISTERED),
    ],
)
def test_an_example_has_the_fields_of_an_answer(path: str, body: dict[str, Any], answer: Any):
    response = asyncio.run(serve().client.post(path, json=body))
    assert response.status_code == 200, response.text
    assert _fields(response.json()) == _fields(answer)


@pytest.mark.parametrize(
    ("path", "body", "example"),
    [
        ("/v1/chat/completions", {**openai.CHAT_REQUEST, "stream": True}, openai.CHAT_EVENTS),
        ("/v1/completions", {**openai.COMPLETION_REQUEST, "stream": True}, openai.COMPLETION_EVENTS),
        ("/generate_stream", lorax.REQUEST, lorax.EVENTS),
    ],
)
def test_an_example_of_an_event_is_like_one_of_the_stream(path: str, body: dict[str, Any], example: str):
    response = asyncio.run(serve().client.post(path, json=body))
    streamed = [_fields(event) for event in _events(response.text)]
    for event in _events(example):
        assert _fields(event) in streamed


@pytest.mark.parametrize("path", POSTS)
def test_every_route_that_is_posted_to_tells_what_it_does_and_how_it_fails(path: str):
    operation = SCHEMA["paths"][path]["post"]
    assert operation["description"]
    assert {"401", "413", "422", "429", "503"} <= set(operation["responses"])
    assert ("400" in operation["responses"]) == (path not in LORAX_PATHS)  # LoRAX says 422
    if path == "/ping":
        return  # it takes no body
    name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
    assert SCHEMA["components"]["schemas"][name]["example"]


def test_the_answer_to_a_wrong_field_is_one_of_those_told():
    response = asyncio.run(serve().client.post("/generate", json={"inputs": "x", "nonsense": 1}))
    told = SCHEMA["paths"]["/generate"]["post"]["responses"][str(response.status_code)]
    assert "unknown_parameter" in told["description"]
    assert _fields(response.json()) == _fields(told["content"]["application/json"]["example"])


def test_a_field_that_is_not_served_shows_the_values_that_ask_for_nothing():
    fields = SCHEMA["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["functions"]["enum"] == [None, []]
    assert fields["functions"]["description"].startswith("Not supported")
    for value in fields["function_call"]["enum"]:
        body = {**openai.CHAT_REQUEST, "function_call": value}
        assert asyncio.run(serve().client.post("/v1/chat/completions", json=body)).status_code == 200
