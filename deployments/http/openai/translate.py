"""OpenAI bodies to `Ask`s: pure. A missing field means OpenAI's default.

`user` names the tenant for fairness on an open server; with API keys the key does, and `user` is only logged.
"""

from __future__ import annotations

from typing import Any

from deployments.asks import Ask, Chat, Prompt
from deployments.http.openai.schema import ChatRequest, CompletionRequest, Sampling
from engine.errors import InvalidRequest
from engine.request import SamplingParams

COMPLETION_MAX_TOKENS = 16


def chat_ask(body: ChatRequest, model_id: str) -> Ask:
    """Raises: InvalidRequest naming the field."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_completion_tokens", "it contradicts max_tokens; send one of the two")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", "it needs logprobs=true")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    messages = tuple(message.model_dump(exclude_none=True) for message in body.messages)
    return _ask(body, model_id, (Chat(messages),), _params(body, max_tokens, logprobs), "messages")


def completion_ask(body: CompletionRequest, model_id: str) -> Ask:
    """Raises: InvalidRequest naming the field."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of", f"best_of={body.best_of} must equal n={body.n or 1}; choose among n yourself")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest("echo", "with logprobs it would need those of the prompt; send one of the two")
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _ask(body, model_id, _prompts(body.prompt), _params(body, max_tokens, body.logprobs), "prompt")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise InvalidRequest("prompt", "the list is empty; send at least one prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in prompt)


def _ask(body: Sampling, model_id: str, prompts: tuple[Prompt, ...], params: SamplingParams, prompt_param: str) -> Ask:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "it needs stream=true")
    adapter = None if body.model == model_id else body.model
    if adapter is None and body.adapter_source is not None:
        raise InvalidRequest("adapter_source", f"model {body.model!r} is the base; name an adapter in model")
    return Ask(
        prompts=prompts,
        params=params,
        adapter=adapter,
        adapter_source=body.adapter_source,
        cache_salt=body.cache_salt or "",
        user=body.user or "",
        prompt_param=prompt_param,
    )


def _params(body: Sampling, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    optional: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": 0 if body.top_k == -1 else body.top_k,  # -1: all, as elsewhere
        "min_p": body.min_p,
        "n": body.n,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "prompt_lookup_num_tokens": body.prompt_lookup_num_tokens,
        "include_stop_str_in_output": body.include_stop_str_in_output,
    }
    return SamplingParams(
        max_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        seed=None if body.seed is None else body.seed % 2**64,
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=logprobs,
        **{name: value for name, value in optional.items() if value is not None},
    )


def _logit_bias(biases: dict[str, float]) -> dict[int, float]:
    for key in biases:
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequest("logit_bias", f"{key!r} is not a token id; keys are token ids as strings")
    return {int(key): bias for key, bias in biases.items()}
