"""The OpenAI API over fake replicas."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from deployments.calls import Fault
from tests.serving.fakes import FakeBackend, Served, serve
from tests.support.waiting import until_async

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def _post(path: str, body: Any, served: Served | None = None, **options: Any) -> httpx.Response:
    served = served or serve()
    return asyncio.run(served.client.post(path, json=body, **options))


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": "hello"}], **fields}


def _completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "hello\n", "max_tokens": 50, **fields}


def _events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_a_chat_is_answered_with_usage():
    body = _post(CHAT, _chat()).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "demo"
    (choice,) = body["choices"]
    assert choice["message"]["content"] == "hello"
    assert choice["finish_reason"] == "stop"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"], body["usage"]["total_tokens"]) == (
        6,
        6,
        12,
    )


def test_the_model_field_chooses_the_adapter_and_the_store_is_told_of_it():
    served = serve()
    assert _post(CHAT, _chat(model="alpha"), served).json()["choices"][0]["message"]["content"] == "HELLO"
    assert served.adapters.expected == [("alpha", None)]
    assert served.backend.calls[0].adapter == "alpha"


def test_a_chat_stream_has_a_role_text_finish_usage_and_done_in_this_order():
    *chunks, usage, done = _events(_post(CHAT, _chat(stream=True, stream_options={"include_usage": True})))
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 6
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "hello"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-2:]] == [None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello\n", ["hello"]),
        (["a\n", "bc\n"], ["a", "bc"]),
        ([104, 105], ["hi"]),
        ([[104, 105], [106]], ["hi", "j"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_may_be_text_or_tokens_or_lists_of_them(prompt: Any, texts: list[str], stream: bool):
    response = _post(COMPLETIONS, _completion(prompt=prompt, stream=stream))
    if not stream:
        assert [choice["text"] for choice in response.json()["choices"]] == texts
        return
    found = [""] * len(texts)
    for chunk in _events(response)[:-1]:
        found[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert found == texts


def test_samples_of_many_prompts_are_numbered_prompt_by_prompt():
    served = serve(FakeBackend(number_samples=True))
    body = _post(COMPLETIONS, _completion(prompt=["a", "b"], n=2), served).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a0"), (1, "a1"), (2, "b0"), (3, "b1")]


def test_echo_puts_the_prompt_in_front():
    assert _post(COMPLETIONS, _completion(echo=True)).json()["choices"][0]["text"] == "hello\nhello"
    assert _post(COMPLETIONS, _completion(prompt=[104], echo=True)).json()["choices"][0]["text"] == "hh"
    events = _events(_post(COMPLETIONS, _completion(echo=True, stream=True)))
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hello\nhello"


def test_logprobs_have_the_shape_of_each_endpoint():
    (choice,) = _post(CHAT, _chat(logprobs=True, top_logprobs=2, max_tokens=2)).json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["logprob"], first["bytes"]) == ("h", -0.5, [104])
    assert [top["token"] for top in first["top_logprobs"]] == ["h", "Z"]
    (choice,) = _post(COMPLETIONS, _completion(logprobs=1, max_tokens=2)).json()["choices"]
    assert choice["logprobs"] == {
        "tokens": ["h", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"h": -0.5}, {"e": -0.5}],
        "text_offset": [0, 1],
    }
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tempratura": 1}, "tempratura"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"300": 1}}, "logit_bias"),
        ({"logit_bias": {"3": 101}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}], "content": "x"}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"adapter_source": "local"}, "adapter_source"),
        ({"model": "alpha", "adapter_source": "hub"}, "adapter_source"),
    ],
)
def test_a_bad_chat_field_is_refused_by_name(fields: dict[str, Any], param: str):
    response = _post(CHAT, _chat(**fields))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith(param)
    assert param.split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0, not -1"),
        ({"temperature": "hot"}, 'temperature: Input should be a valid number, not "hot"'),
        ({"seed": "x" * 500}, f'seed: Input should be a valid integer, not "{"x" * 59}…'),
    ],
)
def test_a_wrong_value_is_told_with_what_was_wanted_and_not_at_length(fields: dict[str, Any], message: str):
    assert _post(CHAT, _chat(**fields)).json()["error"]["message"] == message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "stream": True}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [999]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_bad_completion_field_is_refused_by_name(fields: dict[str, Any], param: str):
    response = asyncio.run(
        serve().client.post(
            COMPLETIONS, content=json.dumps(_completion(**fields)), headers={"content-type": "application/json"}
        )
    )
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"tools": []},
        {"tool_choice": "none"},
        {"store": False},
        {"metadata": {}},
        {"modalities": ["text"]},
        {"service_tier": "auto"},
        {"user": "u"},
        {"logit_bias": {}},
        {"stop": None},
        {"top_k": -1},
        {"seed": -1},
        {"messages": [{"role": "user", "name": "bob", "content": [{"type": "text", "text": "hello"}]}]},
    ],
)
def test_fields_that_ask_for_nothing_special_are_taken(fields: dict[str, Any]):
    assert _post(CHAT, _chat(**fields)).status_code == 200


@pytest.mark.parametrize(
    ("code", "status", "type_", "told"),
    [
        ("queue_full", 429, "rate_limit_error", "queue_full"),
        ("store_unavailable", 503, "server_error", "store_unavailable"),
        ("source_unavailable", 503, "server_error", "source_unavailable"),
        ("context_length_exceeded", 400, "invalid_request_error", "context_length_exceeded"),
        ("adapter_not_found", 404, "invalid_request_error", "model_not_found"),
        ("adapter_rejected", 422, "invalid_request_error", "adapter_rejected"),
        ("request_failed", 500, "server_error", "request_failed"),
        ("never heard of", 500, "server_error", "never heard of"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_has_its_own_status(
    code: str, status: int, type_: str, told: str, stream: bool
):
    served = serve(FakeBackend(fault=Fault(code=code, message="because")))
    response = _post(CHAT, _chat(stream=stream), served)
    assert response.status_code == status
    assert response.json()["error"] == {"message": "because", "type": type_, "param": None, "code": told}
    assert ("retry-after" in response.headers) == (status in (429, 503))


def test_a_failure_in_the_stream_is_an_error_event_and_the_end():
    served = serve(FakeBackend(fault=Fault(code="request_failed", message="broke"), fault_after=2))
    *_, last = _events(_post(CHAT, _chat(stream=True), served))
    assert last == {"error": {"message": "broke", "type": "server_error", "param": None, "code": "request_failed"}}


def test_a_stream_survives_the_death_of_its_replica(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.router.streams.FIRST_PAUSE_S", 0.0)
    events = _events(_post(COMPLETIONS, _completion(stream=True), serve(FakeBackend(deaths=[2, 1]))))
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hello"


def test_a_client_that_goes_away_frees_its_sequence():
    async def leave() -> int:
        served = serve(FakeBackend(pause_s=0.01, reply=lambda _: "x" * 500))
        request = asyncio.ensure_future(served.client.post(CHAT, json=_chat(stream=True)))
        await until_async(lambda: served.backend.open_streams, "a stream to be open")
        await asyncio.sleep(0.1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        return served.backend.open_streams

    assert asyncio.run(leave()) == 0
