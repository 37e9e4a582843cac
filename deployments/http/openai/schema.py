"""Bodies of the OpenAI API, with the extensions that other servers share. Each field is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from deployments.http.openai import examples
from deployments.http.wire import Body, refused

Real = float | None
Count = Annotated[int, Field(ge=1)] | None


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, refused("streams are not padded", False)] = None


class TextPart(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(Body):
    """One message of a conversation. What it means to the model is the chat template's affair."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: Annotated[Any, refused("send the text as content")] = None
    audio: Annotated[Any, refused("text only")] = None
    tool_calls: Annotated[Any, refused("tools")] = None
    function_call: Annotated[Any, refused("functions")] = None
    annotations: Annotated[Any, refused("text only", [])] = None


class Sampling(Body):
    """Fields that both endpoints have."""

    model: Annotated[str, Field(min_length=1, max_length=400)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: Real = None
    top_p: Real = None
    n: Count = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Real = None
    frequency_penalty: Real = None
    logit_bias: dict[str, float] | None = None
    user: Annotated[str, Field(max_length=200)] | None = None
    # Extensions.
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Real = None
    repetition_penalty: Real = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0)] | None = None
    cache_salt: Annotated[str, Field(max_length=200)] | None = None
    adapter_source: str | None = None
    # Refused.
    response_format: Annotated[Any, refused("only {'type': 'text'}", {"type": "text"})] = None
    metadata: Annotated[Any, refused("nothing is stored", {})] = None
    store: Annotated[Any, refused("nothing is stored", False)] = None
    service_tier: Annotated[Any, refused("there is one tier", "auto", "default")] = None
    prompt_cache_key: Annotated[Any, refused("use cache_salt to keep prompts apart")] = None
    safety_identifier: Annotated[Any, refused("use user")] = None


class ChatRequest(Sampling):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.CHAT_REQUEST})

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[Any, refused("tools", [])] = None
    tool_choice: Annotated[Any, refused("tools", "none")] = None
    parallel_tool_calls: Annotated[Any, refused("tools", False)] = None
    functions: Annotated[Any, refused("functions", [])] = None
    function_call: Annotated[Any, refused("functions", "none")] = None
    modalities: Annotated[Any, refused("text only", ["text"])] = None
    audio: Annotated[Any, refused("text only")] = None
    prediction: Annotated[Any, refused("predicted outputs")] = None
    reasoning_effort: Annotated[Any, refused("reasoning models", "none")] = None
    verbosity: Annotated[Any, refused("reasoning models")] = None
    web_search_options: Annotated[Any, refused("web search")] = None
    guided_json: Annotated[Any, refused("constrained output")] = None
    guided_regex: Annotated[Any, refused("constrained output")] = None
    guided_choice: Annotated[Any, refused("constrained output")] = None


class CompletionRequest(Sampling):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.COMPLETION_REQUEST})

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Count = None
    suffix: Annotated[Any, refused("insertion; put everything into prompt", "")] = None


JsonObject = dict[str, Any]
