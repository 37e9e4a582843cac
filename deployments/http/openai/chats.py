"""A chat for the APIs that are told in other words: their fields in, a chat's choices out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.requests import Request

from deployments.asks import Ask
from deployments.calls import Refused
from deployments.http.collect import collect, usage_of
from deployments.http.openai import replies, translate
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.said import Said, reader_of
from deployments.http.openai.schema import ChatRequest
from deployments.http.openai.tools import Reading, reading_of, template_args
from deployments.http.responses import closing
from deployments.http.validation import fault_of_validation
from deployments.http.wire import inert_names
from deployments.router.gateway import Gateway, Opened
from deployments.router.prompts import Prompts
from deployments.router.streams import merge

REASONING = ("reasoning_content", "reasoning", "thinking")  # as chat templates name an earlier answer's reasoning
PROMPT_END = 32  # tokens, in which a template may have begun the reasoning


def chat_request(fields: Mapping[str, Any]) -> ChatRequest:
    """The body that `fields` of another API amount to. Raises: Refused naming a field of a chat's."""
    try:
        return ChatRequest.model_validate(dict(fields))
    except ValidationError as error:
        raise Refused(fault_of_validation(error.errors(include_url=False), ChatRequest)) from None


class OpenChat:
    """A chat that a replica has begun to answer: one sample. To be read once, by `whole` or by `choices`."""

    def __init__(
        self, gateway: Gateway, body: ChatRequest, opened: Opened, reading: Reading, inert: tuple[str, ...]
    ) -> None:
        self.opened = opened
        self._said = said_of(reading, gateway.prompts, opened, 1)[0]
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
        return replies.usage_body(self._usage, [self._said])

    async def whole(self) -> dict[str, Any]:
        """The choice, once it is there. Raises: as the streams do."""
        async with closing(self.opened):
            samples, self._usage = await collect(self.opened, reader_of([self._said]))
        prompts = self._gateway.prompts
        reply = replies.whole(
            self._head, samples, self._usage, prompts, self.opened.prompts, [replies.NO_ECHO], [self._said]
        )
        choice: dict[str, Any] = reply["choices"][0]
        return choice

    async def choices(self) -> AsyncGenerator[dict[str, Any]]:
        """What each chunk says. Raises: as the streams do."""
        writer = LogprobWriter(self._gateway.prompts, self.opened.prompts[0])
        async with aclosing(merge(self.opened.streams)) as deltas:
            async for prompt, delta in deltas:
                self._usage.add(prompt, delta)
                for chunk in replies.delta_chunks(self._head, 0, delta, writer, self._usage, self._said):
                    yield chunk["choices"][0]


@dataclass(frozen=True, slots=True)
class ChatAsk:
    """A chat before it is sent: what is asked, how its answers are read, and which fields had no effect."""

    ask: Ask
    reading: Reading
    inert: tuple[str, ...]


def chat_ask(gateway: Gateway, body: ChatRequest) -> ChatAsk:
    """Raises: InvalidRequest naming a field."""
    prompts = gateway.prompts
    reading = reading_of(body, gateway.dialect, prompts.special_names)
    args, inert = template_args(body, prompts.chat_template, reading)
    if any(message.tool_calls == [] for message in body.messages):
        inert = (*inert, "tool_calls")
    has_reasoning = any(m.reasoning is not None or m.reasoning_content is not None for m in body.messages)
    if has_reasoning and not prompts.template_names(*REASONING):
        inert = (*inert, "reasoning_content")
    ask = translate.chat_ask(body, gateway.model_id, gateway.defaults, reading, args)
    return ChatAsk(ask, reading, (*inert_names(body), *inert))


def said_of(reading: Reading, prompts: Prompts, opened: Opened, num_samples: int) -> list[Said]:
    """A reader for each choice. Its prompt's end says whether the model begins inside of its reasoning."""
    end = prompts.decode(opened.prompts[0][-PROMPT_END:], skip_special_tokens=False) if reading.needs_prompt else ""
    return [Said(reading, end) for _ in range(num_samples)]


async def open_chat(gateway: Gateway, body: ChatRequest, request: Request) -> OpenChat:
    """Raises: InvalidRequest; as `Gateway.open`."""
    asked = chat_ask(gateway, body)
    opened = await gateway.open(asked.ask, request.state.caller.tenant)
    return OpenChat(gateway, body, opened, asked.reading, asked.inert)
