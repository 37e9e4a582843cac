"""Routes of the Responses API."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from deployments.calls import Fault, Refused
from deployments.errors import fault_of
from deployments.http.documented import answers, failures
from deployments.http.openai import replies as openai_replies
from deployments.http.openai.chats import OpenChat, chat_ask, chat_request, open_chat
from deployments.http.openai.parts import pieces
from deployments.http.responses import EventResponse, inert_header
from deployments.http.responses_api import examples, replies, translate
from deployments.http.responses_api.items import Item
from deployments.http.responses_api.schema import ResponsesRequest
from deployments.router.gateway import Gateway

logger = logging.getLogger("ray.serve")

MAX_ITEMS = 100  # of a page
_ITEMS: TypeAdapter[list[Any]] = TypeAdapter(list[Item])


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/v1/responses. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.status, openai_replies.error_body)
    router = APIRouter(prefix="/v1/responses", tags=["OpenAI"], responses=told, route_class=route_class)
    shelf = _Shelf(gateway)

    @router.post("", responses=answers(examples.ANSWER, examples.EVENTS))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input, as OpenAI's Responses API does. `model` is the base's id or an adapter's name."""
        tenant = request.state.caller.tenant
        before = await shelf.items_of(tenant, body.previous_response_id) if body.previous_response_id else []
        items = [*before, *_items_of(body)]
        chat_body = chat_request(translate.chat_fields(body, _ITEMS.validate_python(items)))
        params = chat_ask(gateway, chat_body).ask.params
        chat = await open_chat(gateway, chat_body, request)
        inert = (*request.state.inert, *translate.inert_includes(body), *chat.inert)
        head = replies.Head(body, chat.opened.request_id, chat.created, params.temperature, params.top_p)
        headers = inert_header(dict.fromkeys(inert))
        if body.stream:
            return EventResponse(_events(head, chat, shelf, tenant, items), chat.opened, headers)
        events = replies.Events(head)
        for piece in pieces(await chat.whole()):
            for _ in events.take(piece):
                pass
        response = await shelf.keep(tenant, events.response(chat.usage), items)
        return JSONResponse(response, headers=headers)

    @router.get("/{response_id}")
    async def response(response_id: str, request: Request) -> Response:
        """A response that was kept."""
        return JSONResponse((await shelf.find(request.state.caller.tenant, response_id, "response_id"))["response"])

    @router.delete("/{response_id}")
    async def delete(response_id: str, request: Request) -> Response:
        """Forget a response that was kept."""
        if not await gateway.kept.delete(request.state.caller.tenant, response_id):
            raise _gone(response_id, "response_id")
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @router.get("/{response_id}/input_items")
    async def input_items(
        response_id: str,
        request: Request,
        after: Annotated[str | None, Query(max_length=64, pattern=r"^item_\d+$")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_ITEMS)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """What a response that was kept had read, a page at a time."""
        kept = await shelf.find(request.state.caller.tenant, response_id, "response_id")
        items = [item | {"id": f"item_{place}"} for place, item in enumerate(kept["input"])]
        if order == "desc":
            items.reverse()
        begin = 1 + next((at for at, item in enumerate(items) if item["id"] == after), -1)
        page = items[begin : begin + limit]
        ids = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return JSONResponse({"object": "list", "data": page, "has_more": begin + limit < len(items), **ids})

    return router


def _items_of(body: ResponsesRequest) -> list[dict[str, Any]]:
    if isinstance(body.input, str):
        return [{"type": "message", "role": "user", "content": body.input}]
    return [item.model_dump(exclude_none=True) for item in body.input]


def _gone(response_id: str, param: str) -> Refused:
    message = f"response {response_id[:100]!r} is not kept here (any more); send the whole input instead"
    return Refused(Fault(code="response_not_found", message=message, param=param))


class _Shelf:
    """Kept responses, as this API reads them: each with all that its model had read."""

    def __init__(self, gateway: Gateway) -> None:
        self._kept = gateway.kept

    async def find(self, tenant: str, response_id: str, param: str) -> dict[str, Any]:
        """Raises: Refused (`response_not_found`): also for what another key keeps."""
        data = await self._kept.get(tenant, response_id)
        if data is None:
            raise _gone(response_id, param)
        found: dict[str, Any] = json.loads(data)
        return found

    async def items_of(self, tenant: str, response_id: str) -> list[dict[str, Any]]:
        """What went before a response that goes on from `response_id`."""
        kept = await self.find(tenant, response_id, "previous_response_id")
        return [*kept["input"], *kept["response"]["output"]]

    async def keep(self, tenant: str, response: dict[str, Any], items: list[dict[str, Any]]) -> dict[str, Any]:
        """The response as it is told: `store` says whether it is kept."""
        if not response["store"]:
            return response
        data = json.dumps({"response": response, "input": items}, separators=(",", ":")).encode()
        try:
            is_kept = await self._kept.put(tenant, response["id"], data)
        except Refused as refused:  # the answer is there, and is worth more than its copy
            logger.warning("response %s is not kept: %s", response["id"], refused)
            is_kept = False
        return response | {"store": is_kept}


async def _events(
    head: replies.Head, chat: OpenChat, shelf: _Shelf, tenant: str, items: list[dict[str, Any]]
) -> AsyncGenerator[bytes]:
    """A failure after the first token becomes an error event: the status is long sent."""
    events = replies.Events(head)
    for event in events.start():
        yield _written(event)
    try:
        async with aclosing(chat.choices()) as choices:
            async for choice in choices:
                for piece in pieces(choice):
                    for event in events.take(piece):
                        yield _written(event)
        response = await shelf.keep(tenant, events.response(chat.usage), items)
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", chat.opened.request_id, fault, exc_info=error)
        for event in events.fail(fault):
            yield _written(event)
        return
    for event in events.finish(response):
        yield _written(event)


def _written(event: dict[str, Any]) -> bytes:
    """A server-sent event, called by its type."""
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()
