"""Routes that answer with vectors, or with how alike they are."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deployments.asks import Ask, Prompt, adapter_of
from deployments.http.documented import JSON, answers, failures
from deployments.http.openai.replies import error_body
from deployments.http.responses import inert_header
from deployments.http.vectors import examples, replies
from deployments.http.vectors.schema import (
    EmbeddingRequest,
    InputRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    VectorRequest,
)
from deployments.router.gateway import Gateway
from deployments.router.vectors import Vectors
from engine.errors import InvalidRequest
from engine.pooling import Pooling
from engine.request import SamplingParams

_NO_SAMPLES = SamplingParams(max_tokens=1)


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/v1/embeddings, /pooling, /v1/score, /v1/rerank and their other paths."""
    told = failures(lambda answer: answer.status, error_body)
    router = APIRouter(tags=["Vectors"], responses=told, route_class=route_class)

    @router.post("/v1/embeddings", responses=answers(examples.EMBEDDING_ANSWER))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Vectors of texts, or of lists of token ids, by the base or an adapter: hidden states, pooled as the model's
        folder says, else the last token's, normalised."""
        vectors = await _inputs(gateway, body, request)
        head = _head("embd", body.model, vectors)
        whole = await replies.listed(head, vectors, body.encoding_format, "embedding")
        return Response(whole, media_type=JSON, headers=_headers(body, request))

    @router.post("/pooling", responses=answers(examples.POOLING_ANSWER))
    async def pooling(body: PoolingRequest, request: Request) -> Response:
        """As /v1/embeddings, in the form of vLLM's pooling API."""
        vectors = await _inputs(gateway, body, request)
        whole = await replies.listed(_head("pool", body.model, vectors), vectors, body.encoding_format, "pooling")
        return Response(whole, media_type=JSON, headers=_headers(body, request))

    @router.post("/v1/score", responses=answers(examples.SCORE_ANSWER))
    @router.post("/score", responses=answers(examples.SCORE_ANSWER))
    async def score(body: ScoreRequest, request: Request) -> Response:
        """How alike two texts are: the cosine of the angle between their vectors."""
        first, second, param = _pairs(body)
        vectors = await gateway.vectors(_ask(gateway, body, body.model, (*first, *second), param), _tenant(request))
        data = [one.vector for one in vectors.answers]
        values = replies.cosines(data[: len(first)], data[len(first) :])
        head = _head("score", body.model or gateway.model_id, vectors)
        return JSONResponse(replies.scores(head, vectors, values), headers=_headers(body, request))

    @router.post("/v1/rerank", responses=answers(examples.RERANK_ANSWER))
    @router.post("/v2/rerank", responses=answers(examples.RERANK_ANSWER))
    @router.post("/rerank", responses=answers(examples.RERANK_ANSWER))
    async def rerank(body: RerankRequest, request: Request) -> Response:
        """Documents by how like a query they are, the best first: cosines between their vectors and the query's."""
        texts = (body.query, *body.documents)
        vectors = await gateway.vectors(_ask(gateway, body, body.model, texts, "documents"), _tenant(request))
        query, *others = [one.vector for one in vectors.answers]
        values = replies.cosines([query], others)
        name = body.model or gateway.model_id
        head = {"id": f"rerank-{vectors.request_id}", "model": name}
        documents = None if body.return_documents is False else body.documents
        whole = replies.ranking(head, vectors, values, documents, body.top_n or 0)
        return JSONResponse(whole, headers=_headers(body, request))

    return router


def _tenant(request: Request) -> str:
    return str(request.state.caller.tenant)


def _headers(body: VectorRequest, request: Request) -> dict[str, str]:
    both = body.user is not None and body.safety_identifier not in (None, body.user)
    return inert_header((*request.state.inert, *(("user",) if both else ())))  # the newer name of the two counts


def _head(prefix: str, model: str, vectors: Vectors) -> dict[str, Any]:
    return {"id": f"{prefix}-{vectors.request_id}", "object": "list", "created": int(time.time()), "model": model}


async def _inputs(gateway: Gateway, body: InputRequest, request: Request) -> Vectors:
    asked = gateway.pooling.pooling(body.dimensions, normalize=body.normalize)
    return await gateway.vectors(_ask(gateway, body, body.model, body.input, "input", asked), _tenant(request))


def _ask(
    gateway: Gateway,
    body: VectorRequest,
    model: str | None,
    prompts: tuple[Prompt, ...],
    param: str,
    asked: Pooling | None = None,
) -> Ask:
    """`param`: what the API calls the prompts. Raises: InvalidRequest."""
    adapter = None if model is None else adapter_of(model, gateway.model_id)
    if adapter is None and body.adapter_source is not None:
        raise InvalidRequest("adapter_source", f"model {model or gateway.model_id!r} is the base; name an adapter")
    return Ask(
        prompts=prompts,
        params=_NO_SAMPLES,
        adapter=adapter,
        adapter_source=body.adapter_source,
        cache_salt=body.cache_salt or "",
        user=body.safety_identifier or body.user or "",
        numbers=asked or gateway.pooling.pooling(),
        prompt_param=param,
    )


def _pairs(body: ScoreRequest) -> tuple[Sequence[str], Sequence[str], str]:
    """Both sides, and what the second is called. Raises: InvalidRequest."""
    sides = {
        "text_1": body.text_1, "queries": body.queries, "text_2": body.text_2, "documents": body.documents,
        "items": body.items,
    }  # fmt: skip
    given = [name for name, texts in sides.items() if texts is not None]
    if given not in (["text_1", "text_2"], ["queries", "documents"], ["queries", "items"]):
        says = f"given are {', '.join(given) or 'none'}; send text_1 and text_2, or queries and documents"
        raise InvalidRequest(given[0] if given else "text_1", says)
    first, second = (sides[name] or () for name in given)
    if len(first) not in (1, len(second)):
        counts = f"{len(second)} texts, and {given[0]} has {len(first)}"
        raise InvalidRequest(given[1], f"{counts}; send one there, or as many")
    return first, second, given[1]
