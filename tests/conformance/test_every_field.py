"""Every field of chats and completions, asked with OpenAI's own client of a real engine: an answer that differs.

A field that is ignored fails its row; a field without a row fails the walk over /openapi.json.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.router.gateway import Gateway
from deployments.settings.app import LimitSettings
from tests.serving.fakes import FakeAdapters, serve
from tests.support.one_engine import OneEngine

CHAT, TEXT = "chat", "completions"
WAIT_S = 60.0
# What can be said of any of the two: of the demo's base, which repeats the last line.
HOT = {"temperature": 2.0, "seed": 1, "n": 4, "max_tokens": 12}
LONG = {"prompt": "a line that is long enough for a block of the cache, and another one\n"}
TWO = {"allowed_token_ids": [97, 98], "temperature": 1.0, "seed": 1, "n": 4, "max_tokens": 12}
STOPPED = {"stop": ["o"]}
TOWN = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
ROME = '{"city": "Rome"}'


@pytest.fixture(scope="module")
def backend() -> Iterator[OneEngine]:
    backend = OneEngine()
    yield backend
    backend.engine.close()


def ask(backend: OneEngine, kind: str, *bodies: dict[str, Any]) -> list[dict[str, Any]]:
    """What the official client gives for each body: the answer, without what is new in each."""

    async def run() -> list[dict[str, Any]]:
        gateway = Gateway(backend=backend, adapters=FakeAdapters(), prompts=backend.prompts, model_id="demo")
        app = create_api(gateway, ApiKeys(is_local=True), LimitSettings())
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://chorus", timeout=WAIT_S)
        client = openai.AsyncOpenAI(api_key="k", base_url="http://chorus/v1", http_client=http, max_retries=0)
        async with asyncio.timeout(WAIT_S):
            return [await _one(client, kind, body) for body in bodies]

    return asyncio.run(run())


async def _one(client: openai.AsyncOpenAI, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    said: Any = (
        {"messages": [{"role": "user", "content": "hello world"}]} if kind == CHAT else {"prompt": "hello world\n"}
    )
    create: Any = client.chat.completions.create if kind == CHAT else client.completions.create
    fields = {"temperature": 0, "max_tokens": 40, **said, **body}
    own = {name: fields.pop(name) for name in ("messages", "prompt") if name in fields}
    stream = bool(fields.pop("stream", False))
    answer = await create(model="demo", **own, stream=stream, extra_body=fields)
    if stream:
        told: dict[str, Any] = {"chunks": [chunk.model_dump() async for chunk in answer]}
        for chunk in told["chunks"]:
            chunk["id"] = chunk["created"] = None
        return told
    return {**answer.model_dump(), "id": answer.id if "request_id" in body or "rid" in body else None, "created": None}


def texts(answer: dict[str, Any]) -> list[str]:
    return [c["text"] if "text" in c else c["message"]["content"] for c in answer["choices"]]


Check = Callable[[dict[str, Any]], bool]


def says(*wanted: str) -> Check:
    return lambda answer: texts(answer) == list(wanted)


# (endpoint or both, field, its value, what is asked beside it, what must hold of the answer beyond that it differs)
ROWS: list[tuple[str | None, str, Any, dict[str, Any], Check | None]] = [
    (CHAT, "messages", [{"role": "user", "content": "other"}], {}, says("other")),
    (TEXT, "prompt", ["one\n", "two\n"], {}, says("one", "two")),
    (TEXT, "prompt", [256, 104, 105, 10], {}, says("hi")),
    (None, "stream", True, {}, lambda a: len(a["chunks"]) > 5),
    (None, "stream_options", {"include_usage": True}, {"stream": True}, lambda a: a["chunks"][-1]["usage"] is not None),
    (None, "stream_options", {"include_usage": True, "continuous_usage_stats": True}, {"stream": True},
     lambda a: all(chunk["usage"] for chunk in a["chunks"])),
    (None, "max_tokens", 3, {}, says("hel")),
    (CHAT, "max_completion_tokens", 3, {"max_tokens": None}, says("hel")),
    (None, "temperature", 2.0, {"n": 4, "seed": 1, "max_tokens": 12}, None),
    (None, "top_p", 0.3, HOT, says(*["hello world"] * 4)),
    (None, "top_k", 1, HOT, says(*["hello world"] * 4)),
    (None, "min_p", 0.5, HOT, says(*["hello world"] * 4)),
    (None, "typical_p", 0.2, HOT, says(*["hello world"] * 4)),
    (None, "n", 2, {}, says("hello world", "hello world")),
    (None, "seed", 2, HOT, None),
    (None, "stop", "o", {}, says("hell")),
    (None, "stop", ["zz", " "], {}, says("hello")),
    (None, "include_stop_str_in_output", True, STOPPED, says("hello")),
    (None, "no_stop_trim", True, STOPPED, says("hello")),
    (None, "stop_token_ids", [111], {}, lambda a: texts(a) == ["hell"] and a["choices"][0]["stop_reason"] == 111),
    (None, "presence_penalty", 2.0, TWO, None),
    (None, "frequency_penalty", 2.0, TWO, None),
    (None, "repetition_penalty", 5.0, {}, None),
    (None, "logit_bias", {"120": 100}, {"max_tokens": 3}, says("xxx")),
    (None, "allowed_token_ids", [97], {"max_tokens": 3}, says("aaa")),
    (None, "bad_words", ["hello"], {}, lambda a: "hello" not in texts(a)[0]),
    (None, "min_tokens", 15, {"max_tokens": 20}, lambda a: a["usage"]["completion_tokens"] >= 15),
    (None, "ignore_eos", True, {"max_tokens": 20}, lambda a: a["usage"]["completion_tokens"] == 20),
    (None, "skip_special_tokens", False, {"ignore_eos": True, "max_tokens": 20}, lambda a: "</s>" in texts(a)[0]),
    (None, "return_token_ids", True, {"max_tokens": 2}, lambda a: a["choices"][0]["token_ids"] == [104, 101]),
    (None, "return_tokens_as_token_ids", True, {"max_tokens": 1, "logprobs": True}, None),
    (None, "prompt_logprobs", 1, {}, None),
    (CHAT, "logprobs", True, {}, lambda a: len(a["choices"][0]["logprobs"]["content"]) == 12),
    (CHAT, "top_logprobs", 3, {"logprobs": True},
     lambda a: len(a["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3),
    (TEXT, "logprobs", 2, {}, lambda a: len(a["choices"][0]["logprobs"]["top_logprobs"][0]) == 2),
    (TEXT, "echo", True, {}, says("hello world\nhello world")),
    (TEXT, "best_of", 3, {"n": 2, "temperature": 2.0, "seed": 1}, None),
    (TEXT, "add_special_tokens", False, {}, None),
    (CHAT, "add_special_tokens", True, {}, lambda a: a["usage"]["prompt_tokens"] == 14),
    (None, "truncate_prompt_tokens", 6, {}, lambda a: a["usage"]["prompt_tokens"] == 6),
    (None, "response_format", {"type": "json_schema", "json_schema": {"name": "t", "schema": TOWN}}, {}, None),
    (None, "response_format", {"type": "json_object"}, {}, None),
    (None, "structured_outputs", {"choice": ["Rome", "Oslo"]}, {}, lambda a: texts(a)[0] in ("Rome", "Oslo")),
    (None, "structured_outputs", {"regex": "[0-9]{3}"}, {}, lambda a: texts(a)[0].isdigit()),
    (None, "structured_outputs", {"grammar": 'root ::= "x" "y"'}, {}, says("xy")),
    (None, "regex", "x{4}", {}, says("xxxx")),
    (None, "ebnf", 'root ::= "x" "y"', {}, says("xy")),
    (None, "json_schema", TOWN, {}, None),
    (None, "request_id", "mine-7", {}, lambda a: a["id"].endswith("mine-7")),
    (None, "rid", "mine-8", {}, lambda a: a["id"].endswith("mine-8")),
    (CHAT, "continue_final_message", True, {"messages": [{"role": "assistant", "content": "hello world"}]}, None),
]  # fmt: skip
# What changes nothing in a demo's answer: where its effect is proved instead.
ELSEWHERE = {
    "model": "tests/e2e/test_serve.py: adapters answer as PEFT does",
    "lora_path": "tests/serving/test_fields.py", "adapter_source": "tests/serving/test_openai_api.py",
    "user": "tests/serving/test_openai_api.py", "safety_identifier": "tests/serving/test_openai_api.py",
    "cache_salt": "below", "prompt_lookup_num_tokens": "below", "prompt_cache_key": "tests/serving/test_fields.py",
    "priority": "tests/core/test_fairness.py, tests/serving/test_fields.py",
    "tools": "tests/serving/test_tools_api.py", "tool_choice": "tests/serving/test_tools_api.py",
    "parallel_tool_calls": "tests/serving/test_tools_api.py", "chat_template_kwargs": "tests/serving/test_tools_api.py",
    "reasoning_effort": "tests/serving/test_tools_api.py", "include_reasoning": "tests/serving/test_tools_api.py",
    "separate_reasoning": "tests/serving/test_tools_api.py", "stream_reasoning": "tests/serving/test_tools_api.py",
    "add_generation_prompt": "tests/serving/test_tools_api.py",
    "documents": "tests/serving/test_tolerance.py: a template that writes none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "field", "value", "beside", "check"),
    [
        pytest.param(kind, *row[1:], id=f"{kind}-{row[1]}-{str(row[2])[:30]}")
        for row in ROWS
        for kind in ((CHAT, TEXT) if row[0] is None else (row[0],))
    ],
)
def test_a_field_changes_what_is_answered(
    kind: str, field: str, value: Any, beside: dict[str, Any], check: Check | None, backend: OneEngine
) -> None:
    if kind == TEXT and beside.get("logprobs") is True:
        beside = {**beside, "logprobs": 1}
    plain, asked = ask(backend, kind, beside, {**beside, field: value})
    assert asked != plain, f"{field} is ignored"
    assert check is None or check(asked), asked


@pytest.mark.parametrize(("kind", "schema"), [(CHAT, "ChatRequest"), (TEXT, "CompletionRequest")])
def test_every_field_has_a_row(kind: str, schema: str) -> None:
    fields = serve().app.openapi()["components"]["schemas"][schema]["properties"]
    marked = {
        name
        for name, told in fields.items()
        if str(told.get("description", "")).startswith(("Not supported", "Accepted, without effect"))
    }
    rows = {row[1] for row in ROWS if row[0] in (None, kind)}
    assert set(fields) - marked - rows - set(ELSEWHERE) == set()


def test_a_salt_parts_prefixes_and_guesses_are_made(backend: OneEngine) -> None:
    def cached(**fields: Any) -> int:
        (answer,) = ask(backend, TEXT, {**LONG, "max_tokens": 2, **fields})
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached(cache_salt="one")
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == 0
    before = backend.engine.stats().total_guessed_tokens
    repeated = {"prompt": "so so so so so so so\n"}
    plain, guessed = ask(backend, TEXT, repeated, {**repeated, "prompt_lookup_num_tokens": 4})
    assert texts(plain) == texts(guessed)
    asyncio.run(asyncio.sleep(0.2))  # the engine tells its counts every tenth of a second
    assert backend.engine.stats().total_guessed_tokens > before
