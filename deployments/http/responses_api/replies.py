"""Responses and their events, made of a chat's reply and chunks: pure dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.calls import Fault
from deployments.errors import answer_for
from deployments.http.openai.parts import End, Piece
from deployments.http.responses_api.schema import ResponsesRequest

Event = dict[str, Any]
PREFIX = "resp_"


@dataclass(frozen=True, slots=True)
class Head:
    """What all that is told of one response has in common."""

    body: ResponsesRequest
    request_id: str
    created: int
    temperature: float
    top_p: float

    @property
    def id(self) -> str:
        return PREFIX + self.request_id

    def response(self, status: str, output: list[Event], usage: Event | None) -> Event:
        body = self.body
        told = body.text.format.model_dump(by_alias=True, exclude_none=True) if body.text and body.text.format else None
        choice: Any = body.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": self.created if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": body.store is not False,
            "temperature": self.temperature,
            "text": {"format": told or {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_tool_body(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": body.user,
        }


def _tool_body(tool: Any) -> Event:
    """With the fields that clients' models want set."""
    told: Event = tool.model_dump(exclude_none=True)
    return {"parameters": None, "strict": None, **told}


def usage_body(usage: Mapping[str, Any]) -> Event:
    """A chat's usage, in this API's names."""
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["total_tokens"],
    }


_ITEM_PREFIX = {"reasoning": "rs_", "text": "msg_", "call": "fc_"}
_PART = {"reasoning": "reasoning_text", "text": "output_text"}


class Events:
    """The events of one response, item after item; `output` is what it is made of so far."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._number = 0
        self._open: tuple[str, int] | None = None  # kind and call of the item that goes on
        self._logprobs: list[Mapping[str, Any]] = []  # of the text that goes on
        self._text: list[str] = []
        self._end: End | None = None
        self.output: list[Event] = []

    def start(self) -> Iterator[Event]:
        """The first events."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._head.response("in_progress", [], None))

    def take(self, piece: Piece | End) -> Iterator[Event]:
        """The events of `piece`."""
        if isinstance(piece, End):
            self._end = piece
            yield from self._stop()
            return
        if self._open != (piece.kind, piece.call):
            yield from self._stop()
            yield from self._begin(piece)
        self._logprobs += piece.logprobs
        if not piece.text:
            return
        self._text.append(piece.text)
        if piece.kind == "call":
            yield self._event("response.function_call_arguments.delta", **self._place(), delta=piece.text)
        elif piece.kind == "reasoning":
            yield self._event("response.reasoning_text.delta", **self._place(), content_index=0, delta=piece.text)
        else:
            told = {"delta": piece.text, "logprobs": list(piece.logprobs)}
            yield self._event("response.output_text.delta", **self._place(), content_index=0, **told)

    @property
    def status(self) -> str:
        """How the response ended."""
        return "incomplete" if self._end is not None and self._end.finish_reason == "length" else "completed"

    def response(self, usage: Mapping[str, Any]) -> Event:
        """The whole, at its end."""
        return self._head.response(self.status, self.output, usage_body(usage))

    def finish(self, response: Event) -> Iterator[Event]:
        """The last events; `response` is the whole."""
        yield from self._stop()
        yield self._event(f"response.{response['status']}", response=response)

    def fail(self, fault: Fault) -> Iterator[Event]:
        """The last events of a response that failed."""
        response = self._head.response("failed", self.output, None)
        code = "rate_limit_exceeded" if answer_for(fault.code).status == 429 else "server_error"
        response["error"] = {"code": code, "message": fault.message}
        yield self._event("error", code=fault.code, message=fault.message, param=fault.param)
        yield self._event("response.failed", response=response)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        return event

    def _place(self) -> Event:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _begin(self, piece: Piece) -> Iterator[Event]:
        self._open = (piece.kind, piece.call)
        self._logprobs, self._text = [], []
        item: Event = {"id": f"{_ITEM_PREFIX[piece.kind]}{self._head.request_id}_{len(self.output)}"}
        if piece.kind == "call":
            item |= {"type": "function_call", "call_id": piece.call_id, "name": piece.name, "arguments": ""}
        elif piece.kind == "reasoning":
            item |= {"type": "reasoning", "summary": [], "content": []}
        else:
            item |= {"type": "message", "role": "assistant", "content": []}
        self.output.append(item | {"status": "in_progress"})
        yield self._event("response.output_item.added", output_index=len(self.output) - 1, item=dict(self.output[-1]))
        if piece.kind != "call":
            yield self._event(
                "response.content_part.added", **self._place(), content_index=0, part=self._part(piece.kind, "")
            )

    def _part(self, kind: str, text: str) -> Event:
        part: Event = {"type": _PART[kind], "text": text}
        return part | ({"annotations": [], "logprobs": list(self._logprobs)} if kind == "text" else {})

    def _stop(self) -> Iterator[Event]:
        if self._open is None:
            return
        kind, self._open = self._open[0], None
        item, text, place = self.output[-1], "".join(self._text), self._place()
        if kind == "call":
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=text)
        else:
            part = self._part(kind, text)
            item["content"] = [part]
            if kind == "text":
                told = {"text": text, "logprobs": list(self._logprobs)}
                yield self._event("response.output_text.done", **place, content_index=0, **told)
            else:
                yield self._event("response.reasoning_text.done", **place, content_index=0, text=text)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        is_cut = self._end is not None and self._end.finish_reason == "length"
        item["status"] = "incomplete" if is_cut else "completed"
        yield self._event("response.output_item.done", output_index=place["output_index"], item=dict(item))
