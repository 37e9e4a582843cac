"""Reasoning between `<think>` and `</think>`, as R1, Qwen 3, QwQ and many others write it."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.dialects.events import Event, Reader, Reasoning, Text, overlap

OPENING, CLOSING = "<think>", "</think>"


def is_open(prompt_end: str) -> bool:
    """Whether a prompt ends inside of reasoning: templates may begin it for the model."""
    return prompt_end.rfind(OPENING) > prompt_end.rfind(CLOSING)


class ThinkReader(Reader):
    """Reasoning comes first, if it comes. Line breaks around it are part of neither it nor the answer."""

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the prompt has begun it."""
        super().__init__()
        self._where = "reasoning" if is_open else "start"
        self._lines = ""  # line breaks at the end of the reasoning so far
        self._is_first = True  # nothing but line breaks yet, of what is being read

    def _read(self, *, final: bool) -> Iterator[Event]:
        if self._where == "start":
            held = self._held.lstrip()
            if held.startswith(OPENING):
                self._held, self._where = held[len(OPENING) :], "reasoning"
            elif final or not (held == "" or overlap(held, OPENING) == len(held)):
                self._where, self._is_first = "text", False
            else:
                return
        if self._where == "reasoning":
            text, is_over = self._until(CLOSING, final=final)
            yield from self._reasoned(text)
            if is_over:
                self._where, self._is_first = "text", True
        if self._where == "text" and self._held:
            text = self._take(len(self._held))
            text = text.lstrip("\n") if self._is_first else text
            if text:
                self._is_first = False
                yield Text(text)

    def _reasoned(self, text: str) -> Iterator[Event]:
        joined = self._lines + text
        joined = joined.lstrip("\n") if self._is_first else joined
        said = joined.rstrip("\n")
        self._lines = joined[len(said) :]
        if said:
            self._is_first = False
            yield Reasoning(said)
