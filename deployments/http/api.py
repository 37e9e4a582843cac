"""The HTTP application: routes of both APIs, health, statistics, and one way to tell errors."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import deployments.http.adapters.routes as adapters_routes
import deployments.http.anthropic.replies as anthropic_replies
import deployments.http.anthropic.routes as anthropic_routes
import deployments.http.decisions.routes as decisions_routes
import deployments.http.lorax.replies as lorax_replies
import deployments.http.lorax.routes as lorax_routes
import deployments.http.openai.replies as openai_replies
import deployments.http.openai.routes as openai_routes
import deployments.http.responses_api.routes as responses_routes
import deployments.http.vectors.routes as vectors_routes
from adapter_store.errors import StoreError
from deployments.calls import Fault, Refused
from deployments.errors import answer_for, fault_of
from deployments.http.auth import ApiKeys
from deployments.http.gate import DOCS_FILES, Gate, InFlight
from deployments.http.invocations import Invocations
from deployments.http.methods import HeadAsGet, allowed_methods, check_query
from deployments.http.origin import LOOPBACK_PAGES
from deployments.http.reading import route_class
from deployments.http.service import routes as service_routes
from deployments.http.validation import cut, fault_of_validation
from deployments.http.versions import own_version
from deployments.http.wire import INERT_HEADER
from deployments.router.gateway import Gateway
from deployments.settings.app import LimitSettings
from engine.errors import EngineError

logger = logging.getLogger("ray.serve")

HEALTH_CACHE_S = 1.0
STORE_TIMEOUT_S = 5.0  # of GET /stats
LORAX_PATHS = frozenset(
    {"/", "/generate", "/generate_stream", "/embed", "/info", "/startup", "/classify", "/classify_batch"}
)
ANTHROPIC_PATHS = "/v1/messages"
_STATUS_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large", 415: "unsupported_media_type"}


def create_api(gateway: Gateway, keys: ApiKeys, limits: LimitSettings, cors: Sequence[str] | None = None) -> FastAPI:
    """The application in front of `gateway`. `cors`: origins of the web pages that may ask; None: loopback ones."""
    # The page's scripts and styles come from here: a browser without the internet would see nothing else.
    app = FastAPIOffline(
        title="Chorus",
        version=own_version(),
        redoc_url=None,
        static_url=DOCS_FILES,
        dependencies=[Depends(check_query)],
    )
    bodies = route_class(limits)
    openai = (openai_routes, responses_routes, decisions_routes, vectors_routes)
    apis = (*openai, anthropic_routes, lorax_routes, adapters_routes)
    for routes in apis:
        app.include_router(routes.routes(gateway, bodies))
    in_flight = InFlight()
    app.include_router(service_routes.routes(gateway, bodies, in_flight))
    _add_operation(app, gateway)
    for kind in (Refused, EngineError, StoreError):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(Exception, _on_surprise)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_middleware(Gate, keys=keys, max_body_bytes=limits.max_body_bytes, refuse=respond, in_flight=in_flight)
    app.add_middleware(Invocations)
    app.add_middleware(HeadAsGet)
    if cors is None or cors:
        # Around the gate: a browser's first question carries no key, and a page must be able to read a refusal.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors or ()),
            allow_origin_regex=LOOPBACK_PAGES if cors is None else None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=[INERT_HEADER, "Retry-After"],
        )
    return app


def _add_operation(app: FastAPI, gateway: Gateway) -> None:
    healthy_until_s = 0.0

    @app.get("/health", tags=["Operation"])
    async def health() -> dict[str, str]:
        """200 when a replica can answer, 503 when none can. Open to everyone."""
        nonlocal healthy_until_s
        if time.monotonic() > healthy_until_s:
            await gateway.backend.ping()
            healthy_until_s = time.monotonic() + HEALTH_CACHE_S
        return {"status": "ok"}

    @app.get("/stats", tags=["Operation"])
    async def stats() -> dict[str, Any]:
        """What each replica and the adapter store say of themselves now. `missing` names those that say nothing."""
        said, store = await asyncio.gather(gateway.backend.stats(), _store_status(gateway))
        missing = [part for part in said if "missing" in part]
        if "missing" in store:
            missing.append(store)
        return {
            "replicas": [part for part in said if "missing" not in part],
            "store": None if "missing" in store else store,
            "missing": missing,
        }


async def _store_status(gateway: Gateway) -> dict[str, Any]:
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            return dataclasses.asdict(await gateway.adapters.status())
    except Exception as error:
        why = f"no answer within {STORE_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else fault_of(error).message
        return {"part": "adapter store", "missing": why}


def respond(path: str, fault: Fault, extra_headers: Mapping[str, str] | None = None) -> Response:
    """`fault` in the shape of the API that `path` belongs to."""
    answer = answer_for(fault.code)
    headers = dict(extra_headers or {})
    if answer.retry_after_s is not None:
        headers["Retry-After"] = str(answer.retry_after_s)
    if answer.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path.startswith(ANTHROPIC_PATHS):
        return JSONResponse(anthropic_replies.error_body(fault), answer.status, headers)
    if path in LORAX_PATHS:
        return JSONResponse(lorax_replies.error_body(fault), answer.lorax_status, headers)
    return JSONResponse(openai_replies.error_body(fault), answer.status, headers)


async def _on_error(request: Request, error: Exception) -> Response:
    fault = fault_of(error)
    if answer_for(fault.code).status >= 500:
        logger.warning("%s %s failed: %s", request.method, request.url.path, fault, exc_info=error)
    return respond(request.url.path, fault)


async def _on_surprise(request: Request, error: Exception) -> Response:
    # Starlette raises it again after this answer, and Serve logs it.
    return respond(request.url.path, fault_of(error))


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return respond(request.url.path, fault_of_validation(error.errors()))


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _STATUS_CODES.get(error.status_code, "invalid_request")
    message, headers = f"{request.method} {cut(request.url.path)}: {error.detail}", dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = allowed_methods(request.app.routes, request.scope)
        # A page's browser asks with a header more, and is to be told no in all ways where no page may ask.
        if request.method == "OPTIONS" and "access-control-request-method" not in request.headers:
            return Response(status_code=204, headers=headers)
        message = f"{message}; send {headers['Allow']}"
    return respond(request.url.path, Fault(code=code, message=message), headers)
