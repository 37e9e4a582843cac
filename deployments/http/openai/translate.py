"""OpenAI bodies to `Ask`s: pure. A missing field means the model's default, if its folder names one, else OpenAI's.

`user` names the tenant for fairness on an open server; with API keys the key does, and `user` is only logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deployments.asks import Ask, Chat, Prompt, adapter_of
from deployments.http.openai.formats import grammar_of
from deployments.http.openai.messages import as_template_takes_it
from deployments.http.openai.schema import ChatRequest, CompletionRequest, Sampling
from deployments.http.openai.tools import Reading, forced_grammar
from engine.errors import InvalidRequest
from engine.request import SamplingParams

COMPLETION_MAX_TOKENS = 16

Defaults = Mapping[str, Any]
NO_DEFAULTS: Defaults = {}


def chat_ask(
    body: ChatRequest,
    model_id: str,
    defaults: Defaults = NO_DEFAULTS,
    reading: Reading | None = None,
    args: Mapping[str, Any] | None = None,
) -> Ask:
    """`reading`: how answers are read; `args`: what the template gets. Raises: InvalidRequest naming the field."""
    reading = reading or Reading()
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise InvalidRequest("max_completion_tokens", "it contradicts max_tokens; send one of the two")
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "it needs logprobs=true")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    short_ids = reading.dialect.short_ids
    messages = tuple(as_template_takes_it(message, short_ids=short_ids) for message in body.messages)
    params = _params(body, max_tokens, logprobs, defaults)
    if (forced := forced_grammar(body, reading)) is not None:
        if params.grammar is not None:
            raise InvalidRequest("tool_choice", f"a call is required, and {params.grammar.field} asks for another form")
        params = replace(params, grammar=forced)
    if reading.hidden:
        params = replace(params, skip_special_tokens=False)
    return _ask(body, model_id, (Chat(messages, {**(args or {}), **_endings(body)}),), params, "messages")


def _endings(body: ChatRequest) -> dict[str, bool]:
    """How the prompt ends. Raises: InvalidRequest."""
    if not body.continue_final_message:
        return {} if body.add_generation_prompt is not False else {"add_generation_prompt": False}
    if body.add_generation_prompt:
        raise InvalidRequest("continue_final_message", "it contradicts add_generation_prompt; send one of the two")
    last = body.messages[-1]
    if last.role != "assistant" or last.tool_calls:
        raise InvalidRequest(
            "continue_final_message", f"the last message is of role {last.role!r}; send an assistant's text last"
        )
    return {"add_generation_prompt": False, "continue_final_message": True}


def completion_ask(body: CompletionRequest, model_id: str, defaults: Defaults = NO_DEFAULTS) -> Ask:
    """Raises: InvalidRequest naming the field."""
    if body.best_of is not None and body.best_of < (body.n or 1):
        raise InvalidRequest("best_of", f"best_of={body.best_of} is less than n={body.n or 1}; send no less")
    if body.best_of is not None and body.best_of > (body.n or 1) and body.stream:
        raise InvalidRequest("best_of", "the best of several are known at the end; send stream=false, or n")
    max_tokens = COMPLETION_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    params = _params(body, max_tokens, body.logprobs, defaults)
    if body.best_of is not None and body.best_of > params.n:  # the likeliest are told by their log-probabilities
        params = replace(params, n=body.best_of, logprobs=params.logprobs or 0)
    return _ask(body, model_id, body.prompt, params, "prompt")


def _check_nothing(body: Sampling) -> None:
    """Raises: InvalidRequest where no tokens are asked for, and nothing else either."""
    echoes = isinstance(body, CompletionRequest) and bool(body.echo)
    if body.prompt_logprobs is None and not echoes:
        raise InvalidRequest("max_tokens", "0 tokens are nothing; send at least 1, or echo or prompt_logprobs too")
    if body.stream:
        raise InvalidRequest("max_tokens", "0 tokens are no stream; send stream=false, or at least 1")
    if body.min_tokens:
        raise InvalidRequest("min_tokens", f"{body.min_tokens} is more than max_tokens=0; leave it out")


def _ask(body: Sampling, model_id: str, prompts: tuple[Prompt, ...], params: SamplingParams, prompt_param: str) -> Ask:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "it needs stream=true")
    if body.rid is not None and body.request_id not in (None, body.rid):
        raise InvalidRequest("rid", "it contradicts request_id; send one of the two")
    adapter = adapter_of(body.model, model_id)
    if body.lora_path is not None:  # SGLang's: the adapter, beside a model that names the base or the adapter too
        if adapter not in (None, adapter_of(body.lora_path, model_id)):
            raise InvalidRequest("lora_path", f"{body.lora_path!r} is not model={body.model!r}; send one of the two")
        adapter = adapter_of(body.lora_path, model_id)
    if adapter is None and body.adapter_source is not None:
        raise InvalidRequest("adapter_source", f"model {body.model!r} is the base; name an adapter in model")
    return Ask(
        prompts=prompts,
        params=params,
        adapter=adapter,
        adapter_source=body.adapter_source,
        cache_salt=body.cache_salt or "",
        cache_key=body.prompt_cache_key or "",
        priority=body.priority or 0,
        bad_words=tuple(body.bad_words or ()),
        add_special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        user=body.safety_identifier or body.user or "",
        request_id=body.request_id or body.rid or "",
        prompt_param=prompt_param,
    )


def _params(body: Sampling, max_tokens: int | None, logprobs: int | None, defaults: Defaults) -> SamplingParams:
    optional: dict[str, Any] = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "n": body.n,
        "repetition_penalty": body.repetition_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "min_tokens": body.min_tokens,
        "ignore_eos": body.ignore_eos,
        "prompt_lookup_num_tokens": body.prompt_lookup_num_tokens,
        "include_stop_str_in_output": body.include_stop_str_in_output or body.no_stop_trim,
        "typical_p": body.typical_p,
        "allowed_token_ids": body.allowed_token_ids,
        "skip_special_tokens": body.skip_special_tokens,
        "grammar": grammar_of(body),
    }
    given = {name: value for name, value in optional.items() if value is not None}
    if body.skip_special_tokens is False and body.spaces_between_special_tokens is False:
        says = "with skip_special_tokens=false the text is what the tokenizer writes; leave it out"
        raise InvalidRequest("spaces_between_special_tokens", says)
    penalty = defaults.get("repetition_penalty", 1.0)
    if body.prompt_lookup_num_tokens and penalty != 1.0 and body.repetition_penalty is None:
        says = f"the model's generation_config.json says repetition_penalty={penalty:g}, which changes with every token"
        raise InvalidRequest("prompt_lookup_num_tokens", f"{says}; send repetition_penalty=1 too, or leave it out")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("prompt_logprobs", "they are part of a whole reply; send stream=false")
    if max_tokens == 0:
        _check_nothing(body)
    return SamplingParams(
        max_tokens=1 if max_tokens == 0 else max_tokens,  # of 0 nothing is asked of a replica
        stop=body.stop or (),
        stop_token_ids=body.stop_token_ids or (),
        seed=None if body.seed is None else body.seed % 2**64,
        logit_bias=body.logit_bias or {},
        logprobs=logprobs,
        **{**defaults, **given},
    )
