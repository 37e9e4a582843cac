"""Bodies of /tokenize, /detokenize."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from deployments.http import limits
from deployments.http.openai.messages import Message
from deployments.http.openai.schema import IDS, some_ids
from deployments.http.openai.tools import Tool
from deployments.http.service import examples
from deployments.http.wire import Body

Messages = Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)]
Model = Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_CHARS)]


class TokenizeRequest(Body):
    """Exactly one of prompt, messages (vLLM's two forms) and inputs (LoRAX's). An adapter's tokens are the base's."""

    model_config = ConfigDict(json_schema_extra={"example": examples.TOKENIZE_REQUEST})

    model: Model | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)] | None = (
        None
    )
    inputs: Annotated[str, Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # None: of a text yes, of a conversation no
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS)] | None = None


class DetokenizeRequest(Body):
    """Token ids to text."""

    model_config = ConfigDict(json_schema_extra={"example": examples.DETOKENIZE_REQUEST})

    model: Model | None = None
    tokens: Annotated[tuple[int, ...], PlainValidator(some_ids(limits.MAX_TOKEN_IDS)), WithJsonSchema(IDS)]
    skip_special_tokens: bool | None = None  # None: false, so that nothing is lost
