"""Items of a response's input: what was said, called and thought, and the messages of a chat that say the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from deployments.http import limits
from deployments.http.wire import Body, inert, kind_of, refused, shown, unsupported

Identifier = Annotated[str, Field(min_length=1, max_length=limits.MAX_LABEL_CHARS)]
Id = Annotated[str | None, inert("items are told apart by their places")]
Status = Annotated[Any, inert("an item of the input is what it says")]
_IGNORED = "equal prefixes are found by their tokens"
_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal")


def _shape(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "str"


class Part(Body):
    """A part of an item's content. Parts that are no text are refused by their type."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: Annotated[Any, inert("the text says it all")] = None
    logprobs: Annotated[Any, inert("the text says it all")] = None
    prompt_cache_breakpoint: Annotated[Any, inert(_IGNORED)] = None


class Refusal(Body):
    """What an assistant said instead."""

    type: Literal["refusal"]
    refusal: str


def _is_text(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind not in _PARTS:
        raise unsupported(f"{shown(kind)} parts; send text")
    return value


def _part(value: Any) -> str:
    return "[refusal]" if kind_of(value) == "refusal" else "[text]"


_Part = Annotated[
    Annotated[Part, Tag("[text]")] | Annotated[Refusal, Tag("[refusal]")],
    Discriminator(_part),
    BeforeValidator(_is_text),
]
_Parts = Annotated[list[_Part], Field(max_length=limits.MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[str, Tag("str")] | Annotated[_Parts, Tag("list")], Discriminator(_shape)]


class MessageItem(Body):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Id = None
    status: Status = None
    phase: Annotated[Any, inert("an item of the input is what it says")] = None


class CallItem(Body):
    """A call that an earlier response made."""

    type: Literal["function_call"]
    call_id: Identifier
    name: Identifier
    arguments: str
    id: Id = None
    status: Status = None
    caller: Annotated[Any, refused("calls of programs", {"type": "direct"})] = None
    namespace: Annotated[Any, refused("namespaces of tools")] = None


class OutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Identifier
    output: Content
    id: Id = None
    status: Status = None
    name: Annotated[Any, inert("call_id names the call")] = None


class ReasoningItem(Body):
    """What an earlier response thought, for templates that write it."""

    type: Literal["reasoning"]
    summary: _Parts = Field(default_factory=list)
    content: _Parts | None = None
    encrypted_content: Annotated[Any, refused("reasoning that only its writer can read; send content")] = None
    id: Id = None
    status: Status = None


_KINDS = {"message": "message", "function_call": "call", "function_call_output": "output", "reasoning": "reasoning"}


def _is_known(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind not in _KINDS:
        raise unsupported(f"items of type {shown(kind)}; send {', '.join(_KINDS)}")
    return value


def _kind(value: Any) -> str:
    return f"[{_KINDS.get(kind_of(value) or 'message', 'message')}]"


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[call]")]
    | Annotated[OutputItem, Tag("[output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(_kind),
    BeforeValidator(_is_known),
]


def as_messages(items: Iterable[MessageItem | CallItem | OutputItem | ReasoningItem]) -> list[dict[str, Any]]:
    """Messages of a chat. What one answer was made of (reasoning, text, calls) is one message there."""
    messages: list[dict[str, Any]] = []
    answer: dict[str, Any] | None = None  # that goes on
    for item in items:
        if isinstance(item, OutputItem):
            answer = None
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            continue
        if isinstance(item, MessageItem) and item.role != "assistant":
            answer = None
            messages.append({"role": item.role, "content": _content(item.content)})
            continue
        begins_anew = answer is not None and (
            isinstance(item, ReasoningItem) or (isinstance(item, MessageItem) and answer["content"] is not None)
        )
        if answer is None or begins_anew:
            answer = {"role": "assistant", "content": None}
            messages.append(answer)
        _say(answer, item)
    return messages


def _say(answer: dict[str, Any], item: MessageItem | CallItem | ReasoningItem) -> None:
    if isinstance(item, CallItem):
        function = {"name": item.name, "arguments": item.arguments}
        answer.setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})
    elif isinstance(item, ReasoningItem):
        answer["reasoning_content"] = "".join(_text(part) for part in item.content or item.summary)
    else:
        answer["content"] = _content(item.content)


def _content(content: str | list[Part | Refusal]) -> str | list[dict[str, str]]:
    return content if isinstance(content, str) else [{"type": "text", "text": _text(part)} for part in content]


def _text(part: Part | Refusal) -> str:
    return part.refusal if isinstance(part, Refusal) else part.text
