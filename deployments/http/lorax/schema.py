"""Bodies of the LoRAX API. Each field of LoRAX is honoured, or refused with 422 naming it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field

from deployments.http.limits import MAX_MODEL_CHARS, MAX_SOURCE_CHARS
from deployments.http.lorax import examples
from deployments.http.openai.schema import Stop
from deployments.http.wire import Body, Whole, refused


class Parameters(Body):
    """`parameters` of a request."""

    adapter_id: Annotated[str, Field(max_length=MAX_MODEL_CHARS)] | None = None  # None or "": the base
    adapter_source: Annotated[str, Field(max_length=MAX_SOURCE_CHARS)] | None = (
        None  # local, s3, or the name of a configured source
    )
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None  # 0: greedy
    top_k: Annotated[Whole, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[Whole, Field(ge=0, lt=2**64)] | None = None
    max_new_tokens: Annotated[Whole, Field(gt=0)] | None = None  # None: until the context is full
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: Stop = None  # LoRAX takes lists only
    ignore_eos_token: bool | None = None
    best_of: Annotated[Whole, Field(gt=0)] | None = None
    return_full_text: bool | None = None
    truncate: Annotated[Whole, Field(gt=0)] | None = None  # keep the last so many prompt tokens
    details: bool | None = None
    return_k_alternatives: Annotated[Whole, Field(gt=0)] | None = None
    # Refused.
    merged_adapters: Annotated[Any, refused("merged adapters; merge them offline and upload the result")] = None
    api_token: Annotated[Any, refused("private hub adapters")] = None
    typical_p: Annotated[Any, refused("typical sampling; use top_p or min_p", 1.0)] = None
    watermark: Annotated[Any, refused("watermarks", False)] = None
    decoder_input_details: Annotated[Any, refused("log-probabilities of the prompt", False)] = None
    response_format: Annotated[Any, refused("constrained output")] = None
    apply_chat_template: Annotated[Any, refused("use /v1/chat/completions", False)] = None


class GenerateRequest(Body):
    """Body of POST /generate and /generate_stream."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REQUEST})

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool | None = None
