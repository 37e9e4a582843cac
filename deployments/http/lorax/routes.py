"""Routes of the LoRAX API."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deployments.asks import Ask
from deployments.http.collect import Sample, collect
from deployments.http.documented import answers, failures
from deployments.http.lorax import examples, replies, sse
from deployments.http.lorax.schema import CompatRequest, GenerateRequest, Parameters
from deployments.http.lorax.translate import generate_ask, samples
from deployments.http.responses import EventResponse, closing, inert_header
from deployments.router.gateway import Gateway, Opened


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/generate, /generate_stream and /. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.lorax_status, replies.error_body)
    router = APIRouter(tags=["LoRAX"], responses=told, route_class=route_class)

    @router.post("/generate", responses=answers(examples.ANSWER))
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continue `inputs`; `parameters.adapter_id` names the adapter, none is the base."""
        return JSONResponse(await _whole(gateway, body, request), headers=inert_header(request.state.inert))

    @router.post("/generate_stream", responses=answers(None, examples.EVENTS))
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """As `/generate`, one event a token; the last has `generated_text`."""
        return await _stream(gateway, body, request)

    @router.post("/", responses=answers([examples.ANSWER], examples.EVENTS))
    async def compat(body: CompatRequest, request: Request) -> Response:
        """As `/generate_stream` with `stream`, else as `/generate`, in a list of one."""
        if body.stream:
            return await _stream(gateway, body, request)
        return JSONResponse([await _whole(gateway, body, request)], headers=inert_header(request.state.inert))

    return router


def _ask(gateway: Gateway, body: GenerateRequest, *, stream: bool) -> Ask:
    return generate_ask(body, gateway.model_id, gateway.defaults, stream=stream)


async def _stream(gateway: Gateway, body: GenerateRequest, request: Request) -> Response:
    asked = body.parameters or Parameters()
    opened = await gateway.open(_ask(gateway, body, stream=True), request.state.caller.tenant)
    alternatives = asked.return_k_alternatives is not None
    writer = replies.TokenWriter(gateway.prompts, opened.prompts[0], alternatives=alternatives)
    seed = opened.seeds[0] if samples(asked) else None
    prefix = body.inputs if asked.return_full_text else ""
    events = sse.events(opened, writer, prefix, seed, with_details=bool(asked.details))
    return EventResponse(events, opened, inert_header(request.state.inert))


async def _whole(gateway: Gateway, body: GenerateRequest, request: Request) -> dict[str, Any]:
    asked = body.parameters or Parameters()
    opened = await gateway.open(_ask(gateway, body, stream=False), request.state.caller.tenant)
    async with closing(opened):
        by_prompt, _ = await collect(opened)
    ranked = sorted(by_prompt[0].values(), key=lambda sample: -sample.mean_logprob)
    prefix = body.inputs if asked.return_full_text else ""
    details = _details(gateway, asked, opened, ranked, prefix) if asked.details else None
    return replies.reply(prefix + ranked[0].text, details)


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
