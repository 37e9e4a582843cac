"""Log-probabilities as the two OpenAI endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.router.prompts import Prompts
from engine.pooling import PromptToken
from engine.request import TokenLogprobs


class LogprobWriter:
    """Writes the log-probabilities of one sample, delta by delta."""

    def __init__(self, prompts: Prompts, prompt: Sequence[int], text_offset: int = 0, *, as_ids: bool = False) -> None:
        """`as_ids`: tokens are named `token_id:N`, as different ones may have one text."""
        self._as_ids = as_ids
        self._prompts = prompts
        self._previous = prompts.last_with_text(prompt)
        self._offset = text_offset  # characters of text before the next token, for completions

    def chat(self, items: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat completion."""
        content = []
        for item in items:
            entry = self._entry(item.token_id, item.logprob)
            entry["top_logprobs"] = [self._entry(token_id, logprob) for token_id, logprob in item.top]
            content.append(entry)
            self._note(item.token_id)
        return {"content": content, "refusal": None}

    def prompt(self, token_ids: Sequence[int], scores: Sequence[PromptToken], top: int) -> dict[str, Any]:
        """`logprobs` of an echoed prompt: the first token's is null."""
        items = [TokenLogprobs(one.token_id, one.logprob, one.top[:top]) for one in scores]
        told = self.completion([TokenLogprobs(token_ids[0], 0.0), *items])
        told["token_logprobs"][0] = told["top_logprobs"][0] = None
        return told

    def completion(self, items: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`choices[].logprobs` of a completion. `text_offset` counts characters of the tokens' own texts."""
        tokens, offsets, tops = [], [], []
        for item in items:
            token = self._text(item.token_id)
            tokens.append(self._name(item.token_id))
            offsets.append(self._offset)
            tops.append(self._top(item))
            self._offset += len(token)
            self._note(item.token_id)
        return {
            "tokens": tokens,
            "token_logprobs": [item.logprob for item in items],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _note(self, token_id: int) -> None:
        if not self._prompts.is_special(token_id):
            self._previous = token_id

    def _top(self, item: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the chosen one if it is none of them. Of tokens with one text the likeliest."""
        top: dict[str, float] = {}
        for token_id, logprob in (*item.top, (item.token_id, item.logprob)):
            top.setdefault(self._name(token_id), logprob)
        return top

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else self._text(token_id)

    def _text(self, token_id: int) -> str:
        return self._prompts.token_bytes(self._previous, token_id).decode(errors="replace")

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        piece = self._prompts.token_bytes(self._previous, token_id)
        return {"token": self._name(token_id), "logprob": logprob, "bytes": list(piece)}
