"""Fields that other servers have and clients of theirs send: taken where they ask for what is done anyway.

Clients write defaults out. A default that is our only behaviour passes, and is named in `x-chorus-inert`; another value
is refused, with what to send instead.
"""

from __future__ import annotations

from typing import Annotated, Any

from deployments.http.openai.formats import Formats
from deployments.http.wire import inert, refused

_BEAMS = "beams; set n and temperature"


class Foreign(Formats):
    """Of both endpoints."""

    # OpenAI's, which concern what is stored, charged or cached there.
    metadata: Annotated[dict[str, Any] | None, inert("nothing is stored")] = None
    prompt_cache_retention: Annotated[str | None, inert("prefixes are kept while there is room")] = None
    store: Annotated[Any, refused("nothing is stored; leave it out or send false", False)] = None
    service_tier: Annotated[Any, refused("there is one tier", "auto", "default")] = None
    # vLLM's.
    spaces_between_special_tokens: Annotated[bool | None, inert("the tokenizer says what is between them")] = None
    use_beam_search: Annotated[Any, refused(_BEAMS, False)] = None
    length_penalty: Annotated[Any, refused(_BEAMS, 1.0)] = None
    early_stopping: Annotated[Any, refused(_BEAMS, False)] = None
    logits_processors: Annotated[Any, refused("programs in requests", [])] = None
    kv_transfer_params: Annotated[Any, refused("prompt and answer are computed in one place")] = None
    mm_processor_kwargs: Annotated[Any, refused("text only", {})] = None
    # SGLang's.
    return_hidden_states: Annotated[Any, refused("hidden states", False)] = None


class ForeignChat(Foreign):
    """Of /v1/chat/completions."""

    functions: Annotated[Any, refused("functions", [])] = None
    function_call: Annotated[Any, refused("functions", "none")] = None
    modalities: Annotated[Any, refused("text only", ["text"])] = None
    audio: Annotated[Any, refused("text only")] = None
    prediction: Annotated[Any, refused("predicted outputs; prompt_lookup_num_tokens guesses from the prompt")] = None
    verbosity: Annotated[Any, refused("reasoning models", "medium")] = None
    web_search_options: Annotated[Any, refused("web search")] = None
    # vLLM's and SGLang's.
    best_of: Annotated[Any, refused("send n and choose yourself", 1)] = None
    echo: Annotated[Any, refused("the messages are yours already", False)] = None
    chat_template: Annotated[Any, refused("templates in requests; the model has one")] = None
    enable_thinking: Annotated[Any, refused("an argument of chat templates, in chat_template_kwargs elsewhere")] = None


class ForeignCompletion(Foreign):
    """Of /v1/completions."""

    suffix: Annotated[Any, refused("insertion; put everything into prompt", "")] = None
