"""/tokenize, /detokenize, /tokenizer_info, /version, /load, /ping, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

from deployments.asks import Ask, Chat, adapter_of
from deployments.http.documented import answers, failures
from deployments.http.gate import InFlight
from deployments.http.lorax.tokens import tokens
from deployments.http.openai.messages import as_template_takes_it
from deployments.http.openai.replies import error_body
from deployments.http.openai.tools import ToolFields, reading_of, template_args
from deployments.http.service import examples
from deployments.http.service.metrics import exposition
from deployments.http.service.schema import DetokenizeRequest, TokenizeRequest
from deployments.http.versions import own_version
from deployments.router.gateway import Gateway
from engine.errors import InvalidRequest
from engine.request import SamplingParams

_NO_SAMPLES = SamplingParams(max_tokens=1)


def routes(gateway: Gateway, route_class: type[APIRoute], in_flight: InFlight) -> APIRouter:
    """`route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.status, error_body)
    router = APIRouter(tags=["Tokens and service"], responses=told, route_class=route_class)

    @router.post("/tokenize", responses=answers(examples.TOKENIZE_ANSWER))
    async def tokenize(body: TokenizeRequest, request: Request) -> Response:
        """The tokens of a text or of a conversation as the model reads it; with `inputs` as LoRAX tells them."""
        return JSONResponse(await _tokenize(gateway, body))

    @router.post("/detokenize", responses=answers(examples.DETOKENIZE_ANSWER))
    async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
        """The text of token ids."""
        _check_model(gateway, body.model)
        gateway.prompts.check_ids("tokens", body.tokens)
        return JSONResponse({"prompt": gateway.prompts.decode(body.tokens, bool(body.skip_special_tokens))})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """What the tokenizer is, its special tokens and the chat template."""
        return gateway.prompts.tokenizer_info()

    @router.get("/version")
    async def version() -> dict[str, str]:
        """The release that runs."""
        return {"version": own_version()}

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Of each replica, for Prometheus, with vLLM's names where others read them."""
        return Response(exposition(gateway.model_id, await gateway.backend.stats()), media_type=CONTENT_TYPE_LATEST)

    @router.get("/load")
    async def load() -> dict[str, int]:
        """Requests that this router has not answered to their end, this one left out."""
        return {"server_load": max(0, in_flight.count - 1)}

    @router.get("/ping", response_class=Response)
    async def ping() -> Response:
        """As GET /health, with an empty body."""
        await gateway.backend.ping()
        return Response()

    @router.post("/ping", response_class=Response)
    async def ping_too() -> Response:
        """As GET /ping: SageMaker's probes ask so."""
        return await ping()

    return router


def _check_model(gateway: Gateway, model: str | None) -> None:
    adapter = None if model is None else adapter_of(model, gateway.model_id)
    if adapter is not None:
        gateway.check_adapter(adapter, "model")


async def _tokenize(gateway: Gateway, body: TokenizeRequest) -> Any:
    given = [name for name in ("prompt", "messages", "inputs") if getattr(body, name) is not None]
    if len(given) != 1:
        says = f"{' and '.join(given)} contradict each other" if given else "there is no text"
        raise InvalidRequest("prompt", f"{says}; send exactly one of prompt, messages and inputs")
    _check_model(gateway, body.model)
    if body.inputs is not None:
        return await tokens(gateway.prompts, body.inputs, body.add_special_tokens is not False)
    prompt: str | Chat = body.prompt or ""
    if body.messages is not None:
        prompt = _conversation(gateway, body)
    ask = Ask(prompts=(prompt,), params=_NO_SAMPLES, add_special_tokens=body.add_special_tokens, prompt_param=given[0])
    ids = list((await gateway.prompts.encode(ask))[0]) if prompt != "" else []
    names = gateway.prompts.names(ids) if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": await gateway.max_model_len(), "tokens": ids, "token_strs": names}


def _conversation(gateway: Gateway, body: TokenizeRequest) -> Chat:
    fields = ToolFields(tools=body.tools, chat_template_kwargs=body.chat_template_kwargs)
    reading = reading_of(fields, gateway.dialect, gateway.prompts.special_names)
    args, _ = template_args(fields, gateway.prompts.chat_template, reading)
    if body.continue_final_message:
        args |= {"continue_final_message": True, "add_generation_prompt": False}
    elif body.add_generation_prompt is False:
        args["add_generation_prompt"] = False
    short = gateway.dialect.short_ids
    return Chat(tuple(as_template_takes_it(message, short_ids=short) for message in body.messages or ()), args)
