"""What every API is translated to: prompts, parameters, an adapter. Plain data, no HTTP, no engine objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.calls import Part
from engine.pooling import Numbers
from engine.request import SamplingParams


def adapter_of(model: str, model_id: str) -> str | None:
    """The adapter that a body's `model` means: ADAPTER, or BASE:ADAPTER as some clients write it. None: the base."""
    name = model.removeprefix(f"{model_id}:")
    return None if model == model_id else name or model


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, as the model's chat template takes it."""

    messages: tuple[Mapping[str, Any], ...]
    args: Mapping[str, Any] = field(default_factory=dict)  # what the template gets beside them: tools, its variables


Prompt = str | tuple[int, ...] | Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One HTTP request after its fields were checked."""

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    adapter: str | None = None
    adapter_source: str | None = None
    parts: tuple[Part, ...] = ()  # several adapters as one; then `adapter` is None
    cache_salt: str = ""
    cache_key: str = ""  # what prompts are said to have in common: equal ones go to one replica while it has room
    priority: int = 0  # within the tenant, the lowest first
    bad_words: tuple[str, ...] = ()  # texts that no answer holds; their tokens go into `params`
    add_special_tokens: bool | None = None  # None: as usual, of a text yes, of a conversation no
    user: str = ""
    request_id: str = ""  # the caller's own; "": one is drawn
    numbers: Numbers | None = None  # what each prompt is answered by in the place of tokens
    truncate: int | None = None  # keep the last so many prompt tokens
    prompt_param: str = "prompt"  # what the API calls the prompt, for error messages
    model_param: str = "model"  # and the adapter
