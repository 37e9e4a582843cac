"""Paths of the LoRAX API that generate nothing for anybody: what is served, whether it is, and tokens."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from deployments.asks import Ask
from deployments.calls import Fault, Refused
from deployments.http.documented import answers
from deployments.http.lorax import examples
from deployments.http.lorax.schema import ClassifyBatchRequest, ClassifyRequest, EmbedRequest
from deployments.http.lorax.translate import embed_ask
from deployments.http.responses import closing, inert_header
from deployments.http.versions import own_version
from deployments.router.gateway import Gateway
from engine.pooling import as_floats
from engine.request import MAX_N, MAX_STOP_STRINGS, SamplingParams

_NO_CLASSES = (
    "token classifiers are encoders with a head of their own, and a model that generates is served here; "
    "ask it for labels by POST /generate"
)


def add(router: APIRouter, gateway: Gateway) -> None:
    """Adds them to `router`."""
    started = asyncio.Lock()
    has_started = False

    @router.get("/", response_class=Response)
    async def health() -> Response:
        """200 when a replica can answer, 503 when none can."""
        await gateway.backend.ping()
        return Response()

    @router.get("/startup", response_class=Response)
    async def startup() -> Response:
        """200 once one token was generated as for any request; after that, as `GET /`. Open to everyone."""
        nonlocal has_started
        async with started:  # one probe at a time costs a token, and none after the first that had it
            if not has_started:
                await _one_token(gateway)
                has_started = True
        await gateway.backend.ping()
        return Response()

    @router.get("/info")
    async def info() -> dict[str, Any]:
        """What is served, and within which limits. What has no meaning here is null."""
        return await _info(gateway)

    @router.post("/embed", responses=answers(examples.EMBED_ANSWER))
    async def embed(body: EmbedRequest, request: Request) -> Response:
        """The vector of `inputs`, as /v1/embeddings makes it."""
        asked = embed_ask(body, gateway.model_id, gateway.sources, gateway.pooling.pooling())
        vectors = await gateway.vectors(asked, request.state.caller.tenant)
        headers = inert_header(request.state.inert)
        return JSONResponse({"embeddings": list(as_floats(vectors.answers[0].vector))}, headers=headers)

    @router.post("/classify")
    async def classify(body: ClassifyRequest, request: Request) -> Response:
        """Refused: no token classifiers are served."""
        raise Refused(Fault(code="invalid_request", message=f"/classify: {_NO_CLASSES}"))

    @router.post("/classify_batch")
    async def classify_batch(body: ClassifyBatchRequest, request: Request) -> Response:
        """Refused: no token classifiers are served."""
        raise Refused(Fault(code="invalid_request", message=f"/classify_batch: {_NO_CLASSES}"))


async def _one_token(gateway: Gateway) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    opened = await gateway.open(Ask(prompts=("Hello",), params=params), "")
    async with closing(opened):
        for stream in opened.streams:
            async for _ in stream:
                pass


async def _info(gateway: Gateway) -> dict[str, Any]:
    """As LoRAX's routers tell it, of the replica that has answered first."""
    model: dict[str, Any] = {}
    sizes: Any = None
    for replica in await gateway.backend.stats():
        told = replica.get("model")
        if isinstance(told, dict):
            engine: Any = replica.get("engine")
            model, sizes = told, engine["sizes"] if isinstance(engine, dict) else None
            break
    context = None if sizes is None else sizes["max_model_len"]
    return {
        "model_id": gateway.model_id,
        "model_sha": None,
        "model_dtype": f"torch.{model['dtype']}" if "dtype" in model else None,
        "model_device_type": gateway.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": model.get("max_queued_requests"),
        "max_best_of": MAX_N,
        "max_stop_sequences": MAX_STOP_STRINGS,
        "max_input_length": None if context is None else context - 1,
        "max_total_tokens": context,
        "max_batch_total_tokens": None if sizes is None else sizes["num_blocks"] * model["block_size"],
        "waiting_served_ratio": None,
        "max_waiting_tokens": None,
        "validation_workers": None,
        "eager_prefill": None,
        "version": own_version(),
        "sha": None,
        "docker_label": None,
        "request_logger_url": None,
        "adapter_sources": dict(gateway.sources),
    }
