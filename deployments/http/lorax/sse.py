"""A running request as LoRAX streams it: one event per token, the last with the whole text and the details."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from deployments.errors import fault_of
from deployments.http.collect import Sample
from deployments.http.lorax import replies
from deployments.router.gateway import Opened
from deployments.router.streams import merge

logger = logging.getLogger("ray.serve")

# At the end of a stream whose last token was sent before: LoRAX clients need some token in every event.
_NO_TOKEN = {"id": 0, "text": "", "logprob": 0.0, "special": True, "skipped": False}
_NUM_FIELDS = len(_NO_TOKEN)  # of a token without alternatives
_TOKEN = 'data:{"token":{"id":%d,"text":%s,"logprob":%s,"special":%s,"skipped":false},'
_REST = b'"generated_text":null,"details":null}\n\n'


def event(body: dict[str, Any]) -> bytes:
    """One event; LoRAX writes no space after the colon."""
    return b"data:" + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


_as_json: Callable[[str], str] = json.encoder.encode_basestring  # `json.dumps(ensure_ascii=False)` makes a writer first


def token_event(token: dict[str, Any]) -> bytes:
    """The event of a token that is not the last: nearly all that is written, so only what differs is written anew."""
    if len(token) > _NUM_FIELDS or not math.isfinite(token["logprob"]):
        return event({"token": token, "generated_text": None, "details": None})
    special = "true" if token["special"] else "false"
    return (_TOKEN % (token["id"], _as_json(token["text"]), repr(token["logprob"]), special)).encode() + _REST


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
                last: dict[str, Any] | None = None
                if delta.finish_reason is not None:
                    last = {"token": tokens.pop() if tokens else _NO_TOKEN, "generated_text": prefix + sample.text}
                    last["details"] = replies.details(sample, len(opened.prompts[0]), seed) if with_details else None
                if written := b"".join(map(token_event, tokens)) + (b"" if last is None else event(last)):
                    yield written
    except Exception as error:
        fault = fault_of(error)
        logger.warning("request %s failed in its stream: %s", opened.request_id, fault, exc_info=error)
        yield event(replies.error_body(fault))
