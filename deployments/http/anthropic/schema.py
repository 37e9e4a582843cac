"""Bodies of the Messages API. Each field is honoured, or neutral here, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from deployments.http import limits
from deployments.http.anthropic import examples
from deployments.http.wire import Body, Whole, inert, kind_of, refused, shown, unsupported, wrong

_CACHED = "equal prefixes are found by their tokens"
_BLOCKS = ("text", "thinking", "tool_use", "tool_result")
Cached = Annotated[Any, inert(_CACHED)]
Identifier = Annotated[str, Field(min_length=1, max_length=limits.MAX_LABEL_CHARS)]


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: Cached = None
    citations: Annotated[Any, refused("citations", [])] = None


class ThinkingBlock(Body):
    """Reasoning of an earlier answer, for templates that write it."""

    type: Literal["thinking"]
    thinking: str
    signature: Annotated[Any, inert("reasoning is taken as it is")] = None
    cache_control: Cached = None


class ToolUseBlock(Body):
    """A call of an earlier answer."""

    type: Literal["tool_use"]
    id: Identifier
    name: Identifier
    input: dict[str, Any]
    cache_control: Cached = None
    caller: Annotated[Any, refused("calls of programs", {"type": "direct"})] = None


def _shape(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "str"


_Texts = Annotated[list[TextBlock], Field(max_length=limits.MAX_PARTS, fail_fast=True)]
Text = Annotated[Annotated[str, Tag("str")] | Annotated[_Texts, Tag("list")], Discriminator(_shape)]


class ToolResultBlock(Body):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: Identifier
    content: Text | None = None
    is_error: bool | None = None
    cache_control: Cached = None


def _is_block(value: Any) -> Any:
    kind = kind_of(value)
    if kind is None:
        raise wrong(f"a block has a type, one of {', '.join(_BLOCKS)}; this one is {shown(value)}")
    if kind not in _BLOCKS:
        raise unsupported(f"blocks of type {shown(kind)}; send {', '.join(_BLOCKS)}")
    return value


def _kind(value: Any) -> str:
    return f"[{kind_of(value)}]"


Block = Annotated[
    Annotated[TextBlock, Tag("[text]")]
    | Annotated[ThinkingBlock, Tag("[thinking]")]
    | Annotated[ToolUseBlock, Tag("[tool_use]")]
    | Annotated[ToolResultBlock, Tag("[tool_result]")],
    Discriminator(_kind),
    BeforeValidator(_is_block),
]
_Blocks = Annotated[list[Block], Field(min_length=1, max_length=limits.MAX_PARTS, fail_fast=True)]


class InputMessage(Body):
    """One turn. A last one of the assistant's is gone on with."""

    role: Literal["user", "assistant"]
    content: Annotated[Annotated[str, Tag("str")] | Annotated[_Blocks, Tag("list")], Discriminator(_shape)]

    @model_validator(mode="after")
    def _says_its_own(self) -> InputMessage:
        if not isinstance(self.content, str):
            foreign = ("tool_use", "thinking") if self.role == "user" else ("tool_result",)
            for block in self.content:
                if block.type in foreign:
                    says = f"a {block.type} block in a message of the {self.role}'s; the other side says those"
                    raise wrong(says)
        return self


class Tool(Body):
    """A function that the model may call."""

    type: Annotated[Any, refused("tools that run at the server; describe a function by input_schema", "custom")] = None
    name: Identifier
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Cached = None
    input_examples: Annotated[Any, refused("examples of calls; write them into description", [])] = None
    defer_loading: Annotated[Any, refused("tools that are looked up later", False)] = None
    eager_input_streaming: Annotated[bool | None, inert("arguments are streamed as they are written")] = None
    allowed_callers: Annotated[Any, refused("calls of programs", ["direct"])] = None


class ToolChoice(Body):
    """`tool_choice`."""

    type: Literal["auto", "any", "tool", "none"]
    name: Identifier | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _names_a_tool(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            says = "type 'tool' needs the name of one" if self.name is None else f"type {self.type!r} takes no name"
            raise wrong(says)
        return self


class Thinking(Body):
    """`thinking`: whether the model reasons before it answers, where its chat template leaves the choice."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[Whole | None, inert("max_tokens bounds reasoning and answer together")] = None
    display: Annotated[Any, refused("reasoning is told as it is", "summarized")] = None


class Metadata(Body):
    """`metadata`."""

    user_id: Annotated[str, Field(max_length=limits.MAX_LABEL_CHARS)] | None = None


class Conversation(Body):
    """What both endpoints have."""

    model: Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_CHARS)]
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
    system: Text | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_PARTS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    cache_control: Cached = None
    mcp_servers: Annotated[Any, refused("tools that run at the server", [])] = None
    context_management: Annotated[Any, refused("edits of the conversation; send what the model is to read")] = None
    output_config: Annotated[Any, refused("POST /v1/chat/completions has response_format and reasoning_effort")] = None
    output_format: Annotated[Any, refused("POST /v1/chat/completions has response_format")] = None


class MessagesRequest(Conversation):
    """Body of POST /v1/messages."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REQUEST})

    max_tokens: Annotated[Whole, Field(ge=1)]
    stop_sequences: Annotated[list[str], Field(fail_fast=True)] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    metadata: Metadata | None = None
    service_tier: Annotated[Any, refused("there is one tier", "auto", "standard_only")] = None
    container: Annotated[Any, refused("code that runs at the server")] = None
    inference_geo: Annotated[Any, refused("this server is where it is")] = None
    speed: Annotated[Any, refused("there is one speed", "standard")] = None
    # Extensions.
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    cache_salt: Annotated[str, Field(max_length=limits.MAX_LABEL_CHARS)] | None = None


class CountRequest(Conversation):
    """Body of POST /v1/messages/count_tokens."""

    model_config = ConfigDict(json_schema_extra={"example": examples.COUNT_REQUEST})
