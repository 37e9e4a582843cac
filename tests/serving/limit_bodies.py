"""A body for each row of the table of limits, that holds as much as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from deployments.http import limits
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
    TOKENS,
    VECTORS,
)

ADDRESS = "http://h/"

Built = tuple[str, Any]  # a path and a body, or the text of one; None: asked for by GET


def _chat(**fields: Any) -> Built:
    return "/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}


def _said(content: Any, **fields: Any) -> Built:
    return _chat(messages=[{"role": "user", "content": content, **fields}])


def completion(**fields: Any) -> Built:
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
    (BODY, "", "bytes"): lambda n: ("/v1/completions", json.dumps(completion()[1]).ljust(n)),
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
    (COMPLETIONS, "prompt", "prompts"): lambda n: completion(prompt=["a"] * n),
    (COMPLETIONS, "prompt", "bytes of text in one prompt"): lambda n: completion(prompt="x" * n),
    (COMPLETIONS, "prompt", "token ids in all prompts"): lambda n: completion(prompt=[[7] * (n - 1), [7]]),
    (COMPLETIONS, "logprobs", "tokens"): lambda n: completion(logprobs=n),
    (OPENAI, "model", "characters"): lambda n: _chat(model="m" * n),
    (OPENAI, "n", "samples of a prompt"): lambda n: completion(n=n),
    (OPENAI, "n", "samples: prompts times n"): lambda n: completion(n=n),
    (OPENAI, "stop", "strings"): lambda n: _chat(stop=["~"] * n),
    (OPENAI, "stop", "characters of one"): lambda n: completion(stop="~" * n),
    (OPENAI, "stop_token_ids", "token ids"): lambda n: completion(stop_token_ids=[9] * n),
    (OPENAI, "prompt_logprobs", "tokens"): lambda n: completion(prompt_logprobs=n),
    (OPENAI, "allowed_token_ids", "token ids"): lambda n: completion(allowed_token_ids=[9] * n),
    (OPENAI, "bad_words", "words"): lambda n: completion(bad_words=["~"] * n),
    (OPENAI, "bad_words", "characters of one"): lambda n: _chat(bad_words=["x".ljust(n)]),
    (OPENAI, "rid", "characters"): lambda n: completion(rid="r" * n),
    (OPENAI, "logit_bias", "tokens"): lambda n: completion(logit_bias={str(i): 1 for i in range(n)}),
    (OPENAI, "response_format", "bytes of a schema"): lambda n: _chat(
        response_format={"type": "json_schema", "json_schema": {"schema": _schema(n)}}
    ),
    (OPENAI, "structured_outputs", "bytes of a schema, grammar or expression"): lambda n: completion(
        structured_outputs={"regex": "a" * n}
    ),
    (OPENAI, "structured_outputs.choice", "texts"): lambda n: completion(structured_outputs={"choice": ["a"] * n}),
    (OPENAI, "user", "characters"): lambda n: _chat(user="u" * n),
    (OPENAI, "safety_identifier", "characters"): lambda n: _chat(safety_identifier="u" * n),
    (OPENAI, "cache_salt", "characters"): lambda n: completion(cache_salt="u" * n),
    (OPENAI, "prompt_cache_key", "characters"): lambda n: completion(prompt_cache_key="u" * n),
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
    (TOKENS, "tokens", "token ids"): lambda n: ("/detokenize", {"tokens": [7] * n}),
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
