"""Bodies of the OpenAI API, with the extensions that other servers share. Each field is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from deployments.http import limits
from deployments.http.openai import examples
from deployments.http.openai.foreign import Foreign, ForeignChat, ForeignCompletion
from deployments.http.openai.messages import Label, Message
from deployments.http.openai.tools import ToolFields
from deployments.http.wire import Body, Whole, refused, shown, whole_numbers, wrong
from engine.request import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_CHARS, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS

Real = float | None
Count = Annotated[Whole, Field(ge=1)] | None


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list | tuple):
        raise wrong(f"{shown(value)} is neither a string nor a list of strings")
    if len(stops) > MAX_STOP_STRINGS:
        raise wrong(f"{len(stops)} strings, the limit is {MAX_STOP_STRINGS}; send fewer")
    for stop in stops:
        if not isinstance(stop, str):
            raise wrong(f"{shown(stop)} is not a string")
        if len(stop) > MAX_STOP_CHARS:
            raise wrong(f"a string of {len(stop)} characters, the limit is {MAX_STOP_CHARS}; send a shorter one")
    return tuple(stops)


def _token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise wrong(f"{shown(value)} is not a list of token ids")
    if len(value) > MAX_STOP_TOKEN_IDS:
        raise wrong(f"{len(value)} token ids, the limit is {MAX_STOP_TOKEN_IDS}; send fewer")
    return whole_numbers(list(value), "a token id")


def _logit_bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict):
        raise wrong(f"{shown(value)} is not an object of token ids and numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"{len(value)} tokens, the limit is {MAX_LOGIT_BIAS}; send fewer")
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 20):
            raise wrong(f"{shown(key)} is not a token id; keys are token ids as strings")
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise wrong(f"{shown(bias)}, the bias of token {key}, is not a number")
    if len({int(key) for key in value}) < len(value):
        raise wrong("a token id is named twice")
    return {int(key): bias for key, bias in value.items()}


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Texts and lists of token ids. Types are looked at list by list, not item by item."""
    if isinstance(value, str):
        return (value,)
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if isinstance(value, list) and not value:
        raise wrong("the list is empty; send at least one prompt")
    if kinds == {str}:
        return tuple(value)
    if kinds and kinds <= {int, float}:
        return (whole_numbers(value, "a token id"),)
    if kinds == {list}:
        return tuple(whole_numbers(ids, "a token id") for ids in value)
    what = shown(value) if not kinds else f"a list of {' and '.join(sorted(_JSON_NAMES[kind] for kind in kinds))}"
    raise wrong(f"{what}; send a text, a list of texts, a list of token ids or a list of such lists")


_JSON_NAMES = {
    str: "strings", int: "numbers", float: "numbers", bool: "booleans", list: "lists", dict: "objects",
    type(None): "nulls",
}  # fmt: skip
_STRINGS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_BIASES: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}
_PROMPTS: dict[str, Any] = {"anyOf": [*_STRINGS["anyOf"], _IDS, {"type": "array", "items": _IDS}]}


Stop = Annotated[tuple[str, ...] | None, PlainValidator(_stop), WithJsonSchema(_STRINGS)]

Prompts = Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]


class StreamOptions(Body):
    """`stream_options`."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # usage so far on every chunk
    include_obfuscation: Annotated[Any, refused("streams are not padded", False)] = None


class Sampling(Foreign):
    """Fields that both endpoints have."""

    model: Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_CHARS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count = None
    temperature: Real = None
    top_p: Real = None
    n: Count = None
    stop: Stop = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**64)] | None = None
    presence_penalty: Real = None
    frequency_penalty: Real = None
    logit_bias: Annotated[dict[int, float] | None, PlainValidator(_logit_bias), WithJsonSchema(_BIASES)] = None
    user: Label = None
    safety_identifier: Label = None  # the newer name of user
    # Extensions.
    top_k: Annotated[Whole, Field(ge=-1)] | None = None
    min_p: Real = None
    repetition_penalty: Real = None
    min_tokens: Annotated[Whole, Field(ge=0)] | None = None
    stop_token_ids: Annotated[tuple[int, ...] | None, PlainValidator(_token_ids), WithJsonSchema(_IDS)] = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None  # false: their names are part of the text
    prompt_lookup_num_tokens: Annotated[Whole, Field(ge=0)] | None = None
    cache_salt: Label = None
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    return_token_ids: bool | None = None
    request_id: (
        Annotated[
            str, Field(min_length=1, max_length=limits.MAX_REQUEST_ID_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
        ]
        | None
    ) = None


class ChatRequest(Sampling, ToolFields, ForeignChat):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.CHAT_REQUEST})

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class CompletionRequest(Sampling, ForeignCompletion):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.COMPLETION_REQUEST})

    prompt: Prompts
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count = None
