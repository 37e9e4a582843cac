"""LoRAX reply bodies and stream events: pure dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.calls import Fault
from deployments.errors import answer_for
from deployments.http.collect import Sample
from deployments.router.prompts import Prompts
from engine.pooling import PromptToken
from engine.request import FinishReason, TokenLogprobs


class TokenWriter:
    """Tokens of one sample with their texts: put together, the texts are the sample's text."""

    def __init__(self, prompts: Prompts, prompt: Sequence[int], *, alternatives: bool) -> None:
        self._prompts = prompts
        self._detokenizer = prompts.detokenizer(prompt)
        self._alternatives = alternatives
        self._previous = prompts.last_with_text(prompt)

    def tokens(self, items: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """One body per token. A character spread over tokens belongs to its last one."""
        bodies = []
        for item in items:
            special = self._prompts.is_special(item.token_id)
            body: dict[str, Any] = {
                "id": item.token_id,
                "text": self._text(item.token_id) if special else self._detokenizer.push(item.token_id),
                "logprob": item.logprob,
                "special": special,
                "skipped": False,
            }
            if self._alternatives:
                body["alternative_tokens"] = [
                    {"id": token_id, "text": self._text(token_id), "logprob": logprob} for token_id, logprob in item.top
                ]
            bodies.append(body)
            self._previous = self._previous if special else item.token_id
        return bodies

    def _text(self, token_id: int) -> str:
        return self._prompts.token_bytes(self._previous, token_id).decode(errors="replace")


def finish_reason(sample: Sample) -> str:
    """LoRAX's word for the end of a sample."""
    if sample.finish_reason is FinishReason.LENGTH:
        return "length"
    return "stop_sequence" if isinstance(sample.stop_reason, str) else "eos_token"


def details(sample: Sample, num_prompt_tokens: int, seed: int | None) -> dict[str, Any]:
    """`details` of a stream's last event; a whole reply adds its tokens."""
    return {
        "finish_reason": finish_reason(sample),
        "prompt_tokens": num_prompt_tokens,
        "generated_tokens": len(sample.token_ids),
        "skipped_tokens": 0,
        "seed": seed,
    }


def prefill(prompts: Prompts, token_ids: Sequence[int], scores: Sequence[PromptToken]) -> list[dict[str, Any]]:
    """The prompt's tokens; nothing is said of the first."""
    logprobs = [None, *(one.logprob for one in scores)]
    previous: int | None = None
    told = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        text = prompts.token_bytes(previous, token_id).decode(errors="replace")
        told.append({"id": token_id, "text": text, "logprob": logprob})
        previous = previous if prompts.is_special(token_id) else token_id
    return told


def reply(text: str, asked_details: dict[str, Any] | None) -> dict[str, Any]:
    """The reply of /generate."""
    return {"generated_text": text, "details": asked_details}


def sequence(sample: Sample, text: str, seed: int | None, tokens: list[dict[str, Any]]) -> dict[str, Any]:
    """One of `best_of_sequences`."""
    return {
        "generated_text": text,
        "finish_reason": finish_reason(sample),
        "generated_tokens": len(sample.token_ids),
        "seed": seed,
        "prefill": [],
        "tokens": tokens,
    }


def error_body(fault: Fault) -> dict[str, Any]:
    """`{"error", "error_type"}`; the message names the field."""
    named = fault.param is None or fault.param in fault.message
    message = fault.message if named else f"`{fault.param}`: {fault.message}"
    return {"error": message, "error_type": answer_for(fault.code).lorax_type}
