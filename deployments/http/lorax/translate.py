"""LoRAX bodies to `Ask`s: pure.

As in LoRAX, a request samples when it says `do_sample` or sets a temperature other than 1, `top_k` or `top_p`; else it
is greedy. The model's own defaults fill in what a request that samples leaves out, and a repetition penalty always;
they make no request sample that would not. A stop sequence stays in the text. `best_of` runs as many samples and keeps
the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deployments.asks import Ask
from deployments.http.lorax.schema import GenerateRequest, Parameters
from engine.errors import InvalidRequest
from engine.request import MAX_LOGPROBS, SamplingParams

_OUR_NAMES = {"max_tokens": "max_new_tokens", "n": "best_of", "logprobs": "return_k_alternatives"}


def generate_ask(body: GenerateRequest, model_id: str, defaults: Mapping[str, Any], *, stream: bool) -> Ask:
    """`defaults`: of the model, where the request gives none. Raises: InvalidRequest naming the field as LoRAX does."""
    asked = body.parameters or Parameters()
    try:
        params = _params(asked, stream, defaults)
    except InvalidRequest as error:
        raise InvalidRequest(_OUR_NAMES.get(error.param, error.param), error.message) from error
    adapter = asked.adapter_id or None
    return Ask(
        prompts=(body.inputs,),
        params=params,
        adapter=None if adapter == model_id else adapter,
        adapter_source=asked.adapter_source if adapter else None,
        truncate=asked.truncate,
        prompt_param="inputs",
        model_param="adapter_id",
    )


def samples(asked: Parameters) -> bool:
    """Whether tokens are drawn, not taken greedily."""
    if asked.temperature == 0:
        return False
    warped = asked.temperature not in (None, 1.0) or asked.top_k is not None or asked.top_p not in (None, 1.0)
    return bool(asked.do_sample) or warped


def _params(asked: Parameters, stream: bool, defaults: Mapping[str, Any]) -> SamplingParams:
    sampled = samples(asked)
    best_of = asked.best_of or 1
    if best_of > 1 and stream:
        raise InvalidRequest("best_of", f"best_of={best_of} cannot be streamed; leave it out")
    if best_of > 1 and not sampled:
        raise InvalidRequest("best_of", f"best_of={best_of} needs sampling; set do_sample")
    if best_of > 1 and asked.seed is not None:
        raise InvalidRequest("best_of", f"best_of={best_of} excludes a seed; leave one out")
    alternatives = asked.return_k_alternatives or 0
    if alternatives > MAX_LOGPROBS:
        raise InvalidRequest("logprobs", f"{alternatives} is more than {MAX_LOGPROBS}")
    wants_logprobs = stream or bool(asked.details) or best_of > 1
    optional: dict[str, Any] = {
        "temperature": asked.temperature,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "ignore_eos": asked.ignore_eos_token,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    choices = {"temperature": 1.0, **defaults, **given}
    if not sampled:
        choices["temperature"] = 0.0
    return SamplingParams(
        max_tokens=asked.max_new_tokens,
        n=best_of,
        seed=asked.seed,
        stop=asked.stop or (),
        include_stop_str_in_output=True,
        logprobs=alternatives if wants_logprobs else None,
        **choices,
    )
