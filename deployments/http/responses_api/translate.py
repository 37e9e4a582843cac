"""Bodies of the Responses API as chats: pure. What a chat can say is honoured there, by one code for all APIs."""

from __future__ import annotations

from typing import Any

from deployments.http.responses_api.items import as_messages
from deployments.http.responses_api.schema import LOGPROBS, FunctionTool, NamedTool, ResponsesRequest, TextFormat


def chat_fields(body: ResponsesRequest, items: list[Any]) -> dict[str, Any]:
    """The fields of a chat that ask for the same. `items`: the input behind what went before."""
    messages = as_messages(items)
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_tool(tool) for tool in body.tools] if body.tools else None,
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _format(body.text.format) if body.text and body.text.format else None,
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
    }
    if LOGPROBS in (body.include or ()) or body.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    same = (
        "temperature", "top_p", "stream", "user", "safety_identifier", "prompt_cache_key",
        "top_k", "min_p", "seed", "stop", "adapter_source", "cache_salt",
    )  # fmt: skip
    fields |= {name: getattr(body, name) for name in same}
    return {name: value for name, value in fields.items() if value is not None}


def inert_includes(body: ResponsesRequest) -> tuple[str, ...]:
    """("include",) where it asks for parts that no response of this server has."""
    return ("include",) if any(name != LOGPROBS for name in body.include or ()) else ()


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    for name in ("description", "parameters", "strict"):
        if (value := getattr(tool, name)) is not None:
            function[name] = value
    return {"type": "function", "function": function}


def _choice(choice: str | NamedTool | None) -> Any:
    return {"type": "function", "function": {"name": choice.name}} if isinstance(choice, NamedTool) else choice


def _format(told: TextFormat) -> dict[str, Any] | None:
    if told.type != "json_schema":
        return {"type": told.type}
    described = {"name": told.name, "description": told.description, "schema": told.schema_, "strict": told.strict}
    return {"type": "json_schema", "json_schema": {name: v for name, v in described.items() if v is not None}}
