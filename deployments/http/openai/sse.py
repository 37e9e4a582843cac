"""A running request as server-sent events: role, text, finish, usage, [DONE]; or an error event, and the end."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from deployments.errors import fault_of
from deployments.http.collect import usage_of
from deployments.http.openai import replies
from deployments.http.openai.logprobs import LogprobWriter
from deployments.router.gateway import Opened
from deployments.router.prompts import Prompts
from deployments.router.streams import merge

logger = logging.getLogger("ray.serve")

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one `data:` line holds it."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


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
    for choice in range(num_choices):
        prompt = choice // num_samples
        for chunk in replies.first_chunks(head, choice, echoes[prompt], opened.prompts[prompt], usage):
            yield event(chunk)
    try:
        async with aclosing(merge(opened.streams)) as deltas:
            async for prompt, delta in deltas:
                usage.add(prompt, delta)
                choice = prompt * num_samples + delta.sample_index
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
