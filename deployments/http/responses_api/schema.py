"""Body of the Responses API. Each field is honoured, or neutral here, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag

from deployments.http import limits
from deployments.http.openai.messages import Label
from deployments.http.responses_api import examples
from deployments.http.responses_api.items import Item, _shape
from deployments.http.wire import Body, Whole, inert, kind_of, refused, shown, unsupported
from engine.request import MAX_LOGPROBS

_Items = Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
Input = Annotated[Annotated[str, Tag("str")] | Annotated[_Items, Tag("list")], Discriminator(_shape)]
Identifier = Annotated[str, Field(min_length=1, max_length=limits.MAX_LABEL_CHARS)]


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: Identifier
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, refused("tools that are looked up later", False)] = None
    allowed_callers: Annotated[Any, refused("calls of programs", ["direct"])] = None
    output_schema: Annotated[dict[str, Any] | None, inert("what a call gives is text")] = None


def _is_function(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind != "function":
        raise unsupported(f"tools of type {shown(kind)}, which run at the server; describe a function")
    return value


Tool = Annotated[FunctionTool, BeforeValidator(_is_function)]


class NamedTool(Body):
    """The one tool to call."""

    type: Literal["function"]
    name: Identifier


class TextFormat(Body):
    """`text.format`."""

    type: Literal["text", "json_object", "json_schema"]
    name: Identifier | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """`text`."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, refused("say in the instructions how long it is to be", "medium")] = None


class Reasoning(Body):
    """`reasoning`."""

    effort: str | None = Field(default=None, max_length=limits.MAX_LABEL_CHARS)
    summary: Annotated[str | None, inert("reasoning is told as it is")] = None
    generate_summary: Annotated[str | None, inert("reasoning is told as it is")] = None
    context: Annotated[Any, refused("what is read again is what you send", "auto")] = None


class StreamOptions(Body):
    """`stream_options`."""

    include_obfuscation: Annotated[Any, refused("streams are not padded", False)] = None


LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REQUEST})

    model: Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_CHARS)]
    input: Input
    instructions: str | None = None
    max_output_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_PARTS, fail_fast=True)] | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[Literal[INCLUDABLE]], Field(fail_fast=True)] | None = None  # type: ignore[valid-type]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None  # true if it is not said
    previous_response_id: Identifier | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None  # told back
    user: Label = None
    safety_identifier: Label = None
    prompt_cache_key: Annotated[str, Field(max_length=limits.MAX_HINT_CHARS)] | None = None
    # Neutral, or refused.
    max_tool_calls: Annotated[Whole | None, inert("no tool runs at the server")] = None
    prompt_cache_retention: Annotated[str | None, inert("prefixes are kept while there is room")] = None
    prompt_cache_options: Annotated[Any, inert("prefixes are kept while there is room")] = None
    truncation: Annotated[Any, refused("a long input is refused; send a shorter one", "disabled")] = None
    background: Annotated[Any, refused("a response is made while its caller waits", False)] = None
    background_options: Annotated[Any, refused("a response is made while its caller waits")] = None
    conversation: Annotated[Any, refused("send previous_response_id, or the whole input")] = None
    context_management: Annotated[Any, refused("edits of the conversation; send what the model is to read", [])] = None
    moderation: Annotated[Any, refused("judgement of what is said")] = None
    prompt: Annotated[Any, refused("templates that are kept; send instructions and input")] = None
    image: Annotated[Any, refused("text only")] = None
    access_programs: Annotated[Any, refused("access programs")] = None
    service_tier: Annotated[Any, refused("there is one tier", "auto", "default")] = None
    # Extensions.
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: float | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Annotated[list[str], Field(fail_fast=True)] | None = None
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    cache_salt: Label = None
