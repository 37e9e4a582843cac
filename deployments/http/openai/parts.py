"""What a chat's reply is made of, piece by piece: for the APIs that tell the same in other words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple


class Piece(NamedTuple):
    """Text that goes on with the block of its kind, or begins one. A call's text is its arguments as JSON."""

    kind: Literal["reasoning", "text", "call"]
    text: str
    call: int = 0  # which call it belongs to
    call_id: str | None = None  # of a call that begins
    name: str | None = None
    logprobs: tuple[Mapping[str, Any], ...] = ()  # of its tokens, as chats tell them


class End(NamedTuple):
    """Nothing follows."""

    finish_reason: str
    stop_reason: str | int | None  # the stop string or token that ended it


def pieces(choice: Mapping[str, Any]) -> Iterator[Piece | End]:
    """Of a choice of a chat's reply or of one of its chunks, in the order in which the model wrote them."""
    said: Mapping[str, Any] = choice.get("delta") or choice.get("message") or {}
    if reasoning := said.get("reasoning_content") or said.get("reasoning"):
        yield Piece("reasoning", reasoning)
    logprobs = tuple((choice.get("logprobs") or {}).get("content") or ())
    if said.get("content") or logprobs:
        yield Piece("text", said.get("content") or "", logprobs=logprobs)
    for place, call in enumerate(said.get("tool_calls") or ()):
        function = call.get("function") or {}
        yield Piece(
            "call", function.get("arguments") or "", call.get("index", place), call.get("id"), function.get("name")
        )
    if choice.get("finish_reason") is not None:
        yield End(choice["finish_reason"], choice.get("stop_reason"))
