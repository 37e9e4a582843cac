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
    COMPLETIONS,
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

ROOT = Path(__file__).parents[2]
SMALL = {
    "max_body_bytes": 1000,
    "max_prompt_bytes": 100,
    "max_prompt_ids": 50,
    "max_prompts": 3,
    "max_inputs": 4,
    "max_samples": 5,
}
ADDRESS = "http://h/"

Built = tuple[str, Any]  # a path and a body, or the text of one; None: asked for by GET


def _chat(**fields: Any) -> Built:
    return "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}


def _said(content: Any, **fields: Any) -> Built:
    return _chat(messages=[{"role": "user", "content": content, **fields}])


def _completion(**fields: Any) -> Built:
    return "/v1/completions", {"model": "demo", "prompt": "hi", "max_tokens": 1, **fields}


def _embed(**fields: Any) -> Built:
    return "/v1/embeddings", {"model": "demo", "input": "hi", **fields}


def _decide(*questions: Any, **fields: Any) -> Built:
    asked = list(questions) or [PREDICATE]
    return "/v1/decisions", {"model": "demo", "input": "hi", "questions": asked, **fields}


PREDICATE = {"type": "predicate", "instructions": "x"}


def _choice(values: list[Any]) -> dict[str, Any]:
    return {"type": "choice", "instructions": "x", "choices": [{"value": value} for value in values]}


def _score(labels: list[Any]) -> dict[str, Any]:
    return {"type": "score", "instructions": "x", "levels": [{"label": label} for label in labels]}


def _generate(inputs: str = "hi", **fields: Any) -> Built:
    return "/generate", {"inputs": inputs, "parameters": {"max_new_tokens": 1, **fields}}


def _register(**fields: Any) -> Built:
    return "/adapters", {"name": "one", "source": "local", **fields}


def _tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def _call() -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def _called(calls: list[Any]) -> Built:
    return _chat(messages=[{"role": "assistant", "content": "", "tool_calls": calls}, {"role": "user", "content": "x"}])


def _schema(num_bytes: int) -> dict[str, Any]:
    return {"title": "x" * (num_bytes - len('{"title": ""}'))}


def _files(n: int, value: str) -> dict[str, str]:
    return {f"file{i}": value for i in range(n)}


GAP = len('{"role": "user", "content": ""}') + 36  # what stands around a text that questions are put behind
LONG_VALUES = ["a" + "b" * 31, "c"]  # 32 places: after nothing, after "a", after "ab", ..


BUILD: dict[tuple[str, str, str], Callable[[int], Built]] = {
    (BODY, "", "bytes"): lambda n: ("/v1/completions", json.dumps(_completion()[1]).ljust(n)),
    (BODY, "", "levels of lists and objects"): lambda n: _chat(
        metadata={"x": json.loads("[" * (n - 2) + "]" * (n - 2))}
    ),
    (BODY, "", "lists and objects"): lambda n: _chat(metadata={"x": [[]] * (n - 5)}),
    (BODY, "", "strings, names of fields among them"): lambda n: _chat(metadata={"x": ["a"] * (n - 9)}),
    (BODY, "", LIMITS[4].what): lambda n: _chat(metadata={"x": [1] * (n + limits.MAX_OTHER_VALUES - 8)}),
    (CHAT, "messages", "messages"): lambda n: _chat(messages=[{"role": "user", "content": "a"}] * n),
    (CHAT, "messages", "bytes of text"): lambda n: _said("x" * (n - len('{"role": "user", "content": ""}'))),
    (CHAT, "messages[].content", "parts"): lambda n: _said([{"type": "text", "text": "a"}] * n),
    (CHAT, "messages[].name", "characters"): lambda n: _said("hi", name="x" * n),
    (CHAT, "messages[].tool_calls", "calls"): lambda n: _called([_call()] * n),
    (CHAT, "messages[].tool_calls[].id", "characters"): lambda n: _called([{**_call(), "id": "i" * n}]),
    (CHAT, "messages[].tool_call_id", "characters"): lambda n: _chat(
        messages=[{"role": "tool", "content": "x", "tool_call_id": "i" * n}]
    ),
    (CHAT, "tools", "tools"): lambda n: _chat(tools=[_tool(f"f{i}") for i in range(n)], tool_choice="none"),
    (CHAT, "tools[].function.name", "characters"): lambda n: _chat(tools=[_tool("f" * n)], tool_choice="none"),
    (CHAT, "reasoning_effort", "characters"): lambda n: _chat(reasoning_effort="none".ljust(n, "x")),
    (CHAT, "top_logprobs", "tokens"): lambda n: _chat(logprobs=True, top_logprobs=n),
    (COMPLETIONS, "prompt", "prompts"): lambda n: _completion(prompt=["a"] * n),
    (COMPLETIONS, "prompt", "bytes of text in one prompt"): lambda n: _completion(prompt="x" * n),
    (COMPLETIONS, "prompt", "token ids in all prompts"): lambda n: _completion(prompt=[[7] * (n - 1), [7]]),
    (COMPLETIONS, "logprobs", "tokens"): lambda n: _completion(logprobs=n),
    (OPENAI, "model", "characters"): lambda n: _chat(model="m" * n),
    (OPENAI, "n", "samples of a prompt"): lambda n: _completion(n=n),
    (OPENAI, "n", "samples: prompts times n"): lambda n: _completion(n=n),
    (OPENAI, "stop", "strings"): lambda n: _chat(stop=["~"] * n),
    (OPENAI, "stop", "characters of one"): lambda n: _completion(stop="~" * n),
    (OPENAI, "stop_token_ids", "token ids"): lambda n: _completion(stop_token_ids=[9] * n),
    (OPENAI, "logit_bias", "tokens"): lambda n: _completion(logit_bias={str(i): 1 for i in range(n)}),
    (OPENAI, "response_format", "bytes of a schema"): lambda n: _chat(
        response_format={"type": "json_schema", "json_schema": {"schema": _schema(n)}}
    ),
    (OPENAI, "structured_outputs", "bytes of a schema, grammar or expression"): lambda n: _completion(
        structured_outputs={"regex": "a" * n}
    ),
    (OPENAI, "structured_outputs.choice", "texts"): lambda n: _completion(structured_outputs={"choice": ["a"] * n}),
    (OPENAI, "user", "characters"): lambda n: _chat(user="u" * n),
    (OPENAI, "safety_identifier", "characters"): lambda n: _chat(safety_identifier="u" * n),
    (OPENAI, "cache_salt", "characters"): lambda n: _completion(cache_salt="u" * n),
    (OPENAI, "prompt_cache_key", "characters"): lambda n: _completion(prompt_cache_key="u" * n),
    (OPENAI, "request_id", "characters"): lambda n: _chat(request_id="r" * n),
    (OPENAI, "adapter_source", "characters"): lambda n: _chat(model="alpha", adapter_source="s" * n),
    (VECTORS, "input", "texts or lists of token ids"): lambda n: _embed(input=["a"] * n),
    (VECTORS, "input", "bytes of one text"): lambda n: _embed(input="x" * n),
    (VECTORS, "input", "token ids in all lists"): lambda n: _embed(input=[[7] * (n - 1), [7]]),
    (VECTORS, "documents", "texts, the query among them"): lambda n: (
        "/rerank",
        {"query": "a", "documents": ["a"] * (n - 1)},
    ),
    (VECTORS, "text_2", "texts, those of `text_1` among them"): lambda n: (
        "/score",
        {"text_1": "a", "text_2": ["a"] * (n - 1)},
    ),
    (VECTORS, "model", "characters"): lambda n: _embed(model="m" * n),
    (VECTORS, "user", "characters"): lambda n: _embed(user="u" * n),
    (VECTORS, "safety_identifier", "characters"): lambda n: _embed(safety_identifier="u" * n),
    (VECTORS, "cache_salt", "characters"): lambda n: _embed(cache_salt="u" * n),
    (VECTORS, "prompt_cache_key", "characters"): lambda n: _embed(prompt_cache_key="u" * n),
    (VECTORS, "adapter_source", "characters"): lambda n: _embed(model="alpha", adapter_source="s" * n),
    (DECISIONS, "model", "names"): lambda n: _decide(model=[f"a{i}" for i in range(n)]),
    (DECISIONS, "model", "characters of a name"): lambda n: _decide(model=["m" * n, "demo"]),
    (DECISIONS, "input", "bytes of text"): lambda n: _decide(input="x" * (n - GAP)),
    (DECISIONS, "input", "messages, calls and outputs"): lambda n: _decide(
        input=[{"role": "user", "content": "a"}] * n
    ),
    (DECISIONS, "questions", "questions"): lambda n: _decide(*[PREDICATE] * n),
    (DECISIONS, "questions", "prompts: models, questions, places where answers part"): lambda n: _decide(
        *[_choice(LONG_VALUES)] * (n // 32 + (n % 32 > 0))
    ),
    (DECISIONS, "choices", "values"): lambda n: _decide(_choice([str(i) for i in range(n)])),
    (DECISIONS, "value", "characters"): lambda n: _decide(_choice(["v" * n, "w"])),
    (DECISIONS, "levels", "levels"): lambda n: _decide(_score([str(i) for i in range(n)])),
    (DECISIONS, "label", "characters"): lambda n: _decide(_score(["v" * n, "w"])),
    (DECISIONS, "name", "characters"): lambda n: _decide({**PREDICATE, "name": "n" * n}),
    (DECISIONS, "instructions", "parts"): lambda n: _decide(
        {**PREDICATE, "instructions": [{"type": "input_text", "text": "a"}] * n}
    ),
    (DECISIONS, "safety_identifier", "characters"): lambda n: _decide(safety_identifier="u" * n),
    (DECISIONS, "cache_salt", "characters"): lambda n: _decide(cache_salt="u" * n),
    (DECISIONS, "prompt_cache_key", "characters"): lambda n: _decide(prompt_cache_key="u" * n),
    (DECISIONS, "adapter_source", "characters"): lambda n: _decide(model="alpha", adapter_source="s" * n),
    (LORAX, "inputs", "bytes of text"): lambda n: _generate("x" * n),
    (LORAX, "adapter_id", "characters"): lambda n: _generate(adapter_id="m" * n),
    (LORAX, "adapter_source", "characters"): lambda n: _generate(adapter_id="alpha", adapter_source="s" * n),
    (LORAX, "merged_adapters.ids", "adapters merged for one request"): lambda n: _generate(
        merged_adapters={"ids": ["alpha"] * n, "weights": [1] * n}
    ),
    (LORAX, "response_format", "bytes of a schema"): lambda n: _generate(
        response_format={"type": "json_object", "schema": _schema(n)}
    ),
    (LORAX, "stop", "strings"): lambda n: _generate(stop=["~"] * n),
    (LORAX, "stop", "characters of one"): lambda n: _generate(stop=["~" * n]),
    (LORAX, "best_of", "samples"): lambda n: _generate(best_of=n, do_sample=True),
    (LORAX, "return_k_alternatives", "tokens"): lambda n: _generate(return_k_alternatives=n, details=True),
    (ADAPTERS, "", "adapters registered at once"): lambda n: (
        "/adapters",
        [{"name": f"a{i}", "source": "local"} for i in range(n)],
    ),
    (ADAPTERS, "name", "characters"): lambda n: _register(name="a" * n),
    (ADAPTERS, "source", "characters"): lambda n: _register(source="s" * n),
    (ADAPTERS, "location", "characters"): lambda n: _register(location="l" * n),
    (ADAPTERS, "urls", "files"): lambda n: _register(urls=_files(n, "http://h/x")),
    (ADAPTERS, "urls", "characters of an address"): lambda n: _register(urls={"f": ADDRESS + "x" * (n - len(ADDRESS))}),
    (ADAPTERS, "urls", "characters of a file's name"): lambda n: _register(urls={"f" * n: "http://h/x"}),
    (ADAPTERS, "sha256", "files"): lambda n: _register(sha256=_files(n, "0" * 64)),
    (ADAPTERS, "sha256", "characters of a file's name"): lambda n: _register(sha256={"f" * n: "0" * 64}),
    (QUERY, "after", "characters"): lambda n: ("/v1/models?after=0:" + "x" * (n - 2), None),
    (QUERY, "limit", "models or adapters on a page"): lambda n: (f"/adapters?limit={n}", None),
    (QUERY, "name", "characters of a name in the path"): lambda n: ("/v1/models/" + "m" * n, None),
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
        assert _ask(_completion(prompt=prompt), LimitSettings()).status_code == 200
    assert names[0] == "MainThread"
    assert names[1].startswith("bodies")
