"""Bodies of the OpenAI API, with the extensions that other servers share. Each field is honoured or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from deployments.http import limits
from deployments.http.openai import examples
from deployments.http.openai.foreign import Foreign, ForeignChat, ForeignCompletion
from deployments.http.openai.messages import Label, Message
from deployments.http.openai.tools import ToolFields
from deployments.http.wire import Body, Whole, refused, shown, whole_numbers, wrong
from engine.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

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


def some_ids(most: int) -> Callable[[Any], tuple[int, ...]]:
    """A check of a list of at most so many token ids."""

    def check(value: Any) -> tuple[int, ...]:
        if not isinstance(value, list | tuple):
            raise wrong(f"{shown(value)} is not a list of token ids")
        if len(value) > most:
            raise wrong(f"{len(value)} token ids, the limit is {most}; send fewer")
        return whole_numbers(list(value), "a token id")

    return check


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
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer"}}
_BIASES: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}
_PROMPTS: dict[str, Any] = {"anyOf": [*_STRINGS["anyOf"], IDS, {"type": "array", "items": IDS}]}


Stop = Annotated[tuple[str, ...] | None, PlainValidator(_stop), WithJsonSchema(_STRINGS)]

Prompts = Annotated[tuple[str | tuple[int, ...], ...], PlainValidator(_prompts), WithJsonSchema(_PROMPTS)]


RequestId = (
    Annotated[
        str, Field(min_length=1, max_length=limits.MAX_REQUEST_ID_CHARS, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]*$")
    ]
    | None
)
AllowedIds = Annotated[tuple[int, ...] | None, PlainValidator(some_ids(MAX_ALLOWED_TOKEN_IDS)), WithJsonSchema(IDS)]
StopIds = Annotated[tuple[int, ...] | None, PlainValidator(some_ids(MAX_STOP_TOKEN_IDS)), WithJsonSchema(IDS)]
BadWords = (
    Annotated[
        list[Annotated[str, Field(min_length=1, max_length=limits.MAX_BAD_WORD_CHARS)]],
        Field(max_length=limits.MAX_BAD_WORDS),
    ]
    | None
)


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
    max_tokens: Annotated[Whole, Field(ge=0)] | None = None  # 0: nothing but what is said of the prompt
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
    typical_p: Real = None
    allowed_token_ids: AllowedIds = None
    bad_words: BadWords = None
    stop_token_ids: StopIds = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None  # false: their names are part of the text
    prompt_lookup_num_tokens: Annotated[Whole, Field(ge=0)] | None = None
    cache_salt: Label = None
    prompt_cache_key: Annotated[str, Field(max_length=limits.MAX_HINT_CHARS)] | None = None  # where equal ones go
    priority: Annotated[Whole, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None  # within the key, lowest first
    truncate_prompt_tokens: Annotated[Whole, Field(ge=1)] | None = None  # keep the last so many
    add_special_tokens: bool | None = None
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities: "token_id:17" for its text
    no_stop_trim: bool | None = None  # SGLang's name of include_stop_str_in_output
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # of the likeliest, so many
    request_id: RequestId = None
    lora_path: Annotated[str, Field(max_length=limits.MAX_MODEL_CHARS)] | None = None  # SGLang's: the adapter
    rid: RequestId = None  # SGLang's name of it


class ChatRequest(Sampling, ToolFields, ForeignChat):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.CHAT_REQUEST})

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None  # false: the prompt ends with the last message
    continue_final_message: bool | None = None  # the answer goes on with the last message, an assistant's


class CompletionRequest(Sampling, ForeignCompletion):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.COMPLETION_REQUEST})

    prompt: Prompts
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count = None
