"""The Messages API over fake replicas, through Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import anthropic
import httpx
import httpx2
import pytest

from deployments.calls import Fault
from deployments.http.anthropic import replies, translate
from deployments.http.anthropic.schema import MessagesRequest
from deployments.http.auth import ApiKeys
from deployments.http.openai.parts import End, Piece
from tests.serving.fakes import KEY, URL, FakeBackend, Served, serve

PATH = "/v1/messages"
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def _ask(served: Served, ask: Callable[[anthropic.AsyncAnthropic], Coroutine[Any, Any, Any]], key: str = "none") -> Any:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=served.app, raise_app_exceptions=False))
    client = anthropic.AsyncAnthropic(api_key=key, base_url=URL, http_client=http, max_retries=0)
    return asyncio.run(ask(client))


def _post(body: Any, served: Served | None = None, path: str = PATH, **options: Any) -> httpx.Response:
    return asyncio.run((served or serve()).client.post(path, json=body, **options))


def test_a_message_is_answered():
    served = serve()
    message = _ask(served, lambda c: c.messages.create(model="demo", max_tokens=64, messages=HELLO))
    assert [(block.type, block.text) for block in message.content] == [("text", "hello")]
    assert (message.role, message.stop_reason, message.stop_sequence) == ("assistant", "end_turn", None)
    assert (message.usage.input_tokens, message.usage.output_tokens) == (6, 6)
    assert message.id.startswith("msg_")


def test_a_stream_gives_what_the_whole_gives():
    served = serve()

    async def streamed(client: anthropic.AsyncAnthropic) -> Any:
        async with client.messages.stream(model="alpha", max_tokens=64, messages=HELLO) as stream:
            texts = [text async for text in stream.text_stream]
            return texts, await stream.get_final_message()

    texts, message = _ask(served, streamed)
    assert texts == list("HELLO")
    assert [block.text for block in message.content] == ["HELLO"]
    assert (message.stop_reason, message.usage.output_tokens, message.usage.input_tokens) == ("end_turn", 6, 6)
    assert served.backend.open_streams == 0


def test_the_length_ends_it():
    message = _ask(serve(), lambda c: c.messages.create(model="demo", max_tokens=3, messages=HELLO))
    assert (message.content[0].text, message.stop_reason) == ("hel", "max_tokens")


def test_tokens_are_counted_and_nothing_is_made():
    served = serve()
    counted = _ask(served, lambda c: c.messages.count_tokens(model="demo", messages=HELLO, system="be brief"))
    assert counted.input_tokens == len("be brief\nhello\n")
    assert served.backend.calls == []


FIELDS = [
    ({"temperature": 0.5}, lambda p: p.temperature, 0.5),
    ({"top_p": 0.5}, lambda p: p.top_p, 0.5),
    ({"top_k": 7}, lambda p: p.top_k, 7),
    ({"stop_sequences": ["x", "y"]}, lambda p: p.stop, ("x", "y")),
    ({"max_tokens": 5}, lambda p: p.max_tokens, 5),
]


@pytest.mark.parametrize(("fields", "read", "wanted"), FIELDS, ids=[str(list(row[0])) for row in FIELDS])
def test_sampling_fields_reach_the_engine(fields, read, wanted):
    served = serve()
    assert _post({"model": "demo", "max_tokens": 9, "messages": HELLO, **fields}, served).status_code == 200
    assert read(served.backend.calls[0].params) == wanted


def test_other_fields_reach_the_call():
    served = serve()
    body = {"model": "alpha", "max_tokens": 9, "messages": HELLO, "metadata": {"user_id": "u"}, "seed": 11}
    assert _post(body | {"adapter_source": "s3", "cache_salt": "salt"}, served).status_code == 200
    (call,) = served.backend.calls
    assert (call.adapter, call.adapter_source, call.seed, call.tenant) == ("alpha", "s3", 11, "u")
    assert "salt" in call.cache_salt


def _fields(**body: Any) -> dict[str, Any]:
    return translate.chat_fields(MessagesRequest.model_validate({"model": "m", "max_tokens": 1, **body}))


def test_blocks_become_messages_of_a_chat():
    weather = {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Zürich"}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "rain"}]}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "weather?", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, weather]},
        {"role": "user", "content": [result, {"type": "text", "text": "so?"}]},
    ]
    messages = _fields(messages=turns, system=[{"type": "text", "text": "brief"}])["messages"]
    assert messages == [
        {"role": "system", "content": [{"type": "text", "text": "brief"}]},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
        {"role": "user", "content": [{"type": "text", "text": "so?"}]},
    ]


def test_a_failed_call_says_so():
    result = {"type": "tool_result", "tool_use_id": "c1", "content": "no such city", "is_error": True}
    (message,) = _fields(messages=[{"role": "user", "content": [result]}])["messages"]
    assert message["content"] == "Error: no such city"


TOOL = {"name": "weather", "description": "now", "input_schema": {"type": "object"}}
CHOICES = [
    ({"type": "auto"}, "auto"),
    ({"type": "any"}, "required"),
    ({"type": "none"}, "none"),
    ({"type": "tool", "name": "weather"}, {"type": "function", "function": {"name": "weather"}}),
]


@pytest.mark.parametrize(("choice", "wanted"), CHOICES, ids=[row[0]["type"] for row in CHOICES])
def test_tools_become_those_of_a_chat(choice, wanted):
    fields = _fields(messages=HELLO, tools=[TOOL], tool_choice={**choice, "disable_parallel_tool_use": True})
    function = {"name": "weather", "description": "now", "parameters": {"type": "object"}}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert (fields["tool_choice"], fields["parallel_tool_calls"]) == (wanted, False)


def test_a_last_turn_of_the_assistants_is_gone_on_with():
    fields = _fields(messages=[*HELLO, {"role": "assistant", "content": "well,"}])
    assert (fields["continue_final_message"], fields["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize(("kind", "wanted"), [("enabled", True), ("disabled", False)])
def test_thinking_is_an_argument_of_the_template(kind, wanted):
    thinking = {"type": kind, "budget_tokens": 100}
    assert _fields(messages=HELLO, thinking=thinking)["chat_template_kwargs"] == {"enable_thinking": wanted}


PIECES = [
    Piece("reasoning", "h"),
    Piece("reasoning", "m"),
    Piece("text", "let "),
    Piece("text", "me"),
    Piece("call", "", 0, "c0", "weather"),
    Piece("call", '{"city":', 0),
    Piece("call", '"Bern"}', 0),
    Piece("call", "", 1, "c1", "time"),
    Piece("call", "{}", 1),
    End("tool_calls", None),
]
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}


def test_blocks_follow_each_other_in_a_stream():
    events = replies.Events(replies.Head("1", "m"))
    told = [events.start(USAGE), *(e for piece in PIECES for e in events.take(piece)), *events.finish(USAGE)]
    blocks: list[Any] = []
    is_open = False
    for event in told[1:-2]:
        if event["type"] == "content_block_start":
            assert (is_open, event["index"]) == (False, len(blocks))
            blocks.append([event["content_block"], ""])
            is_open = True
        elif event["type"] == "content_block_delta":
            assert (is_open, event["index"]) == (True, len(blocks) - 1)
            delta = event["delta"]
            blocks[-1][1] += delta.get("text", "") + delta.get("thinking", "") + delta.get("partial_json", "")
        else:
            assert (is_open, event["type"]) == (True, "content_block_stop")
            is_open = False
    assert not is_open
    assert [(block["type"], text) for block, text in blocks] == [
        ("thinking", "hm"),
        ("text", "let me"),
        ("tool_use", '{"city":"Bern"}'),
        ("tool_use", "{}"),
    ]
    assert [(block.get("id"), block.get("name")) for block, _ in blocks[2:]] == [("c0", "weather"), ("c1", "time")]
    assert told[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert told[-2]["usage"]["output_tokens"] == 4
    assert told[-1] == {"type": "message_stop"}


def test_a_whole_message_has_the_same_blocks():
    whole = [
        Piece("reasoning", "hm"),
        Piece("text", "let me"),
        Piece("call", '{"city":"Bern"}', 0, "c0", "weather"),
        Piece("call", "not JSON", 1, "c1", "time"),
        End("stop", "STOP"),
    ]
    message = replies.whole(replies.Head("1", "m"), whole, USAGE)
    assert message["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": ""},
        {"type": "text", "text": "let me"},
        {"type": "tool_use", "id": "c0", "name": "weather", "input": {"city": "Bern"}},
        {"type": "tool_use", "id": "c1", "name": "time", "input": {"arguments": "not JSON"}},
    ]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "STOP")
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (4, 5, 4)


REFUSED = [
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "n", "input": {}}]}]}, "user"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "assistant"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"container": "c"}, "container"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"thinkin": 1}, "thinking"),
    ({"metadata": {"user_id": "u" * 500}}, "metadata.user_id"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_what_is_not_served_is_refused_by_name(fields, named):
    response = _post({"model": "demo", "max_tokens": 9, "messages": HELLO, **fields})
    assert response.status_code == 400, response.text
    body = response.json()
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")
    assert named in body["error"]["message"]


def test_neutral_fields_are_named():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hello", "cache_control": {"type": "ephemeral"}}]}
    ]
    response = _post({"model": "demo", "max_tokens": 9, "messages": messages, "service_tier": "auto"})
    assert response.status_code == 200
    assert set(response.headers["x-chorus-inert"].split(", ")) == {"cache_control", "service_tier"}


def test_errors_have_the_clients_classes():
    keyed = serve(keys=ApiKeys((KEY,)))
    with pytest.raises(anthropic.AuthenticationError):
        _ask(keyed, lambda c: c.messages.create(model="demo", max_tokens=9, messages=HELLO), "another-key-of-sixteen")
    ask = lambda c: c.messages.create(model="demo", max_tokens=9, messages=HELLO)  # noqa: E731
    assert _ask(serve(keys=ApiKeys((KEY,))), ask, KEY).content[0].text == "hello"
    with pytest.raises(anthropic.NotFoundError, match="forbidden"):
        _ask(
            serve(allowed=("alpha",)),
            lambda c: c.messages.create(model="forbidden", max_tokens=9, messages=HELLO),
        )
    full = FakeBackend(fault=Fault(code="queue_full", message="full"))
    with pytest.raises(anthropic.RateLimitError):
        _ask(serve(full), ask)


def test_a_failure_in_a_stream_is_an_event():
    broken = FakeBackend(fault=Fault(code="request_failed", message="broken"), fault_after=2)
    response = _post({"model": "demo", "max_tokens": 9, "messages": HELLO, "stream": True}, serve(broken))
    events = [json.loads(e.partition("\ndata: ")[2]) for e in response.text.split("\n\n") if e]
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "broken"}}
    assert broken.open_streams == 0
