"""Routes of the LoRAX API that generate."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deployments.asks import Ask
from deployments.http.collect import Sample, collect
from deployments.http.documented import answers, failures
from deployments.http.lorax import examples, headers, replies, service, sse
from deployments.http.lorax.schema import CompatRequest, GenerateRequest, Parameters
from deployments.http.lorax.translate import generate_ask, samples, wants_details
from deployments.http.openai.scored import as_tokens, score_prompts
from deployments.http.responses import EventResponse, closing, inert_header
from deployments.router.gateway import Gateway, Opened
from engine.errors import InvalidRequest


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """All paths of LoRAX but its OpenAI endpoints. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.lorax_status, replies.error_body)
    router = APIRouter(tags=["LoRAX"], responses=told, route_class=route_class)

    @router.post("/generate", responses=answers(examples.ANSWER))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue `inputs`; `parameters.adapter_id` names the adapter, none is the base."""
        whole, headers = await _whole(gateway, body, request)
        return JSONResponse(whole, headers=headers)

    @router.post("/generate_stream", responses=answers(None, examples.EVENTS))
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """As `/generate`, one event a token; the last has `generated_text`."""
        return await _stream(gateway, body, request)

    @router.post("/", responses=answers([examples.ANSWER], examples.EVENTS))
    async def compat(body: CompatRequest, request: Request) -> Response:
        """As `/generate_stream` with `stream`, else as `/generate`, in a list of one."""
        if body.stream:
            return await _stream(gateway, body, request)
        whole, headers = await _whole(gateway, body, request)
        return JSONResponse([whole], headers=headers)

    service.add(router, gateway)
    return router


def _ask(gateway: Gateway, body: GenerateRequest, *, stream: bool) -> Ask:
    return generate_ask(body, gateway.model_id, gateway.defaults, gateway.sources, stream=stream)


def _inert(asked: Parameters, ask: Ask, request: Request) -> dict[str, str]:
    """Beside the fields that never have an effect, a source without an adapter in it has none."""
    is_idle = asked.adapter_source is not None and not ask.adapter and not ask.parts
    return inert_header((*request.state.inert, *(("adapter_source",) if is_idle else ())))


async def _stream(gateway: Gateway, body: GenerateRequest, request: Request) -> Response:
    asked = body.parameters or Parameters()
    if asked.decoder_input_details:
        raise InvalidRequest("decoder_input_details", "it is part of a whole reply; POST /generate without stream")
    ask = _ask(gateway, body, stream=True)
    opened = await gateway.open(ask, request.state.caller.tenant)
    alternatives = asked.return_k_alternatives is not None
    writer = replies.TokenWriter(gateway.prompts, opened.prompts[0], alternatives=alternatives)
    seed = opened.seeds[0] if samples(asked) else None
    prefix = body.inputs if asked.return_full_text else ""
    events = sse.events(opened, writer, prefix, seed, with_details=bool(asked.details))
    told = headers.of_any(gateway, ask, body.inputs, opened) | _inert(asked, ask, request)
    return EventResponse(events, opened, told)


async def _whole(gateway: Gateway, body: GenerateRequest, request: Request) -> tuple[dict[str, Any], dict[str, str]]:
    began_s = time.monotonic()
    asked = body.parameters or Parameters()
    ask = _ask(gateway, body, stream=False)
    tenant = request.state.caller.tenant
    scored = await score_prompts(gateway, ask, tenant, 0) if asked.decoder_input_details else None
    opened = await gateway.open(ask if scored is None else as_tokens(ask, scored.ids), tenant)
    async with closing(opened):
        by_prompt, usage = await collect(opened)
    ranked = sorted(by_prompt[0].values(), key=lambda sample: -sample.mean_logprob)
    prefix = body.inputs if asked.return_full_text else ""
    details = _details(gateway, asked, opened, ranked, prefix) if wants_details(asked) else None
    if details is not None and scored is not None:
        details["prefill"] = replies.prefill(gateway.prompts, scored.ids[0], scored.tokens[0])
    told = headers.of_any(gateway, ask, body.inputs, opened) | headers.of_whole(opened, began_s, usage)
    return replies.reply(prefix + ranked[0].text, details), told | _inert(asked, ask, request)


def _details(gateway: Gateway, asked: Parameters, opened: Opened, ranked: list[Sample], prefix: str) -> dict[str, Any]:
    seed = opened.seeds[0] if samples(asked) else None

    def tokens(sample: Sample) -> list[dict[str, Any]]:
        alternatives = asked.return_k_alternatives is not None
        writer = replies.TokenWriter(gateway.prompts, opened.prompts[0], alternatives=alternatives)
        return writer.tokens(sample.logprobs)

    best, *others = ranked
    body = replies.details(best, len(opened.prompts[0]), seed) | {"prefill": [], "tokens": tokens(best)}
    if others:
        rest = [replies.sequence(sample, prefix + sample.text, seed, tokens(sample)) for sample in others]
        body["best_of_sequences"] = rest
    return body
