"""A running request as server-sent events: role, text, finish, usage, [DONE]; or an error event, and the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from deployments.errors import fault_of
from deployments.http.collect import Usage, usage_of
from deployments.http.openai import replies
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.said import Said
from deployments.router.gateway import Opened
from deployments.router.prompts import Prompts
from deployments.router.streams import merge
from engine.request import OutputDelta

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"
_PLACE = "the place of a delta's text"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one `data:` line holds it."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


_as_json: Callable[[str], str] = json.encoder.encode_basestring  # `json.dumps(ensure_ascii=False)` makes a writer first


class ChunkWriter:
    """The events of one choice's deltas. Nearly all hold nothing but text: of these only the text is written anew."""

    def __init__(
        self, head: replies.Head, choice: int, logprobs: LogprobWriter, usage: Usage, said: Said | None = None
    ) -> None:
        self._said = None if said is None or said.is_plain else said
        self._head = head
        self._choice = choice
        self._logprobs = logprobs
        self._usage = usage
        self._around: tuple[bytes, bytes] | None = None
        if self._said is None and not (
            head.token_ids or head.continuous_usage
        ):  # else a chunk says more of its delta than the text
            sample = self._written(OutputDelta("", 0, (0,), _PLACE))
            before, _, after = sample.rpartition(json.dumps(_PLACE).encode())  # a model may be called so too
            self._around = (before, after)

    def write(self, delta: OutputDelta) -> bytes:
        """Empty when there is nothing to tell. The usage holds this delta already."""
        if self._around is None or delta.logprobs or delta.finish_reason is not None:
            return self._written(delta)
        if not delta.text:
            return b""
        before, after = self._around
        return before + _as_json(delta.text).encode() + after

    def _written(self, delta: OutputDelta) -> bytes:
        return b"".join(map(event, self._chunks(delta)))

    def _chunks(self, delta: OutputDelta) -> list[dict[str, Any]]:
        return replies.delta_chunks(self._head, self._choice, delta, self._logprobs, self._usage, self._said)


async def events(
    head: replies.Head,
    opened: Opened,
    num_samples: int,
    prompts: Prompts,
    echoes: Sequence[replies.Echo],
    said: Sequence[Said] = (),
) -> AsyncGenerator[bytes]:
    """The events of `opened`. A failure after the first token becomes an error event: the status is long sent."""
    usage = usage_of(opened)
    num_choices = num_samples * len(opened.prompts)
    writers = []
    for choice in range(num_choices):
        prompt = choice // num_samples
        ids, echo = opened.prompts[prompt], echoes[prompt]
        logprobs, echoed = echo.writer(head, prompts, ids)
        writers.append(ChunkWriter(head, choice, logprobs, usage, said[choice] if said else None))
        for chunk in replies.first_chunks(head, choice, echo.text, ids, usage, echoed):
            yield event(chunk)
    try:
        async with aclosing(merge(opened.streams)) as deltas:
            async for prompt, delta in deltas:
                usage.add(prompt, delta)
                if written := writers[prompt * num_samples + delta.sample_index].write(delta):
                    yield written
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", opened.request_id, fault, exc_info=error)
        yield event(replies.error_body(fault))
        return
    if head.include_usage:
        yield event(replies.usage_chunk(head, usage, said))
    yield DONE
