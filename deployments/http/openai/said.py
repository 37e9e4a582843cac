"""What one choice of a chat said: text, reasoning, calls, as the fields of a message or of a stream's deltas."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deployments.dialects.dialect import AnswerReader
from deployments.dialects.events import Arguments, Begin, Event, Reasoning, Text
from deployments.http.openai.tools import Reading
from engine.request import FinishReason, OutputDelta

_LETTERS = string.ascii_letters + string.digits


class Said:
    """Reads one choice. `deltas` as it comes; what was told so far, put together, is `message`."""

    def __init__(self, reading: Reading, prompt_end: str) -> None:
        self._reading = reading
        self._reader: AnswerReader | None = reading.reader(prompt_end)
        self._held_reasoning = ""  # until it ends, if it is to come at once
        self.num_calls = 0
        self.reasoning_tokens = 0
        self._is_reasoning = False
        self._message: dict[str, Any] = {}
        self._calls: list[dict[str, Any]] = []

    @property
    def is_plain(self) -> bool:
        """Its text is its content."""
        return self._reader is None

    def deltas(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """What `delta` adds to the message, in order."""
        if self._reader is None:
            return [{"content": delta.text}] if delta.text else []
        events = self._reader.push(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            events += self._reader.finish()
        told = [self._note(part) for event in events for part in self._told(event)]
        if self._is_reasoning:
            self.reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and self._held_reasoning:
            told.append(self._note(self._reasoned(self._held_reasoning)))
        return told

    def finish_reason(self, reason: FinishReason) -> str:
        """As a chat tells it."""
        return "tool_calls" if self.num_calls and reason is FinishReason.STOP else str(reason)

    def message(self) -> dict[str, Any]:
        """All that was told."""
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None, **self._message}
        if self._calls:
            message["tool_calls"] = self._calls
        elif message["content"] is None:
            message["content"] = ""
        return message

    def _told(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Reasoning):
            self._is_reasoning = True
            if self._reading.tells_reasoning and self._reading.streams_reasoning:
                yield self._reasoned(event.text)
            elif self._reading.tells_reasoning:
                self._held_reasoning += event.text
            return
        self._is_reasoning = False
        if self._held_reasoning:
            yield self._reasoned(self._held_reasoning)
            self._held_reasoning = ""
        if isinstance(event, Text):
            yield {"content": event.text}
        elif isinstance(event, Begin):
            function = {"name": event.name, "arguments": ""}
            call = {"index": self.num_calls, "id": self._call_id(event), "type": "function", "function": function}
            self.num_calls += 1
            yield {"tool_calls": [call]}
        elif isinstance(event, Arguments):
            yield {"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": event.text}}]}

    def _reasoned(self, text: str) -> dict[str, Any]:
        """By both names that clients read."""
        return {"reasoning_content": text, "reasoning": text}

    def _call_id(self, event: Begin) -> str:
        if event.call_id is not None:
            return event.call_id
        if self._reading.dialect.short_ids:
            return "".join(secrets.choice(_LETTERS) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"

    def _note(self, told: dict[str, Any]) -> dict[str, Any]:
        for name, value in told.items():
            if name != "tool_calls":
                self._message[name] = (self._message.get(name) or "") + value
                continue
            for part in value:
                if part["index"] == len(self._calls):
                    whole = {"id": part["id"], "type": "function", "function": dict(part["function"])}
                    self._calls.append(whole)
                else:
                    self._calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        return told


def reader_of(said: Sequence[Said]) -> Callable[[OutputDelta], object] | None:
    """Of the deltas of all choices; None: their text is their content."""
    if all(one.is_plain for one in said):
        return None
    return lambda delta: said[delta.sample_index].deltas(delta)
