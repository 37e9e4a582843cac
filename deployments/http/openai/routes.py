"""Routes of the OpenAI API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from adapter_store.records import AdapterRecord
from deployments.asks import Ask
from deployments.http.collect import Sample, Usage, collect, likeliest
from deployments.http.documented import answers, failures
from deployments.http.limits import MAX_CURSOR_CHARS, MAX_PAGE
from deployments.http.openai import examples, replies, sse, translate
from deployments.http.openai.chats import chat_ask, said_of
from deployments.http.openai.said import reader_of
from deployments.http.openai.schema import ChatRequest, CompletionRequest, Sampling
from deployments.http.openai.scored import Scored, as_tokens, prompt_logprobs, score_prompts
from deployments.http.openai.tools import Reading
from deployments.http.responses import EventResponse, closing, inert_header
from deployments.router.gateway import Gateway
from engine.request import FinishReason

OWNER = "chorus"
Ids = tuple[int, ...]


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/v1/chat/completions, /v1/completions, /v1/models. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.status, replies.error_body)
    router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=told, route_class=route_class)
    started = int(time.time())

    @router.post("/chat/completions", responses=answers(examples.CHAT_ANSWER, examples.CHAT_EVENTS))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. `model` is the base's id or an adapter's name. Fields are honoured or refused."""
        asked = chat_ask(gateway, body)
        inert = tuple(dict.fromkeys((*request.state.inert, *asked.inert)))
        return await _serve(gateway, "chat", body, asked.ask, request, inert, reading=asked.reading)

    @router.post("/completions", responses=answers(examples.COMPLETION_ANSWER, examples.COMPLETION_EVENTS))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or several: texts or lists of token ids."""
        ask = translate.completion_ask(body, gateway.model_id, gateway.defaults)
        return await _serve(gateway, "completion", body, ask, request, request.state.inert)

    @router.get("/models")
    async def models(
        after: Annotated[str | None, Query(max_length=MAX_CURSOR_CHARS, pattern=r"^\d+:")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    ) -> dict[str, Any]:
        """The base, then the adapters, a page at a time: give what a page says as `next` as the next one's `after`."""
        return await _models(gateway, started, after, limit)

    @router.get("/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One model. An adapter is looked up in its source now; `adapter.reason` says why a broken one is refused."""
        if model == gateway.model_id:
            return _base_itself(gateway, started)
        gateway.check_adapter(model, "model")
        return _adapter(await gateway.adapters.resolve(model), gateway.model_id, started)

    return router


async def _serve(
    gateway: Gateway,
    kind: replies.Kind,
    body: Sampling,
    ask: Ask,
    request: Request,
    inert: tuple[str, ...],
    *,
    reading: Reading | None = None,
) -> Response:
    if body.user is not None and body.safety_identifier not in (None, body.user):
        inert = (*inert, "user")  # the newer name of the two counts
    headers = inert_header(inert)
    tenant = request.state.caller.tenant
    top = _scored_top(body)
    scored = None if top is None else await score_prompts(gateway, ask, tenant, top)
    if body.max_tokens == 0:
        ids = await gateway.prompts.encode(ask) if scored is None else scored.ids
        return JSONResponse(_nothing_more(gateway, kind, body, ask, ids, scored), headers=headers)
    opened = await gateway.open(ask if scored is None else as_tokens(ask, scored.ids), tenant)
    head = _head(kind, body, opened.request_id)
    echoes = _echoes(gateway, body, ask, opened.prompts, scored)
    said = said_of(reading, gateway.prompts, opened, ask.params.n) if reading is not None else []
    if body.stream:
        return EventResponse(sse.events(head, opened, ask.params.n, gateway.prompts, echoes, said), opened, headers)
    async with closing(opened):
        samples, usage = await collect(opened, reader_of(said))
    if isinstance(body, CompletionRequest) and (body.n or 1) < ask.params.n:
        samples = [likeliest(by_index, body.n or 1, with_logprobs=body.logprobs is not None) for by_index in samples]
    whole = replies.whole(head, samples, usage, gateway.prompts, opened.prompts, echoes, said)
    return JSONResponse(_with_scores(gateway, kind, body, whole, scored), headers=headers)


def _head(kind: replies.Kind, body: Sampling, request_id: str) -> replies.Head:
    options = body.stream_options
    return replies.Head(
        kind=kind,
        request_id=request_id,
        created=int(time.time()),
        model=body.model,
        include_usage=options is not None and options.include_usage,
        continuous_usage=options is not None and options.continuous_usage_stats,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
    )


def _scored_top(body: Sampling) -> int | None:
    """How many of the likeliest tokens are asked for in the place of each of the prompt's; None: nothing is."""
    echoed = body.logprobs if isinstance(body, CompletionRequest) and body.echo else None
    asked = [top for top in (body.prompt_logprobs, echoed) if top is not None]
    return max(asked, default=None)


def _nothing_more(
    gateway: Gateway, kind: replies.Kind, body: Sampling, ask: Ask, ids: Sequence[Ids], scored: Scored | None
) -> dict[str, Any]:
    """The reply to `max_tokens: 0`."""
    samples = [{index: Sample(finish_reason=FinishReason.LENGTH) for index in range(body.n or 1)} for _ in ids]
    head, usage = _head(kind, body, ask.request_id or uuid.uuid4().hex), Usage(sum(map(len, ids)))
    echoes = _echoes(gateway, body, ask, ids, scored)
    whole = replies.whole(head, samples, usage, gateway.prompts, ids, echoes)
    return _with_scores(gateway, kind, body, whole, scored)


def _with_scores(
    gateway: Gateway, kind: replies.Kind, body: Sampling, whole: dict[str, Any], scored: Scored | None
) -> dict[str, Any]:
    """With vLLM's `prompt_logprobs`: of a chat beside its choices, of a completion in each."""
    if scored is None or body.prompt_logprobs is None:
        return whole
    told = [prompt_logprobs(gateway.prompts, tokens, body.prompt_logprobs) for tokens in scored.tokens]
    if kind == "chat":
        return whole | {"prompt_logprobs": told[0]}
    for index, choice in enumerate(whole["choices"]):
        choice["prompt_logprobs"] = told[index // (body.n or 1)]
    return whole


def _echoes(
    gateway: Gateway, body: Sampling, ask: Ask, ids: Sequence[Ids], scored: Scored | None
) -> list[replies.Echo]:
    if not (isinstance(body, CompletionRequest) and body.echo):
        return [replies.NO_ECHO] * len(ids)
    texts = [
        prompt if isinstance(prompt, str) and not ask.truncate
        else gateway.prompts.decode(ids[index], ask.params.skip_special_tokens)
        for index, prompt in enumerate(ask.prompts)
    ]  # fmt: skip
    if scored is None or body.logprobs is None:
        return [replies.Echo(text) for text in texts]
    return [replies.Echo(text, tokens, body.logprobs) for text, tokens in zip(texts, scored.tokens, strict=True)]


async def _models(gateway: Gateway, started: int, after: str | None, limit: int) -> dict[str, Any]:
    """One page: the base, then the adapters, source by source. `after` is what the last page gave as `next`."""
    found = {gateway.model_id: _base_itself(gateway, started)} if after is None else {}
    page = await gateway.list_adapters(after, limit - len(found))
    for record in page.records:
        # Of a name that two sources have, the first is the one that is served.
        found.setdefault(record.name, _adapter(record, gateway.model_id, started))
    cursor = page.next_cursor
    ids = list(found)
    return {
        "object": "list",
        "data": list(found.values()),
        "has_more": cursor is not None,
        "next": cursor,
        "unavailable": list(page.unavailable),
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
    }


def _base_itself(gateway: Gateway, created: int) -> dict[str, Any]:
    """With what its folder says of sampling: the defaults of requests for it and for every adapter."""
    return _base(gateway.model_id, created) | {"default_sampling_params": dict(gateway.defaults)}


def _base(model_id: str, created: int) -> dict[str, Any]:
    return {"id": model_id, "object": "model", "created": created, "owned_by": OWNER, "root": model_id, "parent": None}


def _adapter(record: AdapterRecord, model_id: str, created: int) -> dict[str, Any]:
    body = _base(record.name, created) | {"root": model_id, "parent": model_id}
    body["adapter"] = {
        "source": record.source,
        "version": record.version,
        "state": str(record.state),
        "rank": record.rank,
        "num_bytes": record.num_bytes,
        "reason": record.reason,
        "notices": list(record.notices),
    }
    return body
