"""What a client reads of a bad request: the field and what it may be, in no words of our insides, of bounded length."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from deployments.http.auth import ApiKeys
from tests.serving.fakes import KEY, serve

INSIDES = re.compile(r"instance of|pydantic|CompletionRequest|ChatRequest|GenerateRequest|TextPart|StreamOptions"
                     r"|Parameters|dictionary|after validation|Field required|\\d")  # fmt: skip
C, H, G, A = "/v1/completions", "/v1/chat/completions", "/generate", "/adapters"


def _chat(message: object) -> dict[str, object]:
    return {"model": "demo", "messages": [message]}


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (C, None, "the body cannot be read: Input should be an object, not null"),
        (C, [], "the body cannot be read: Input should be an object, not []"),
        (C, "text", 'the body cannot be read: Input should be an object, not "text"'),
        (H, 7, "the body cannot be read: Input should be an object, not 7"),
        (G, [1], "the body cannot be read: Input should be an object, not [1]"),
        (A, [], "the body cannot be read: List should have at least 1 item(s), not []"),
        (C, {"prompt": "a"}, "model: it is missing; send it"),
        (A, {"name": "x"}, "source: it is missing; send it"),
        (C, {"model": "demo", "prompt": "a", "stream": True, "stream_options": []}, "should be an object, not []"),
        (C, {"model": "demo", "prompt": "a", "seed": 2**70}, "should be less than 18446744073709551616, not"),
        (H, {"model": "demo", "messages": []}, "messages: List should have at least 1 item(s), not []"),
        (H, _chat([]), "messages[0]: Input should be an object, not []"),
        (H, _chat({}), "messages[0].role: it is missing; send it"),
        (H, _chat({"role": "user"}), "messages[0].content: it is missing; send it"),
        (H, _chat({"role": "user", "content": []}), "messages[0].content: List should have at least 1 item(s), not []"),
        (H, _chat({"role": "user", "content": ["a"]}), 'messages[0].content[0]: Input should be an object, not "a"'),
        (G, {"inputs": "a", "parameters": []}, "parameters: Input should be an object, not []"),
        (G, {"inputs": "a", "parameters": "x"}, 'parameters: Input should be an object, not "x"'),
    ],
)
def test_a_body_of_another_shape_is_told_without_our_own_names(path: str, body: object, told: str):
    headers = {"content-type": "application/json"}
    answer = asyncio.run(serve().client.post(path, content=json.dumps(body), headers=headers))
    text = answer.json()["error"]
    message = text if isinstance(text, str) else text["message"]
    assert answer.status_code in (400, 422)
    assert told in message
    assert not INSIDES.search(message)


@pytest.mark.parametrize(
    ("query", "told"),
    [("limit=abc", "limit: Input should be a whole number"), ("after=x", "after: Input should match")],
)
def test_a_question_of_another_shape_is_told_likewise(query: str, told: str):
    answer = asyncio.run(serve().client.get(f"/v1/models?{query}"))
    assert (answer.status_code, told in answer.json()["error"]["message"]) == (400, True)


@pytest.mark.parametrize(("method", "path"), [("GET", "/" + "a/" * 3000), ("GET", "/v1/models/" + "a" * 5000),
                                              ("DELETE", "/adapters/" + "a" * 5000), ("PUT", "/v1/models/" + "a" * 999),
                                              ("POST", "/%00" * 900)])  # fmt: skip
@pytest.mark.parametrize("keys", [ApiKeys(is_local=True), ApiKeys((KEY,))])
def test_a_long_path_is_not_repeated_whole(method: str, path: str, keys: ApiKeys):
    headers = {"authorization": f"Bearer {KEY}"}
    answer = asyncio.run(serve(keys=keys).client.request(method, path, headers=headers))
    assert 400 <= answer.status_code < 500
    assert len(answer.text) < 600
