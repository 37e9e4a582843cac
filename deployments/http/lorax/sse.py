"""A running request as LoRAX streams it: one event per token, the last with the whole text and the details."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from deployments.errors import fault_of
from deployments.http.collect import Sample
from deployments.http.lorax import replies
from deployments.router.gateway import Opened
from deployments.router.streams import merge

logger = logging.getLogger("ray.serve")


def event(body: dict[str, Any]) -> bytes:
    """One event; LoRAX writes no space after the colon."""
    return b"data:" + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def events(
    opened: Opened, writer: replies.TokenWriter, prefix: str, seed: int | None, *, with_details: bool
) -> AsyncGenerator[bytes]:
    """The events of `opened`; `prefix` goes in front of the whole text."""
    sample = Sample()
    try:
        async with aclosing(merge(opened.streams)) as deltas:
            async for _, delta in deltas:
                sample.add(delta)
                tokens = writer.tokens(delta.logprobs or ())
                last = delta.finish_reason is not None
                bodies: list[dict[str, Any]] = [
                    {"token": token, "generated_text": None, "details": None} for token in tokens
                ]
                if last:
                    bodies = bodies or [_without_token()]
                    bodies[-1]["generated_text"] = prefix + sample.text
                    if with_details:
                        bodies[-1]["details"] = replies.details(sample, len(opened.prompts[0]), seed)
                if bodies:
                    yield b"".join(map(event, bodies))
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", opened.request_id, fault, exc_info=error)
        yield event(replies.error_body(fault))


def _without_token() -> dict[str, Any]:
    """The end of a stream whose last token was sent before: LoRAX clients need some token in every event."""
    token = {"id": 0, "text": "", "logprob": 0.0, "special": True, "skipped": False}
    return {"token": token, "generated_text": None, "details": None}
