"""Bodies of requests for vectors, scores and rankings. Each field is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema

from deployments.http import limits
from deployments.http.openai.messages import Label
from deployments.http.openai.schema import Prompts
from deployments.http.vectors import examples
from deployments.http.wire import Body, Whole, inert, refused, shown, wrong

_CACHED = inert("equal prefixes are found by their tokens")
Model = Annotated[str, Field(min_length=1, max_length=limits.MAX_MODEL_CHARS)]
_TRUNCATE = "cut texts; send shorter ones"
_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_DOCUMENTS = {
    "type": "array",
    "items": {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"text": {"type": "string"}}}]},
}


def _texts(value: Any) -> tuple[str, ...]:
    """One text or a list of them."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise wrong(f"{shown(value)} is neither a text nor a list of texts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise wrong(f"[{index}] is {shown(text)}, not a text")
    return tuple(texts)


def _documents(value: Any) -> tuple[str, ...]:
    """Texts, or objects with a text, as Cohere and Jina take both."""
    if not isinstance(value, list):
        raise wrong(f"{shown(value)} is not a list of documents")
    texts = []
    for index, item in enumerate(value):
        if isinstance(item, dict):
            foreign = next((name for name in item if name != "text"), None)
            if foreign is not None:
                raise wrong(f"[{index}] has the field {shown(foreign)}; send its text alone")
            item = item.get("text")
        texts.append(item)
    return _texts(texts)


Texts = Annotated[tuple[str, ...], PlainValidator(_texts), WithJsonSchema(_TEXTS)]
Documents = Annotated[tuple[str, ...], PlainValidator(_documents), WithJsonSchema(_DOCUMENTS)]


class VectorRequest(Body):
    """Fields that all have."""

    user: Label = None
    safety_identifier: Label = None  # the newer name of user
    cache_salt: Label = None
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    # Of other servers and their clients.
    prompt_cache_key: Annotated[Annotated[str, Field(max_length=limits.MAX_HINT_CHARS)] | None, _CACHED] = None
    truncate_prompt_tokens: Annotated[Any, refused(_TRUNCATE)] = None
    add_special_tokens: Annotated[Any, refused("send token ids to leave them out", True)] = None
    priority: Annotated[Any, refused("tenants share fairly; there are no priorities", 0)] = None


class InputRequest(VectorRequest):
    """Fields of those that give vectors back."""

    model: Model
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None  # base64: of float32, little-endian
    dimensions: Annotated[Whole, Field(ge=1)] | None = None  # of models that were trained for fewer too
    normalize: bool | None = None  # None: as the model's folder says, else true


class EmbeddingRequest(InputRequest):
    """Body of POST /v1/embeddings."""

    model_config = ConfigDict(json_schema_extra={"example": examples.EMBEDDING_REQUEST})


class PoolingRequest(InputRequest):
    """Body of POST /pooling."""

    model_config = ConfigDict(json_schema_extra={"example": examples.POOLING_REQUEST})

    task: Annotated[Any, refused("tasks beside one vector for each text", "embed")] = None


class ScoreRequest(VectorRequest):
    """Body of POST /v1/score and /score: one text against one or many, or as many against as many."""

    model_config = ConfigDict(json_schema_extra={"example": examples.SCORE_REQUEST})

    model: Model | None = None  # None: the base
    text_1: Texts | None = None
    text_2: Texts | None = None
    # The newer names.
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None


class RerankRequest(VectorRequest):
    """Body of POST /v1/rerank, /v2/rerank and /rerank."""

    model_config = ConfigDict(json_schema_extra={"example": examples.RERANK_REQUEST})

    model: Model | None = None  # None: the base
    query: str
    documents: Documents
    top_n: Annotated[Whole, Field(ge=0)] | None = None  # 0 or None: all
    return_documents: bool | None = None  # None: true
    max_chunks_per_doc: Annotated[Any, refused(_TRUNCATE)] = None
    max_tokens_per_doc: Annotated[Any, refused(_TRUNCATE)] = None
    rank_fields: Annotated[Any, refused("fields of documents; send texts")] = None
