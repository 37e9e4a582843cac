"""OpenAI reply bodies, whole and in chunks: pure dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.calls import Fault
from deployments.errors import answer_for
from deployments.http.collect import Sample, Usage
from deployments.http.openai.logprobs import LogprobWriter
from deployments.router.prompts import Prompts
from engine.request import OutputDelta

Kind = Literal["chat", "completion"]
_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
_OBJECT = {"chat": "chat.completion", "completion": "text_completion"}
_CHUNK_OBJECT = {"chat": "chat.completion.chunk", "completion": "text_completion"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What all bodies of one request have in common."""

    kind: Kind
    request_id: str
    created: int
    model: str

    def body(self, *, chunk: bool = False) -> dict[str, Any]:
        name = (_CHUNK_OBJECT if chunk else _OBJECT)[self.kind]
        return {
            "id": _PREFIX[self.kind] + self.request_id,
            "object": name,
            "created": self.created,
            "model": self.model,
        }


def whole(
    head: Head,
    samples: Sequence[dict[int, Sample]],
    usage: Usage,
    prompts: Prompts,
    prompt_ids: Sequence[Sequence[int]],
    echoes: Sequence[str],
) -> dict[str, Any]:
    """The reply of a request that does not stream. `echoes`: text in front of each prompt's samples."""
    choices: list[dict[str, Any]] = []
    for prompt, by_index in enumerate(samples):
        for _, sample in sorted(by_index.items()):
            writer = LogprobWriter(prompts, prompt_ids[prompt], len(echoes[prompt]))
            choices.append(_choice(head.kind, len(choices), sample, writer, echoes[prompt]))
    return {**head.body(), "choices": choices, "usage": usage_body(usage)}


def _choice(kind: Kind, index: int, sample: Sample, writer: LogprobWriter, echo: str) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "finish_reason": str(sample.finish_reason), "logprobs": None}
    if kind == "chat":
        choice["message"] = {"role": "assistant", "content": sample.text, "refusal": None}
        if sample.logprobs:
            choice["logprobs"] = writer.chat(sample.logprobs)
    else:
        choice["text"] = echo + sample.text
        if sample.logprobs:
            choice["logprobs"] = writer.completion(sample.logprobs)
    return choice


def role_chunk(head: Head, index: int) -> dict[str, Any]:
    """The first chunk of a chat choice."""
    delta = {"role": "assistant", "content": ""}
    return _chunk(head, {"index": index, "delta": delta, "logprobs": None, "finish_reason": None})


def echo_chunk(head: Head, index: int, echo: str) -> dict[str, Any]:
    """The first chunk of a completion that echoes its prompt."""
    return _chunk(head, {"index": index, "text": echo, "logprobs": None, "finish_reason": None})


def delta_chunks(head: Head, index: int, delta: OutputDelta, writer: LogprobWriter) -> list[dict[str, Any]]:
    """Chunks of one delta: text, then the end. A delta without either (text is held back) gives none."""
    chunks = []
    finish = None if delta.finish_reason is None else str(delta.finish_reason)
    if head.kind == "chat":
        if delta.text or delta.logprobs:
            logprobs = writer.chat(delta.logprobs) if delta.logprobs else None
            content = {"content": delta.text}
            chunks.append({"index": index, "delta": content, "logprobs": logprobs, "finish_reason": None})
        if finish is not None:
            chunks.append({"index": index, "delta": {}, "logprobs": None, "finish_reason": finish})
    elif delta.text or delta.logprobs or finish is not None:
        logprobs = writer.completion(delta.logprobs) if delta.logprobs else None
        chunks.append({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish})
    return [_chunk(head, chunk) for chunk in chunks]


def usage_chunk(head: Head, usage: Usage) -> dict[str, Any]:
    """The last chunk, with `stream_options.include_usage`."""
    return {**head.body(chunk=True), "choices": [], "usage": usage_body(usage)}


def _chunk(head: Head, choice: dict[str, Any]) -> dict[str, Any]:
    return {**head.body(chunk=True), "choices": [choice]}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def error_body(fault: Fault) -> dict[str, Any]:
    """`{"error": ...}`, the shape of every failure on /v1."""
    answer = answer_for(fault.code)
    code = answer.openai_code or fault.code
    return {"error": {"message": fault.message, "type": answer.openai_type, "param": fault.param, "code": code}}
