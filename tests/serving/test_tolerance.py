"""What clients of other servers send by habit is taken where it asks for nothing else, and told in `x-chorus-inert`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from deployments.http.openai.logprobs import LogprobWriter
from engine.request import TokenLogprobs
from tests.serving.fakes import EOS, FakeBackend, Served, make_prompts, serve

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
SERVED = serve()
HELLO = {"role": "user", "content": "hello"}


def _body(path: str, **fields: Any) -> dict[str, Any]:
    if path == CHAT:
        return {"model": "demo", "messages": [HELLO], **fields}
    if path == COMPLETIONS:
        return {"model": "demo", "prompt": "hello\n", "max_tokens": 50, **fields}
    return {"inputs": "hello\n", "parameters": fields}


def _post(path: str, served: Served | None = None, **fields: Any) -> httpx.Response:
    return asyncio.run((served or SERVED).client.post(path, json=_body(path, **fields)))


def _named(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    told = response.headers.get("x-chorus-inert", "")
    return told.split(", ") if told else []


def _said(**fields: Any) -> dict[str, Any]:
    return {"messages": [HELLO, {"role": "assistant", "content": "hi", **fields}, HELLO]}


INERT: list[tuple[str, dict[str, Any], list[str]]] = [
    (CHAT, {"metadata": {"trace": "1", "deep": {"a": [1]}}}, ["metadata"]),
    (COMPLETIONS, {"metadata": {}}, ["metadata"]),
    (CHAT, {"spaces_between_special_tokens": True, "skip_special_tokens": False}, ["spaces_between_special_tokens"]),
    (COMPLETIONS, {"spaces_between_special_tokens": False}, ["spaces_between_special_tokens"]),
    (CHAT, {"add_generation_prompt": True, "include_reasoning": True}, ["include_reasoning"]),
    (CHAT, {"separate_reasoning": False}, ["separate_reasoning"]),
    (CHAT, {"use_beam_search": False, "length_penalty": 1}, ["use_beam_search", "length_penalty"]),
    (COMPLETIONS, {"length_penalty": 1.0, "priority": 0.0}, ["length_penalty"]),
    (CHAT, {"best_of": 1, "priority": 0}, ["best_of"]),
    (CHAT, {"parallel_tool_calls": True}, ["parallel_tool_calls"]),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, ["chat_template_kwargs.enable_thinking"]),
    (CHAT, {"reasoning_effort": "none", "stream_reasoning": False}, ["reasoning_effort", "stream_reasoning"]),
    (CHAT, {"parallel_tool_calls": False, "tools": []}, ["parallel_tool_calls", "tools"]),
    (CHAT, {"store": False, "service_tier": "auto"}, ["store", "service_tier"]),
    (CHAT, _said(tool_calls=[]), ["tool_calls"]),
    (CHAT, _said(cache_control={"type": "ephemeral"}), ["cache_control"]),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {}}]}]},
     ["cache_control"]),
    (CHAT, _said(reasoning_content="so"), ["reasoning_content"]),
    (CHAT, _said(reasoning="so"), ["reasoning_content"]),
    (CHAT, _said(annotations=[]), ["annotations"]),
    (CHAT, {"safety_identifier": "a", "user": "b"}, ["user"]),
    (CHAT, {"stream_options": {"include_obfuscation": False}, "stream": True}, ["include_obfuscation"]),
    (GENERATE, {"decoder_input_details": False, "watermark": False}, ["watermark"]),
]  # fmt: skip
PLAIN: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"prompt_cache_key": "k"}),
    (COMPLETIONS, {"prompt_cache_key": "k", "skip_special_tokens": True}),
    (CHAT, {"lora_path": "demo"}),
    (COMPLETIONS, {"model": "alpha", "lora_path": "alpha"}),
    (CHAT, {"top_logprobs": 0, "logprobs": False}),
    (CHAT, {"safety_identifier": "a"}),
    (CHAT, {"safety_identifier": "a", "user": "a"}),
    (CHAT, {"max_tokens": 16.0, "n": 1.0, "seed": 3.0, "top_k": 5.0, "min_tokens": 0.0}),
    (COMPLETIONS, {"max_tokens": 2e0, "logprobs": 2.0, "best_of": 1.0, "stop_token_ids": [9.0]}),
    (COMPLETIONS, {"prompt": [104.0, 105]}),
    (COMPLETIONS, {"prompt": [[104], [105.0]]}),
    (GENERATE, {"max_new_tokens": 4.0, "top_k": 2.0, "seed": 1.0, "truncate": 3.0}),
    (CHAT, {"chat_template": None, "truncate_prompt_tokens": None, "never_heard_of": None, "": None}),
    (COMPLETIONS, {"x" * 300: None, "temperature": None, "stream_options": None, "echo": None, "logit_bias": None}),
    (GENERATE, {"never_heard_of": None, "adapter_id": None, "stop": None, "api_token": None}),
    (CHAT, {"stream": True, "stream_options": {"include_usage": None, "new": None}}),
    (CHAT, _said(content=None)),
    (CHAT, _said(tool_calls=None, refusal=None, audio=None, function_call=None, name=None, unknown=None)),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello", "id": None}]}]}),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]}),
    (CHAT, {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, HELLO]}),
]  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"guided_json": {}}, "guided_json", "structured_outputs"),
    (COMPLETIONS, {"guided_choice": ["a"]}, "guided_choice", "structured_outputs"),
    (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "not the caller's"),
    (CHAT, {"documents": [{"text": "x"}]}, "documents", "write them into a message"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "chat template"),
    (CHAT, {"enable_thinking": False}, "enable_thinking", "chat_template_kwargs"),
    (CHAT, {"skip_special_tokens": "no"}, "skip_special_tokens", "boolean"),
    (
        CHAT,
        {"skip_special_tokens": False, "spaces_between_special_tokens": False},
        "spaces_between_special_tokens",
        "leave it out",
    ),
    (COMPLETIONS, {"spaces_between_special_tokens": 1}, "spaces_between_special_tokens", "boolean"),
    (CHAT, {"priority": False}, "priority", "integer"),
    (CHAT, {"rid": "x", "request_id": "y"}, "rid", "request_id"),
    (CHAT, {"best_of": 2}, "best_of", "send n"),
    (CHAT, {"length_penalty": 0.9}, "length_penalty", "beams"),
    (CHAT, {"model": "alpha", "lora_path": "beta"}, "lora_path", "model"),
    (CHAT, {"store": True}, "store", "nothing is stored"),
    (CHAT, {"logprobs": 1}, "logprobs", "boolean"),
    (CHAT, {"max_tokens": 16.5}, "max_tokens", "16.5"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt", "1.5"),
    (COMPLETIONS, {"prompt": [True]}, "prompt", "booleans"),
    (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt", "a list of lists and strings"),
    (COMPLETIONS, {"stop_token_ids": [1, True]}, "stop_token_ids", "[1] is true"),
    (COMPLETIONS, {"logit_bias": {"3": True}}, "logit_bias", "true"),
    (COMPLETIONS, {"logit_bias": {"3": 1, "03": 1}}, "logit_bias", "named twice"),
    (CHAT, {"tempratura": 1}, "tempratura", "did you mean 'temperature'?"),
    (CHAT, {"max_output_tokens": 1}, "max_output_tokens", "did you mean 'max"),
    (CHAT, {"request_id": "a b"}, "request_id", "pattern"),
    (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
    (CHAT, _said(tool_calls=[{"id": "1"}]), "messages[1].tool_calls[0].function", "missing"),
    (
        CHAT,
        _said(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "{"}}]),
        "messages[1].tool_calls[0].function.arguments",
        "not JSON",
    ),
    (
        CHAT,
        _said(tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "[1]"}}]),
        "messages[1].tool_calls[0].function.arguments",
        "not an object",
    ),
    (CHAT, {"messages": [HELLO, {"role": "tool", "content": "x"}]}, "messages[1]", "tool_call_id"),
    (CHAT, {"messages": [{**HELLO, "tool_call_id": "1"}]}, "messages[0]", "tool_call_id"),
    (
        CHAT,
        {"messages": [{**HELLO, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {}}}]}]},
        "messages[0]",
        "assistant",
    ),
    (CHAT, _said(mystery=1), "messages[1].mystery", "leave it out"),
    (GENERATE, {"mystery": 1}, "mystery", "leave it out"),
]
for _kind in ("image_url", "input_audio", "file", "video_url", "image", "thinking", "tool_use", "text/plain"):
    _part = {"type": _kind, _kind: {"url": "x"}}
    _message = {"role": "user", "content": [{"type": "text", "text": "see"}, _part]}
    REFUSED.append((CHAT, {"messages": [_message]}, "messages[0].content[1]", f'"{_kind}" parts'))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "fields", "names"), INERT)
def test_a_field_without_effect_is_taken_and_named_in_the_answers_header(
    path: str, fields: dict[str, Any], names: list[str], stream: bool
):
    if path == GENERATE:
        path = "/generate_stream" if stream else path
    else:
        fields = {**fields, "stream": stream or "stream" in fields}
    response = asyncio.run(SERVED.client.post(path, json=_body(path, **fields)))
    streams = bool(fields.get("stream")) or path.endswith("stream")
    assert ("event-stream" in response.headers["content-type"]) == streams
    assert sorted(_named(response)) == sorted(names)


@pytest.mark.parametrize(("path", "fields"), PLAIN)
def test_nulls_whole_floats_and_honoured_fields_are_taken_and_not_named(path: str, fields: dict[str, Any]):
    assert _named(_post(path, **fields)) == []


@pytest.mark.parametrize(("path", "fields", "param", "told"), REFUSED)
def test_what_would_change_the_answer_is_refused_with_what_to_do(
    path: str, fields: dict[str, Any], param: str, told: str
):
    response = _post(path, **fields)
    assert response.status_code == (422 if path == GENERATE else 400)
    error = response.json()["error"]
    message = error if isinstance(error, str) else error["message"]
    assert param in message
    assert told in message
    if path != GENERATE:
        assert error["param"] == param


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_names_of_special_tokens_are_part_of_the_text_where_asked_for(path: str, stream: bool):
    served = serve()
    for sent, expected in ((None, True), (True, True), (False, False)):
        _named(_post(path, served, skip_special_tokens=sent, stream=stream))
        assert served.backend.calls[-1].params.skip_special_tokens is expected


def test_an_echo_of_token_ids_has_their_names_as_its_answer_has():
    ids = [104, EOS, 105]
    tokenizer = make_prompts()._tokenizer
    for skip in (True, False):
        answer = _post(COMPLETIONS, prompt=ids, echo=True, skip_special_tokens=skip, max_tokens=1).json()
        expected = tokenizer._hf.backend_tokenizer.decode(ids, skip_special_tokens=skip)
        assert answer["choices"][0]["text"].startswith(expected)
        assert ("</s>" in expected) is not skip


def test_whole_floats_are_the_integers_they_are():
    served = serve()
    _post(COMPLETIONS, served, max_tokens=16.0, n=2.0, seed=3.0, top_k=5.0, prompt=[104.0, 105], stop_token_ids=[9.0])
    (call,) = served.backend.calls
    params = call.params
    numbers = (params.max_tokens, params.n, params.seed, params.top_k, *params.stop_token_ids, *call.prompt_token_ids)
    assert numbers == (16, 2, 3, 5, 9, 104, 105)
    assert {type(number) for number in numbers} == {int}


def test_a_safety_identifier_is_the_user():
    served = serve()
    for fields in ({"safety_identifier": "a"}, {"user": "a"}, {"safety_identifier": "a", "user": "b"}):
        _post(CHAT, served, **fields)
    assert {call.tenant for call in served.backend.calls} == {"a"}


def test_reasoning_reaches_a_template_that_names_it(monkeypatch: pytest.MonkeyPatch):
    from tests.serving import fakes

    written: list[Any] = []

    def write(self: Any, messages: list[dict[str, Any]], **_: Any) -> str:
        written.append(messages)
        return "hello\n"

    monkeypatch.setattr(fakes._HfTokenizer, "chat_template", "{{ message.reasoning_content }}")
    monkeypatch.setattr(fakes._HfTokenizer, "apply_chat_template", write)
    assert _named(_post(CHAT, **_said(reasoning="so"))) == []
    assert written[0][1]["reasoning_content"] == "so"


def test_a_request_id_is_the_answers_and_two_requests_may_have_one():
    served = serve()
    for _ in range(2):
        assert _post(CHAT, served, request_id="run-7:a.b").json()["id"] == "chatcmpl-run-7:a.b"
    first, second = served.backend.calls
    assert first.request_id != second.request_id


def test_usage_is_null_in_every_chunk_but_the_last_or_counts_up_in_each():
    def usages(path: str, **options: Any) -> list[Any]:
        text = _post(path, stream=True, stream_options=options, n=2).text
        return [
            json.loads(line[6:]).get("usage", "none") for line in text.split("\n\n") if line and "[DONE]" not in line
        ]

    for path in (CHAT, COMPLETIONS):
        *others, last = usages(path, include_usage=True)
        assert others
        assert set(map(str, others)) == {"None"}
        assert last["completion_tokens"] == 12
        *others, last = usages(path, include_usage=True, continuous_usage_stats=True)
        counts = [usage["completion_tokens"] for usage in others]
        assert counts == sorted(counts)
        assert (counts[-1], last["completion_tokens"]) == (12, 12)
        assert all(usage["prompt_tokens"] == 6 for usage in others)
        assert set(usages(path)) == {"none"}
        assert usages(path, continuous_usage_stats=True)[-1]["completion_tokens"] == 12


def test_token_ids_are_returned_when_asked_for():
    ids, prompt = [*b"hello", EOS], list(b"hello\n")
    body = _post(CHAT, return_token_ids=True).json()
    assert (body["prompt_token_ids"], body["choices"][0]["token_ids"]) == (prompt, ids)
    for choice in _post(COMPLETIONS, return_token_ids=True, n=2).json()["choices"]:
        assert (choice["prompt_token_ids"], choice["token_ids"]) == (prompt, ids)
    assert "token_ids" not in _post(COMPLETIONS).text
    for path in (CHAT, COMPLETIONS):
        text = _post(path, stream=True, return_token_ids=True, n=2).text
        chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line and "[DONE]" not in line]
        for index in range(2):
            own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
            first = own[0] if path == CHAT else own[0]["choices"][0]
            assert first["prompt_token_ids"] == prompt
            assert [i for chunk in own for i in chunk["choices"][0].get("token_ids", [])] == ids


@pytest.mark.parametrize(
    ("top", "expected"),
    [
        ((), {"h": -3.0}),
        (((90, -1.0),), {"Z": -1.0, "h": -3.0}),
        (((90, -1.0), (104, -3.0)), {"Z": -1.0, "h": -3.0}),
        (((200, -1.0), (201, -2.0)), {"\ufffd": -1.0, "h": -3.0}),
    ],
)
def test_the_sampled_token_is_always_among_the_top_logprobs_of_a_completion(top: Any, expected: dict[str, float]):
    written = LogprobWriter(make_prompts(), ()).completion([TokenLogprobs(104, -3.0, top)])
    assert written["top_logprobs"] == [expected]


def test_the_official_client_reads_it_all():
    async def ask() -> None:
        served = serve(FakeBackend())
        client = openai.AsyncOpenAI(base_url="http://chorus/v1", api_key="none", http_client=served.client)
        parts: Any = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
        messages: Any = [{"role": "user", "content": parts}]
        raw = await client.chat.completions.with_raw_response.create(
            model="demo", messages=messages, metadata={"a": "b"}, prompt_cache_key="k", safety_identifier="s",
            extra_body={"return_token_ids": True, "request_id": "mine"},
        )  # fmt: skip
        answer = raw.parse()
        assert (answer.id, answer.choices[0].message.content) == ("chatcmpl-mine", "hello")
        assert raw.headers["x-chorus-inert"] == "metadata"
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.completions.create(model="alpha", prompt="abc", stream=True, stream_options=options)
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "ABC"
        assert all(chunk.usage is not None for chunk in chunks)
        with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'"):
            await client.completions.create(model="demo", prompt="a", extra_body={"temperatur": 1})

    asyncio.run(ask())
