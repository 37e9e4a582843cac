"""Routes of the Messages API."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from deployments.errors import fault_of
from deployments.http.anthropic import examples, replies, translate
from deployments.http.anthropic.schema import CountRequest, MessagesRequest
from deployments.http.documented import answers, failures
from deployments.http.openai.chats import OpenChat, chat_ask, chat_request, open_chat
from deployments.http.openai.parts import pieces
from deployments.http.responses import EventResponse, inert_header
from deployments.router.gateway import Gateway

logger = logging.getLogger("ray.serve")


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/v1/messages, /v1/messages/count_tokens. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.status, replies.error_body)
    router = APIRouter(prefix="/v1/messages", tags=["Anthropic"], responses=told, route_class=route_class)

    @router.post("", responses=answers(examples.ANSWER, examples.EVENTS))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation, as Anthropic's Messages API does. `model` is the base's id or an adapter's name."""
        chat = await open_chat(gateway, chat_request(translate.chat_fields(body)), request)
        headers = inert_header(dict.fromkeys((*request.state.inert, *chat.inert)))
        head = replies.Head(chat.opened.request_id, body.model)
        if body.stream:
            return EventResponse(_events(head, chat), chat.opened, headers)
        choice = await chat.whole()
        return JSONResponse(replies.whole(head, pieces(choice), chat.usage), headers=headers)

    @router.post("/count_tokens", responses=answers(examples.COUNT_ANSWER))
    async def count_tokens(body: CountRequest, request: Request) -> Response:
        """How many tokens the model would read."""
        ask = chat_ask(gateway, chat_request(translate.chat_fields(body))).ask
        if ask.adapter is not None:
            gateway.check_adapter(ask.adapter, ask.model_param)
        (ids,) = await gateway.prompts.encode(ask)
        return JSONResponse({"input_tokens": len(ids)}, headers=inert_header(request.state.inert))

    return router


async def _events(head: replies.Head, chat: OpenChat) -> AsyncGenerator[bytes]:
    """A failure after the first token becomes an error event: the status is long sent."""
    events = replies.Events(head)
    yield _written([events.start(chat.usage)])
    try:
        async with aclosing(chat.choices()) as choices:
            async for choice in choices:
                if written := _written(event for piece in pieces(choice) for event in events.take(piece)):
                    yield written
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", chat.opened.request_id, fault, exc_info=error)
        yield _written([replies.error_body(fault)])
        return
    yield _written(events.finish(chat.usage))


def _written(events: Iterable[dict[str, Any]]) -> bytes:
    """Server-sent events, each called by its type."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
        for event in events
    )
