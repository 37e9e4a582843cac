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
from deployments.router.gateway import Opened
from deployments.router.prompts import Prompts
from deployments.router.streams import merge
from engine.request import OutputDelta

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one `data:` line holds it."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class TextEvents:
    """Of one choice: the events that bring text and nothing else, as nearly all do.

    All their bytes but the text's are the same: they are made once, by the way that makes all events.
    """

    __slots__ = ("_head", "_is_plain", "_tail")

    def __init__(self, head: replies.Head, choice: int, writer: LogprobWriter, usage: Usage) -> None:
        (chunk,) = replies.delta_chunks(head, choice, OutputDelta("", 0, text=_ANY_TEXT), writer, usage)
        # Callers choose the model's name and the id in front of the text; behind it stands nothing of theirs.
        start, _, end = event(chunk).rpartition(_string(_ANY_TEXT))
        self._head, self._tail = start, end
        self._is_plain = not (head.token_ids or head.continuous_usage)

    def event(self, delta: OutputDelta) -> bytes | None:
        """The event of `delta`; None if it brings something else than text."""
        if not self._is_plain or not delta.text or delta.finish_reason is not None or delta.logprobs:
            return None
        return self._head + _string(delta.text) + self._tail


_ANY_TEXT = "text"
_encoded: Callable[[str], str] = json.encoder.encode_basestring  # what `json.dumps(ensure_ascii=False)` calls


def _string(text: str) -> bytes:
    return _encoded(text).encode()


async def events(
    head: replies.Head,
    opened: Opened,
    num_samples: int,
    prompts: Prompts,
    echoes: Sequence[str],
) -> AsyncGenerator[bytes]:
    """The events of `opened`. A failure after the first token becomes an error event: the status is long sent."""
    usage = usage_of(opened)
    num_choices = num_samples * len(opened.prompts)
    prompt_of = [choice // num_samples for choice in range(num_choices)]
    writers = [LogprobWriter(prompts, opened.prompts[prompt], len(echoes[prompt])) for prompt in prompt_of]
    texts = [TextEvents(head, choice, writer, usage) for choice, writer in enumerate(writers)]
    for choice in range(num_choices):
        prompt = choice // num_samples
        for chunk in replies.first_chunks(head, choice, echoes[prompt], opened.prompts[prompt], usage):
            yield event(chunk)
    try:
        async with aclosing(merge(opened.streams)) as deltas:
            async for prompt, delta in deltas:
                usage.add(prompt, delta)
                choice = prompt * num_samples + delta.sample_index
                if (told := texts[choice].event(delta)) is not None:
                    yield told
                    continue
                chunks = replies.delta_chunks(head, choice, delta, writers[choice], usage)
                if chunks:
                    yield b"".join(map(event, chunks))
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", opened.request_id, fault, exc_info=error)
        yield event(replies.error_body(fault))
        return
    if head.include_usage:
        yield event(replies.usage_chunk(head, usage))
    yield DONE
