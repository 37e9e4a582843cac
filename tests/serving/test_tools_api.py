"""Calls of tools and reasoning over every API, whole and streamed, by the clients that people use."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from deployments.calls import Call
from deployments.dialects.dialect import PLAIN, Dialect
from deployments.router.prompts import Prompts
from deployments.settings.app import LimitSettings
from tests.dialects.conversations import TOOLS, dialect_of, tokenizer_of
from tests.serving.fakes import URL, FakeBackend, Served, serve

QWEN, NEMO = "Qwen-Qwen3-0.6B", "mistralai-Mistral-Nemo-Instruct-2407"
HELLO: Any = [{"role": "user", "content": "hello"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
FILE = '<tool_call>\n{"name": "write-file", "arguments": {"path": "a", "text": "</tool_call>"}}\n</tool_call>'
THOUGHT = "<think>\nlet me see\n</think>\n\n"
NONE = {"chat_template_kwargs": {"enable_thinking": False}}


def server(
    answer: str, template: str = QWEN, dialect: Dialect | None = None, special: tuple[str, ...] = (), per_item: int = 1
) -> Served:
    def reply(call: Call) -> str:
        return answer

    tokenizer = tokenizer_of(template, special)
    prompts = Prompts(tokenizer, tokenizer.vocab_size, LimitSettings())
    return serve(FakeBackend(reply=reply, per_item=per_item), prompts=prompts, dialect=dialect or dialect_of(template))


def ask(served: Served, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    body = {"model": "demo", "messages": HELLO, **fields}
    return asyncio.run(served.client.post(path, json=body))


def choice(served: Served, **fields: Any) -> dict[str, Any]:
    response = ask(served, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def prompt_of(served: Served) -> str:
    return tokenizer_of(QWEN).decode(served.backend.calls[-1].prompt_token_ids, skip_special_tokens=False)


def streamed(served: Served, **fields: Any) -> dict[str, Any]:
    """The message that the deltas make, and why it ended."""
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    reason = None
    response = ask(served, stream=True, **fields)
    for line in response.text.splitlines():
        if not line.startswith("data: {"):
            continue
        (told,) = json.loads(line[6:])["choices"] or [{"delta": {}, "finish_reason": None}]
        reason = told["finish_reason"] or reason
        for name, value in told["delta"].items():
            if name == "tool_calls":
                for part in value:
                    if part["index"] == len(message["tool_calls"]):
                        assert part["id"]
                        assert part["type"] == "function"
                        message["tool_calls"].append({**part, "function": dict(part["function"])})
                    else:
                        message["tool_calls"][part["index"]]["function"]["arguments"] += part["function"]["arguments"]
            elif name != "role" and value:
                message[name] = (message.get(name) or "") + value
    return {"message": message, "finish_reason": reason}


CASES = [
    (THOUGHT + "Sunny.", "Sunny.", "let me see", [], "stop"),
    ("Sunny.", "Sunny.", None, [], "stop"),
    (CALL, None, None, [("get_weather", {"city": "Rome"})], "tool_calls"),
    (THOUGHT + "I look.\n" + CALL + "\n" + FILE, "I look.", "let me see",
     [("get_weather", {"city": "Rome"}), ("write-file", {"path": "a", "text": "</tool_call>"})], "tool_calls"),
    ("<tool_call>broken</tool_call>", "<tool_call>broken</tool_call>", None, [], "stop"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "content", "reasoning", "calls", "reason"), CASES, ids=range(len(CASES)))
def test_a_chat_tells_text_reasoning_and_calls_apart_whole_and_streamed(
    answer: str, content: str | None, reasoning: str | None, calls: list[Any], reason: str
) -> None:
    for told in (choice(server(answer), tools=TOOLS), streamed(server(answer), tools=TOOLS)):
        message = told["message"]
        assert message["content"] == content
        assert message.get("reasoning_content") == message.get("reasoning") == reasoning
        found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls", ())]
        assert found == calls
        ids = [call["id"] for call in message.get("tool_calls", ())]
        assert len(set(ids)) == len(ids)
        assert told["finish_reason"] == reason


def test_the_prompt_names_the_tools_and_says_what_the_template_is_told() -> None:
    served = server("x")
    choice(served, tools=TOOLS)
    assert "get_weather" in prompt_of(served)
    choice(served, tools=TOOLS, tool_choice="none")
    assert "get_weather" not in prompt_of(served)
    choice(served)
    assert "<think>" not in prompt_of(served)
    for fields in (NONE, {"reasoning_effort": "none"}):
        choice(served, **fields)
        assert prompt_of(served).endswith("<think>\n\n</think>\n\n")


def test_a_prompt_ends_where_it_is_told_to() -> None:
    served = server("x")
    choice(served)
    assert prompt_of(served).endswith("<|im_start|>assistant\n")
    choice(served, add_generation_prompt=False)
    assert prompt_of(served).endswith("hello<|im_end|>\n")
    said = [*HELLO, {"role": "assistant", "content": "I say"}]
    choice(served, messages=said, continue_final_message=True)
    assert prompt_of(served).endswith("I say")


def test_calls_and_results_are_replayed() -> None:
    served = server("x")
    calls = [{"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}]
    for content in (None, "", "I look."):
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
        choice(served, messages=[*HELLO, answer, result], tools=TOOLS)
        assert '{"name": "get_weather", "arguments": {"city": "Rome"}}' in prompt_of(served)
        assert "<tool_response>\nsunny\n</tool_response>" in prompt_of(served)


def test_ids_are_of_nine_characters_where_the_template_takes_no_others() -> None:
    answer = '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Rome"}}]'
    served = server(answer, NEMO)
    message = choice(served, tools=TOOLS)["message"]
    assert len(message["tool_calls"][0]["id"]) == 9
    calls = [{"id": "call_from_elsewhere", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    result = {"role": "tool", "tool_call_id": "call_from_elsewhere", "content": "1"}
    choice(served, messages=[*HELLO, {"role": "assistant", "tool_calls": calls}, result], tools=TOOLS)


def test_reasoning_is_left_out_or_left_in_or_told_at_once() -> None:
    answer = THOUGHT + "Sunny."
    left_out = choice(server(answer), include_reasoning=False)["message"]
    assert (left_out["content"], left_out.get("reasoning")) == ("Sunny.", None)
    assert choice(server(answer), separate_reasoning=False)["message"]["content"] == answer
    response = ask(server(answer), stream=True, stream_reasoning=False)
    parts = [json.loads(line[6:])["choices"][0]["delta"] for line in response.text.splitlines() if '"delta"' in line]
    assert [part["reasoning"] for part in parts if "reasoning" in part] == ["let me see"]


def test_tokens_of_reasoning_are_counted() -> None:
    usage = ask(server(THOUGHT + "Sunny.")).json()["usage"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == len("let me see\n</think>\n\n"), (
        "to the answer's first"
    )
    assert "completion_tokens_details" not in ask(server("Sunny.")).json()["usage"]


def test_a_required_call_is_forced_and_read() -> None:
    forced = '[{"name": "get_weather", "parameters": {"city": "Rome"}}, {"name": "write-file", "parameters": {}}]'
    served = server(forced)
    for told in (
        choice(served, tools=TOOLS, tool_choice="required"),
        streamed(served, tools=TOOLS, tool_choice="required"),
    ):
        assert told["finish_reason"] == "tool_calls"
        assert [call["function"]["name"] for call in told["message"]["tool_calls"]] == ["get_weather", "write-file"]
    params = served.backend.calls[-1].params
    assert params.grammar is not None
    schema = json.loads(params.grammar.text)
    assert "maxItems" not in schema
    assert [branch["properties"]["name"]["const"] for branch in schema["items"]["anyOf"]] == [
        "get_weather",
        "write-file",
    ]
    ask(served, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    params = served.backend.calls[-1].params
    assert params.grammar is not None
    assert json.loads(params.grammar.text)["maxItems"] == 1


def test_a_named_call_is_forced_and_read() -> None:
    served = server('{"city": "Rome"}')
    named = {"type": "function", "function": {"name": "get_weather"}}
    for told in (choice(served, tools=TOOLS, tool_choice=named), streamed(served, tools=TOOLS, tool_choice=named)):
        assert told["finish_reason"] == "tool_calls"
        (call,) = told["message"]["tool_calls"]
        assert (call["function"]["name"], call["function"]["arguments"]) == ("get_weather", '{"city": "Rome"}')
    grammar = served.backend.calls[-1].params.grammar
    assert grammar is not None
    assert json.loads(grammar.text) == TOOLS[0]["function"]["parameters"]


def test_special_tokens_that_mark_calls_are_asked_for_and_others_are_not_shown() -> None:
    served = server("Hi<bos>[TOOL_CALLS]f{}", NEMO)
    choice(served, tools=TOOLS)
    assert served.backend.calls[-1].params.skip_special_tokens, "[TOOL_CALLS] is no special token of this tokenizer"
    served = server("Hi<bos>[TOOL_CALLS]f{}", NEMO, special=("[TOOL_CALLS]",), per_item=7)
    message = choice(served, tools=TOOLS)["message"]
    assert not served.backend.calls[-1].params.skip_special_tokens
    assert (message["content"], message["tool_calls"][0]["function"]["name"]) == ("Hi", "f")


OTHER = {"type": "function", "function": {"name": "other"}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "auto"}, "tool_choice", "there are no tools"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice", "there are no tools"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "one name"),
    ({"tools": TOOLS, "tool_choice": OTHER}, "tool_choice", "get_weather"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]", "describe a function"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "pattern"),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice", "another"),
    ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs", "tools"),
    ({"functions": [{"name": "f"}]}, "functions", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "says"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_cannot_be_called_is_refused_by_name(fields: dict[str, Any], param: str, says: str) -> None:
    response = ask(server("x"), **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]


def test_a_model_that_writes_no_tools_or_in_no_known_way_says_so() -> None:
    response = ask(server("x", dialect=PLAIN), tools=TOOLS)
    assert "does not write tools" in response.json()["error"]["message"]
    unknown = Dialect(takes_tools=True)
    response = ask(server("x", dialect=unknown), tools=TOOLS)
    assert "tool_parser" in response.json()["error"]["message"]
    forced = server('{"city": "Rome"}', dialect=unknown)
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert choice(forced, tools=TOOLS, tool_choice=named)["finish_reason"] == "tool_calls"


def test_the_official_client_reads_calls_of_a_stream() -> None:
    async def run() -> Any:
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="k", http_client=server(THOUGHT + CALL).client)
        async with client.chat.completions.stream(model="demo", messages=HELLO, tools=TOOLS) as stream:  # type: ignore[arg-type]
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    message = asyncio.run(run()).choices[0].message
    assert message.tool_calls[0].function.name == "get_weather"
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}


RESPONSE_TOOLS: Any = [{"type": "function", **tool["function"], "strict": False} for tool in TOOLS]
MESSAGE_TOOLS: Any = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in (tool["function"] for tool in TOOLS)
]


@pytest.mark.parametrize("streams", [False, True])
def test_a_response_has_items_of_reasoning_and_of_calls(streams: bool) -> None:
    async def run() -> Any:
        client = openai.AsyncOpenAI(
            base_url=f"{URL}/v1", api_key="k", http_client=server(THOUGHT + "So.\n" + CALL).client
        )
        if not streams:
            return await client.responses.create(model="demo", input="hello", tools=RESPONSE_TOOLS)
        async with client.responses.stream(model="demo", input="hello", tools=RESPONSE_TOOLS) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_response()

    response = asyncio.run(run())
    assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
    assert response.output_text == "So."
    assert json.loads(response.output[2].arguments) == {"city": "Rome"}


@pytest.mark.parametrize("streams", [False, True])
def test_a_message_has_blocks_of_thinking_and_of_tools(streams: bool) -> None:
    async def run() -> Any:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=server(THOUGHT + "So.\n" + CALL).app))
        client = anthropic.AsyncAnthropic(base_url=URL, api_key="k", http_client=http)
        asked: Any = {"model": "demo", "max_tokens": 500, "messages": HELLO, "tools": MESSAGE_TOOLS}
        if not streams:
            return await client.messages.create(**asked)
        async with client.messages.stream(**asked) as stream:
            return await stream.get_final_message()

    message = asyncio.run(run())
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"city": "Rome"}
    assert message.stop_reason == "tool_use"
