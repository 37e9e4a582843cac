"""Messages of a conversation: as clients write them, and as a chat template takes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.http import limits
from deployments.http.wire import Body, inert, refused, shown, unsupported

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


class Message(Body):
    """One message of a conversation. What it means to the model is the chat template's affair."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Annotated[str, Tag("str")] | Annotated[_Parts, Tag("list")], Discriminator(_shape)]
    name: Label = None
    reasoning_content: str | None = None  # of an earlier answer, for templates that write it
    reasoning: str | None = None  # its other name
    refusal: Annotated[Any, refused("send the text as content")] = None
    audio: Annotated[Any, refused("text only")] = None
    tool_calls: Annotated[Any, refused("tools", [])] = None
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


def as_template_takes_it(message: Message) -> dict[str, Any]:
    """As a chat template takes it: what was said, by whom, and an earlier answer's reasoning."""
    content = message.content
    told: dict[str, Any] = {"role": message.role}
    told["content"] = content if isinstance(content, str) else [{"type": "text", "text": p.text} for p in content]
    if message.name is not None:
        told["name"] = message.name
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning is not None:
        told |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return told
