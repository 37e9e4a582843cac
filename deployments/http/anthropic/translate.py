"""Bodies of the Messages API as chats: pure. What a chat can say is honoured there, by one code for both APIs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from deployments.http.anthropic.schema import (
    Conversation,
    InputMessage,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    Tool,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)


def chat_fields(body: Conversation) -> dict[str, Any]:
    """The fields of a chat that ask for the same."""
    messages = [message for turn in body.messages for message in _messages(turn)]
    if body.system:
        messages.insert(0, {"role": "system", "content": _content(body.system)})
    chat: dict[str, Any] = {"model": body.model, "messages": messages}
    if body.messages[-1].role == "assistant":
        chat |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        chat["tools"] = [_tool(tool) for tool in body.tools]
    if body.tool_choice is not None:
        chat |= _choice(body.tool_choice)
    if body.thinking is not None and body.thinking.type != "adaptive":
        chat["chat_template_kwargs"] = {"enable_thinking": body.thinking.type == "enabled"}
    return chat | (_sampling(body) if isinstance(body, MessagesRequest) else {})


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    fields = {
        "max_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "stream": body.stream,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "user": body.metadata.user_id if body.metadata else None,
        "seed": body.seed,
        "adapter_source": body.adapter_source,
        "cache_salt": body.cache_salt,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _content(text: str | list[TextBlock]) -> str | list[dict[str, str]]:
    return text if isinstance(text, str) else [{"type": "text", "text": block.text} for block in text]


def _messages(turn: InputMessage) -> Iterator[dict[str, Any]]:
    """The results of calls are messages of their own, in front of what the user says beside them."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    for block in turn.content:
        if isinstance(block, ToolResultBlock):
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)}
    said: dict[str, Any] = {"role": turn.role}
    if texts := [block for block in turn.content if isinstance(block, TextBlock)]:
        said["content"] = _content(texts)
    if thoughts := [block.thinking for block in turn.content if isinstance(block, ThinkingBlock)]:
        said["reasoning_content"] = "\n".join(thoughts)
    if calls := [_call(block) for block in turn.content if isinstance(block, ToolUseBlock)]:
        said["tool_calls"] = calls
    if turn.role == "assistant":
        said.setdefault("content", None)
    if "content" in said:
        yield said


def _result(block: ToolResultBlock) -> str | list[dict[str, str]]:
    content = _content(block.content or "")
    if not block.is_error:
        return content
    return f"Error: {content}" if isinstance(content, str) else [{"type": "text", "text": "Error: "}, *content]


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    named = {"type": "function", "function": {"name": choice.name}}
    chosen: Any = {"auto": "auto", "any": "required", "none": "none", "tool": named}[choice.type]
    if choice.disable_parallel_tool_use is None:
        return {"tool_choice": chosen}
    return {"tool_choice": chosen, "parallel_tool_calls": not choice.disable_parallel_tool_use}
