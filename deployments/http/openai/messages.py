"""Messages of a conversation: as clients write them, and as a chat template takes them."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from deployments.http import limits
from deployments.http.wire import Body, inert, refused, shown, unsupported, wrong

Label = Annotated[str, Field(max_length=limits.MAX_LABEL_CHARS)] | None


class TextPart(Body):
    """A part of a message's content. Parts that are no text are refused by their type."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    cache_control: Annotated[Any, inert("equal prefixes are found by their tokens")] = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        if kind == "refusal":  # what an assistant said instead
            return {"text" if name == "refusal" else name: item for name, item in value.items()} | {"type": "text"}
        if isinstance(kind, str) and kind not in ("text", "input_text", "output_text"):
            raise unsupported(f"{shown(kind)} parts; send text")
        return value


def _shape(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "str"


_Parts = Annotated[list[TextPart], Field(min_length=1, max_length=limits.MAX_PARTS, fail_fast=True)]


def _arguments(value: Any) -> Any:
    """Clients send them back as the text that they were given; templates take them apart."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError:
            raise wrong(f"{shown(value)} is not JSON; send the arguments as an object, or as its JSON text") from None
    if not isinstance(value, dict):
        raise wrong(f"{shown(value)} is not an object; send the arguments as one")
    return value


class CalledFunction(Body):
    """What an assistant called, with what."""

    name: Annotated[str, Field(min_length=1, max_length=limits.MAX_TOOL_NAME_CHARS)]
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class ToolCall(Body):
    """One of `tool_calls`."""

    id: Annotated[str, Field(min_length=1, max_length=limits.MAX_LABEL_CHARS)]
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Annotated[Any, inert("calls are in their order")] = None


class Message(Body):
    """One message of a conversation. What it means to the model is the chat template's affair."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Annotated[str, Tag("str")] | Annotated[_Parts, Tag("list")], Discriminator(_shape)]
    name: Label = None
    reasoning_content: str | None = None  # of an earlier answer, for templates that write it
    reasoning: str | None = None  # its other name
    refusal: Annotated[Any, refused("send the text as content")] = None
    audio: Annotated[Any, refused("text only")] = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOL_CALLS, fail_fast=True)] | None = (
        None  # an assistant's
    )
    tool_call_id: Annotated[str, Field(max_length=limits.MAX_LABEL_CHARS)] | None = None  # what a tool answers
    function_call: Annotated[Any, refused("functions")] = None
    annotations: Annotated[Any, refused("text only", [])] = None
    cache_control: Annotated[Any, inert("equal prefixes are found by their tokens")] = None

    @model_validator(mode="before")
    @classmethod
    def _without_words(cls, value: Any) -> Any:
        """An assistant that had nothing to say comes back with null."""
        if isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None:
            return {**value, "content": ""}
        return value

    @model_validator(mode="after")
    def _is_one_role_s(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise wrong(f"tool_calls are an assistant's, and this is a message of role {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise wrong("a message of role 'tool' has the tool_call_id that it answers, and no other has one")
        return self


def as_template_takes_it(message: Message, *, short_ids: bool = False) -> dict[str, Any]:
    """As a chat template takes it: what was said, by whom, an earlier answer's reasoning and calls.

    `short_ids`: the template takes ids of nine letters and digits alone.
    """
    content = message.content
    told: dict[str, Any] = {"role": message.role}
    told["content"] = content if isinstance(content, str) else [{"type": "text", "text": p.text} for p in content]
    if message.name is not None:
        told["name"] = message.name
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None:
        told |= {"reasoning_content": reasoning, "reasoning": reasoning}
        if not (content and message.tool_calls):  # GPT-OSS's takes one of the two beside calls
            told["thinking"] = reasoning
    identify = _short if short_ids else str
    if message.tool_calls:
        told["tool_calls"] = [
            {"id": identify(call.id), "type": "function", "function": call.function.model_dump()}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        told["tool_call_id"] = identify(message.tool_call_id)
    return told


def _short(call_id: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9]{9}", call_id):
        return call_id
    return hashlib.sha256(call_id.encode(errors="replace")).hexdigest()[:9]
