"""Bodies of the LoRAX API. Each field of LoRAX is honoured, or refused with 422 naming it: docs/lorax.md lists them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from deployments.calls import MAX_MERGED
from deployments.http.limits import MAX_MODEL_CHARS, MAX_SOURCE_CHARS
from deployments.http.lorax import examples
from deployments.http.openai.formats import Schema
from deployments.http.openai.schema import Stop
from deployments.http.wire import Body, Whole, inert, refused, shown, wrong

AdapterId = Annotated[str, Field(max_length=MAX_MODEL_CHARS)]
AdapterSource = Annotated[str, Field(max_length=MAX_SOURCE_CHARS)]
_TOKENS = "tokens of a request's own; adapter sources are configured on the server, with their credentials"
_WATERMARK = "watermarks; only a detector that draws LoRAX's random numbers, on its device, could tell them"


def _strategy(name: str) -> str:
    if name == "linear":
        return name
    if name in ("ties", "dare_linear", "dare_ties"):
        raise wrong(f"{name!r} is not served; send 'linear', or merge offline and upload the result")
    raise wrong(f"{shown(name)} is none of LoRAX's strategies; send 'linear'")


class MergedAdapters(Body):
    """Several adapters as one: what they add to each layer is weighted and summed, whatever their ranks."""

    ids: Annotated[
        list[Annotated[AdapterId, Field(min_length=1)]], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)
    ]
    weights: Annotated[list[float], Field(min_length=1, max_length=MAX_MERGED, fail_fast=True)]  # one for each of `ids`
    merge_strategy: Annotated[str, AfterValidator(_strategy)] | None = None  # None: linear
    density: Annotated[Annotated[float, Field(ge=0, le=1)] | None, inert("linear merges leave nothing out")] = None
    majority_sign_method: Annotated[Literal["total", "frequency"] | None, inert("linear merges elect no signs")] = None


class AdapterChoice(Body):
    """Which adapter a request is for."""

    adapter_id: AdapterId | None = None  # None or "": the base
    adapter_source: AdapterSource | None = None  # a configured source by its name, or the only one of a kind by that
    merged_adapters: MergedAdapters | None = None
    api_token: Annotated[Any, refused(_TOKENS, "")] = None


class ResponseFormat(Body):
    """`response_format`: any JSON object, or what a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[Schema | str | None, Field(alias="schema")] = None


class Parameters(AdapterChoice):
    """`parameters` of a request."""

    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None  # 0: greedy
    top_k: Annotated[Whole, Field(gt=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = None
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
    apply_chat_template: bool | None = None  # `inputs` is what a user says, or a conversation as JSON
    details: bool | None = None
    decoder_input_details: bool | None = None  # log-probabilities of the prompt, in `details`
    return_k_alternatives: Annotated[Whole, Field(gt=0)] | None = None
    response_format: ResponseFormat | None = None
    # Refused.
    watermark: Annotated[Any, refused(_WATERMARK, False)] = None


class GenerateRequest(Body):
    """Body of POST /generate and /generate_stream."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REQUEST})

    inputs: Annotated[str, Field(min_length=1)]
    parameters: Parameters | None = None


class CompatRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool | None = None


class EmbedRequest(Body):
    """Body of POST /embed."""

    model_config = ConfigDict(json_schema_extra={"example": examples.EMBED_REQUEST})

    inputs: Annotated[str, Field(min_length=1)]
    parameters: AdapterChoice | None = None


class ClassifyRequest(Body):
    """Body of POST /classify."""

    model_config = ConfigDict(json_schema_extra={"example": examples.CLASSIFY_REQUEST})

    inputs: str


class ClassifyBatchRequest(Body):
    """Body of POST /classify_batch."""

    model_config = ConfigDict(json_schema_extra={"example": examples.CLASSIFY_BATCH_REQUEST})

    inputs: Annotated[list[str], Field(fail_fast=True)]
