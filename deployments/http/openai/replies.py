"""OpenAI reply bodies, whole and in chunks: pure dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from deployments.calls import Fault
from deployments.errors import answer_for
from deployments.http.collect import Sample, Usage
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.said import Said
from deployments.router.prompts import Prompts
from engine.pooling import PromptToken
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
    include_usage: bool = False  # chunks have a field `usage`: null, but in the last
    continuous_usage: bool = False  # and in none it is null
    token_ids: bool = False  # of prompts and of answers, beside the texts
    tokens_as_ids: bool = False  # log-probabilities name tokens by their ids

    def body(self, *, chunk: bool = False) -> dict[str, Any]:
        name = (_CHUNK_OBJECT if chunk else _OBJECT)[self.kind]
        return {
            "id": _PREFIX[self.kind] + self.request_id,
            "object": name,
            "created": self.created,
            "model": self.model,
        }


Ids = Sequence[int]


@dataclass(frozen=True, slots=True)
class Echo:
    """What stands in front of a completion's samples: its prompt, and if asked for what the model says of it."""

    text: str = ""
    scores: tuple[PromptToken, ...] | None = None
    top: int = 0  # of the likeliest tokens, how many are told

    def writer(self, head: Head, prompts: Prompts, prompt_ids: Ids) -> tuple[LogprobWriter, dict[str, Any] | None]:
        """For the log-probabilities of a sample behind it, and its own."""
        if self.scores is None:
            return LogprobWriter(prompts, prompt_ids, len(self.text), as_ids=head.tokens_as_ids), None
        writer = LogprobWriter(prompts, (), as_ids=head.tokens_as_ids)
        return writer, writer.prompt(prompt_ids, self.scores, self.top)


NO_ECHO = Echo()


def whole(
    head: Head,
    samples: Sequence[dict[int, Sample]],
    usage: Usage,
    prompts: Prompts,
    prompt_ids: Sequence[Ids],
    echoes: Sequence[Echo],
    said: Sequence[Said] = (),
) -> dict[str, Any]:
    """The reply of a request that does not stream. `echoes`: what is in front of each prompt's samples.

    `said`: of a chat, a reader for each choice.
    """
    choices: list[dict[str, Any]] = []
    for prompt, by_index in enumerate(samples):
        for _, sample in sorted(by_index.items()):
            writer, echoed = echoes[prompt].writer(head, prompts, prompt_ids[prompt])
            reader = said[len(choices)] if said else None
            choice = _choice(head.kind, len(choices), sample, writer, echoes[prompt].text, reader)
            if echoed is not None:
                own = choice["logprobs"]
                choice["logprobs"] = echoed if own is None else {name: echoed[name] + own[name] for name in echoed}
            if head.token_ids:
                choice["token_ids"] = sample.token_ids
                if head.kind == "completion":
                    choice["prompt_token_ids"] = list(prompt_ids[prompt])
            choices.append(choice)
    body = {**head.body(), "choices": choices, "usage": usage_body(usage, said)}
    if head.token_ids and head.kind == "chat":
        body["prompt_token_ids"] = list(prompt_ids[0])
    return body


def _choice(
    kind: Kind, index: int, sample: Sample, writer: LogprobWriter, echo: str, said: Said | None
) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index, "finish_reason": str(sample.finish_reason), "logprobs": None}
    if kind == "chat":
        choice["message"] = {"role": "assistant", "content": sample.text, "refusal": None}
        if said is not None and not said.is_plain and sample.finish_reason is not None:
            choice["message"] = said.message()
            choice["finish_reason"] = said.finish_reason(sample.finish_reason)
        if sample.logprobs:
            choice["logprobs"] = writer.chat(sample.logprobs)
    else:
        choice["text"] = echo + sample.text
        if sample.logprobs:
            choice["logprobs"] = writer.completion(sample.logprobs)
    choice["stop_reason"] = sample.stop_reason
    return choice


def first_chunks(
    head: Head, index: int, echo: str, prompt_ids: Ids, usage: Usage, echoed: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Before a choice's first token: the role of a chat, the echo of a completion, the prompt's token ids if asked.

    `echoed`: log-probabilities of the echo.
    """
    choice: dict[str, Any] = {"index": index, "logprobs": echoed, "finish_reason": None}
    if head.kind == "chat":
        chunk = _chunk(head, {**choice, "delta": {"role": "assistant", "content": ""}}, usage)
        return [chunk | {"prompt_token_ids": list(prompt_ids)} if head.token_ids else chunk]
    if head.token_ids:
        ids = {"token_ids": [], "prompt_token_ids": list(prompt_ids)}
        return [_chunk(head, {**choice, "text": echo, **ids}, usage)]
    return [_chunk(head, {**choice, "text": echo}, usage)] if echo else []


def delta_chunks(
    head: Head, index: int, delta: OutputDelta, writer: LogprobWriter, usage: Usage, said: Said | None = None
) -> list[dict[str, Any]]:
    """Chunks of one delta: text, then the end. A delta without either (text is held back) gives none.

    `usage`: so far, this delta included. `said`: of a chat, the choice's reader.
    """
    chunks: list[dict[str, Any]] = []
    has_news = bool(delta.text or delta.logprobs or (head.token_ids and delta.token_ids))
    finish = None if delta.finish_reason is None else str(delta.finish_reason)
    if head.kind == "chat":
        told = [{"content": delta.text}] if said is None else said.deltas(delta)
        if has_news and not told and (delta.logprobs or head.token_ids):
            told = [{"content": ""}]  # what its tokens say is held back, or part of nothing
        for at, part in enumerate(told if has_news or delta.finish_reason is not None else ()):
            logprobs = writer.chat(delta.logprobs) if delta.logprobs and at == 0 else None
            chunks.append({"index": index, "delta": part, "logprobs": logprobs, "finish_reason": None})
        if said is not None and delta.finish_reason is not None:
            finish = said.finish_reason(delta.finish_reason)
        if finish is not None:
            end = {"index": index, "delta": {}, "logprobs": None, "finish_reason": finish}
            chunks.append({**end, "stop_reason": delta.stop_reason})
    elif has_news or finish is not None:
        logprobs = writer.completion(delta.logprobs) if delta.logprobs else None
        stop = {} if finish is None else {"stop_reason": delta.stop_reason}
        chunks.append({"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": finish, **stop})
    if head.token_ids:
        for at, chunk in enumerate(chunks):
            chunk["token_ids"] = list(delta.token_ids) if at == 0 and has_news else []
    return [_chunk(head, chunk, usage) for chunk in chunks]


def usage_chunk(head: Head, usage: Usage, said: Sequence[Said] = ()) -> dict[str, Any]:
    """The last chunk, with `stream_options.include_usage`."""
    return {**head.body(chunk=True), "choices": [], "usage": usage_body(usage, said)}


def _chunk(head: Head, choice: dict[str, Any], usage: Usage) -> dict[str, Any]:
    body = {**head.body(chunk=True), "choices": [choice]}
    if head.continuous_usage:
        body["usage"] = usage_body(usage)
    elif head.include_usage:
        body["usage"] = None
    return body


def usage_body(usage: Usage, said: Sequence[Said] = ()) -> dict[str, Any]:
    """With the tokens of reasoning among the others, where a model has some."""
    thought = sum(reader.reasoning_tokens for reader in said)
    details = {"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}
    return {
        **details,
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
