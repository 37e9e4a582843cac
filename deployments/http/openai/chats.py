"""A chat for the APIs that are told in other words: their fields in, a chat's choices out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from deployments.asks import Ask
from deployments.calls import Refused
from deployments.http.collect import collect, usage_of
from deployments.http.openai import replies, translate
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.schema import ChatRequest
from deployments.http.responses import closing
from deployments.http.validation import fault_of_validation
from deployments.http.wire import inert_names
from deployments.router.gateway import Gateway, Opened
from deployments.router.streams import merge


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """The body that `fields` of another API amount to. Raises: Refused naming a field of a chat's."""
    try:
        return ChatRequest.model_validate(dict(fields))
    except ValidationError as error:
        raise Refused(fault_of_validation(error.errors(include_url=False), ChatRequest)) from None


class OpenChat:
    """A chat that a replica has begun to answer: one sample. To be read once, by `whole` or by `choices`."""

    def __init__(self, gateway: Gateway, body: ChatRequest, opened: Opened, inert: tuple[str, ...]) -> None:
        self.opened = opened
        self.inert = inert  # fields of the chat that were accepted without effect
        self.created = int(time.time())
        self._gateway = gateway
        self._head = replies.Head(
            kind="chat", request_id=opened.request_id, created=self.created, model=body.model, token_ids=False
        )
        self._usage = usage_of(opened)

    @property
    def usage(self) -> dict[str, Any]:
        """So far."""
        return replies.usage_body(self._usage)

    async def whole(self) -> dict[str, Any]:
        """The choice, once it is there. Raises: as the streams do."""
        async with closing(self.opened):
            samples, self._usage = await collect(self.opened)
        prompts = self._gateway.prompts
        reply = replies.whole(self._head, samples, self._usage, prompts, self.opened.prompts, [""])
        choice: dict[str, Any] = reply["choices"][0]
        return choice

    async def choices(self) -> AsyncGenerator[dict[str, Any]]:
        """What each chunk says. Raises: as the streams do."""
        writer = LogprobWriter(self._gateway.prompts, self.opened.prompts[0], 0)
        async with aclosing(merge(self.opened.streams)) as deltas:
            async for prompt, delta in deltas:
                self._usage.add(prompt, delta)
                for chunk in replies.delta_chunks(self._head, 0, delta, writer, self._usage):
                    yield chunk["choices"][0]


def chat_ask(gateway: Gateway, body: ChatRequest) -> Ask:
    """Raises: InvalidRequest naming a field."""
    return translate.chat_ask(body, gateway.model_id, gateway.defaults)


async def open_chat(gateway: Gateway, body: ChatRequest, request: Request) -> OpenChat:
    """Raises: InvalidRequest; as `Gateway.open`."""
    opened = await gateway.open(chat_ask(gateway, body), request.state.caller.tenant)
    return OpenChat(gateway, body, opened, inert_names(body))
