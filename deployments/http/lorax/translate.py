"""LoRAX bodies to `Ask`s: pure.

As in LoRAX, a request samples when it says `do_sample` or sets a temperature other than 1, `top_k`, `top_p` or
`typical_p`; else it is greedy. The model's own defaults fill in what a request that samples leaves out, and a
repetition penalty always; they make no request sample that would not. A stop sequence stays in the text. `best_of` runs
as many samples and keeps the likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deployments.asks import Ask, Chat, Prompt
from deployments.calls import Part, Refused
from deployments.http.limits import MAX_MESSAGES, MAX_OTHER_VALUES
from deployments.http.lorax.schema import AdapterChoice, EmbedRequest, GenerateRequest, Parameters, ResponseFormat
from deployments.http.openai.formats import json_spec
from deployments.http.openai.messages import Message, as_template_takes_it
from deployments.http.reading import read_json
from engine.errors import InvalidRequest
from engine.grammar.spec import GrammarSpec
from engine.pooling import Pooling
from engine.request import MAX_LOGPROBS, SamplingParams

_OUR_NAMES = {"max_tokens": "max_new_tokens", "n": "best_of", "logprobs": "return_k_alternatives"}


# What LoRAX calls a kind of source, and what settings call it.
_KINDS = {"local": "file", "s3": "s3", "hub": "hub"}
_PREDIBASE = "'pbase' is Predibase's own registry, which is not read here; copy the adapter into a configured source"
_MESSAGES: TypeAdapter[list[Message]] = TypeAdapter(list[Message])


def generate_ask(
    body: GenerateRequest, model_id: str, defaults: Mapping[str, Any], sources: Mapping[str, str], *, stream: bool
) -> Ask:
    """`defaults`: of the model, where the request gives none. `sources`: names of sources and their kinds.

    Raises: InvalidRequest naming the field as LoRAX does.
    """
    asked = body.parameters or Parameters()
    try:
        params = _params(asked, stream, defaults)
    except InvalidRequest as error:
        raise InvalidRequest(_OUR_NAMES.get(error.param, error.param), error.message) from error
    prompt = _conversation(body.inputs) if asked.apply_chat_template else body.inputs
    return _ask(prompt, params, asked, model_id, sources, truncate=asked.truncate)


def embed_ask(body: EmbedRequest, model_id: str, sources: Mapping[str, str], pooling: Pooling) -> Ask:
    """As `generate_ask`."""
    params = SamplingParams(max_tokens=1)
    return _ask(body.inputs, params, body.parameters or AdapterChoice(), model_id, sources, numbers=pooling)


def _ask(
    prompt: Prompt,
    params: SamplingParams,
    asked: AdapterChoice,
    model_id: str,
    sources: Mapping[str, str],
    *,
    truncate: int | None = None,
    numbers: Pooling | None = None,
) -> Ask:
    parts = parts_of(asked, model_id, sources)
    merged = asked.merged_adapters is not None
    return Ask(
        prompts=(prompt,),
        params=params,
        adapter=None if merged or not parts else parts[0].name,
        adapter_source=None if merged or not parts else parts[0].source,
        parts=parts if merged else (),
        numbers=numbers,
        truncate=truncate,
        prompt_param="inputs",
        model_param="merged_adapters" if merged else "adapter_id",
    )


def parts_of(asked: AdapterChoice, model_id: str, sources: Mapping[str, str]) -> tuple[Part, ...]:
    """The adapters that are asked for, none for the base. Raises: InvalidRequest."""
    merged = asked.merged_adapters
    name = asked.adapter_id or None
    source = source_of(asked.adapter_source, sources)
    if merged is None:
        return () if name in (None, model_id) else (Part(name=str(name), source=source),)
    if name is not None:
        raise InvalidRequest("merged_adapters", f"adapter_id={name!r} is given too; send one of the two")
    if len(merged.ids) != len(merged.weights):
        counts = f"{len(merged.weights)} weights for {len(merged.ids)} ids"
        raise InvalidRequest("merged_adapters", f"{counts}; send one for each")
    try:
        return tuple(
            Part(name=each, source=source, weight=weight)
            for each, weight in zip(merged.ids, merged.weights, strict=True)
        )
    except InvalidRequest as error:
        raise InvalidRequest("merged_adapters", f"weights: {error.message}") from error


def source_of(asked: str | None, sources: Mapping[str, str]) -> str | None:
    """The configured source that `asked` means: by its name, or by LoRAX's word for its kind if there is one of it.

    Raises: InvalidRequest.
    """
    if asked is None or asked in sources:
        return asked
    if asked == "pbase":
        raise InvalidRequest("adapter_source", _PREDIBASE)
    of_kind = [name for name, kind in sources.items() if kind == _KINDS.get(asked)]
    if len(of_kind) > 1:
        raise InvalidRequest("adapter_source", f"{asked!r} may be {' or '.join(map(repr, of_kind))}; send its name")
    return of_kind[0] if of_kind else asked  # what is not configured is refused where sources are known


def _conversation(inputs: str) -> Prompt:
    """A JSON list of messages is a conversation, as LoRAX takes it; any other text is what a user says.

    Raises: InvalidRequest for messages that are none.
    """
    try:
        value = read_json(inputs.encode(errors="replace"), MAX_OTHER_VALUES) if inputs.lstrip()[:1] == "[" else None
    except Refused:
        value = None
    if not (isinstance(value, list) and value and all(isinstance(each, dict) and "role" in each for each in value)):
        return Chat(({"role": "user", "content": inputs},))
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest(
            "inputs", f"a conversation of {len(value)} messages, the limit is {MAX_MESSAGES}; send fewer"
        )
    try:
        messages = _MESSAGES.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequest(
            "inputs", f"a conversation whose messages[{where}] cannot be read: {first['msg']}"
        ) from None
    return Chat(tuple(map(as_template_takes_it, messages)))


def samples(asked: Parameters) -> bool:
    """Whether tokens are drawn, not taken greedily."""
    if asked.temperature == 0:
        return False
    warped = asked.temperature not in (None, 1.0) or asked.top_k is not None or asked.top_p not in (None, 1.0)
    warped = warped or asked.typical_p not in (None, 1.0)
    return bool(asked.do_sample) or warped


def wants_details(asked: Parameters) -> bool:
    """`decoder_input_details` are part of the details."""
    return bool(asked.details) or bool(asked.decoder_input_details)


def _grammar(asked: ResponseFormat | None) -> GrammarSpec | None:
    """Raises: InvalidRequest."""
    if asked is None or asked.type == "text":
        if asked is not None and asked.schema_ is not None:
            raise InvalidRequest("response_format.schema", "it is no part of type 'text'; leave it out")
        return None
    if asked.type == "json_schema" and asked.schema_ is None:
        raise InvalidRequest("response_format.schema", "it is missing; send it, or type 'json_object'")
    return json_spec(asked.schema_, "response_format")


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
    wants_logprobs = stream or wants_details(asked) or best_of > 1
    optional: dict[str, Any] = {
        "temperature": asked.temperature,
        "top_k": asked.top_k,
        "top_p": asked.top_p,
        "typical_p": asked.typical_p,
        "repetition_penalty": asked.repetition_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "presence_penalty": asked.presence_penalty,
        "ignore_eos": asked.ignore_eos_token,
        "grammar": _grammar(asked.response_format),
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
