"""Messages and their events, made of a chat's reply and chunks: pure dictionaries."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.calls import Fault
from deployments.errors import answer_for
from deployments.http.openai.parts import End, Piece

Event = dict[str, Any]

_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What all that is told of one message has in common."""

    request_id: str
    model: str

    def message(self, content: list[Event], end: End | None, usage: Mapping[str, Any]) -> Event:
        return {
            "id": f"msg_{self.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **stop_fields(end),
            "usage": usage_body(usage),
        }


def stop_fields(end: End | None) -> Event:
    """`stop_reason` and `stop_sequence`, null while it goes on."""
    if end is None:
        return {"stop_reason": None, "stop_sequence": None}
    if end.finish_reason == "stop" and isinstance(end.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": end.stop_reason}
    return {"stop_reason": _STOP_REASONS.get(end.finish_reason, "end_turn"), "stop_sequence": None}


def usage_body(usage: Mapping[str, Any]) -> Event:
    """A chat's usage. Tokens of the prompt that were cached are counted apart from the others."""
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage["completion_tokens"],
    }


def whole(head: Head, told: Iterable[Piece | End], usage: Mapping[str, Any]) -> Event:
    """The message of a request that does not stream."""
    blocks: list[Event] = []
    end: End | None = None
    for piece in told:
        if isinstance(piece, End):
            end = piece
        elif piece.kind == "reasoning":
            blocks.append({"type": "thinking", "thinking": piece.text, "signature": ""})
        elif piece.kind == "text":
            blocks.append({"type": "text", "text": piece.text})
        else:
            call = {"type": "tool_use", "id": piece.call_id, "name": piece.name}
            blocks.append(call | {"input": _arguments(piece.text)})
    return head.message(blocks, end, usage)


def _arguments(text: str) -> Any:
    """What a model wrote as arguments; where it is no object, the text as it is."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"arguments": text}


class Events:
    """The events of one message, block after block."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._open: tuple[str, int] | None = None  # kind and call of the block that goes on
        self._index = -1
        self._end: End | None = None

    def start(self, usage: Mapping[str, Any]) -> Event:
        return {"type": "message_start", "message": self._head.message([], None, usage)}

    def take(self, piece: Piece | End) -> Iterator[Event]:
        """The events of `piece`."""
        if isinstance(piece, End):
            self._end = piece
            yield from self._stop()
            return
        if self._open != (piece.kind, piece.call):
            yield from self._stop()
            self._open = (piece.kind, piece.call)
            self._index += 1
            yield {"type": "content_block_start", "index": self._index, "content_block": _begun(piece)}
        if piece.text:
            yield {"type": "content_block_delta", "index": self._index, "delta": _delta(piece)}

    def finish(self, usage: Mapping[str, Any]) -> Iterator[Event]:
        """The last events. `usage`: of the whole."""
        yield from self._stop()
        yield {"type": "message_delta", "delta": stop_fields(self._end), "usage": usage_body(usage)}
        yield {"type": "message_stop"}

    def _stop(self) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}


def _begun(piece: Piece) -> Event:
    if piece.kind == "text":
        return {"type": "text", "text": ""}
    if piece.kind == "reasoning":
        return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}}


def _delta(piece: Piece) -> Event:
    if piece.kind == "text":
        return {"type": "text_delta", "text": piece.text}
    if piece.kind == "reasoning":
        return {"type": "thinking_delta", "thinking": piece.text}
    return {"type": "input_json_delta", "partial_json": piece.text}


def error_body(fault: Fault) -> Event:
    """The shape of every failure on /v1/messages."""
    answer = answer_for(fault.code)
    kind = _ERROR_TYPES.get(answer.status, "invalid_request_error" if answer.status < 500 else "api_error")
    message = f"{fault.param}: {fault.message}" if fault.param and fault.param not in fault.message else fault.message
    return {"type": "error", "error": {"type": kind, "message": message}}
