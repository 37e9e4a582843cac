"""What is refused when a request arrives, because it could never run: with the value, the limit and the remedy."""

from __future__ import annotations

from engine.core.adapter_slots import AdapterSlots
from engine.core.limits import SchedulerConfig
from engine.errors import AdapterError, AdapterTooLarge, InvalidRequest, PromptTooLong
from engine.pooling import NextToken, Pooling
from engine.request import Request


def check_request(request: Request, config: SchedulerConfig, slots: AdapterSlots) -> None:
    """Raises: InvalidRequest, PromptTooLong, AdapterError, AdapterTooLarge."""
    check_lengths(request, config)
    if request.adapter is not None:
        _check_adapter(request.adapter, slots)


def check_tokens(request: Request, config: SchedulerConfig, vocab_size: int, hidden_size: int) -> None:
    """Lengths, and then whether the model has such tokens. `hidden_size`: of its vectors; 0: not known.

    Raises: InvalidRequest, PromptTooLong.
    """
    check_lengths(request, config)
    params, numbers = request.params, request.numbers
    if isinstance(numbers, Pooling) and (numbers.dimensions or 0) > hidden_size > 0:
        raise InvalidRequest("dimensions", f"{numbers.dimensions}, but the model's vectors have {hidden_size}")
    for param, token_ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("resumed_output_token_ids", request.resumed_output_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", tuple(params.logit_bias)),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("bad_words_token_ids", tuple(i for word in params.bad_words_token_ids for i in word)),
        ("token_ids", numbers.token_ids if isinstance(numbers, NextToken) else ()),
    ):
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= vocab_size):
            wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
            raise InvalidRequest(param, f"token id {wrong} is outside the vocabulary [0, {vocab_size - 1}]")


def check_lengths(request: Request, config: SchedulerConfig) -> None:
    """What is refused without a look at any token. Raises: InvalidRequest, PromptTooLong."""
    _check_prompt(request, config)
    _check_resumed(request, config)


def max_tokens_total(request: Request, config: SchedulerConfig) -> int:
    """Tokens of prompt and output with which a sequence of this request ends by LENGTH."""
    if request.numbers is not None:  # it ends by its answer; the token behind its prompt is never there
        return len(request.prompt_token_ids) + 1
    limit = config.max_sequence_tokens
    if request.params.max_tokens is not None:
        limit = min(limit, len(request.prompt_token_ids) + request.params.max_tokens)
    return limit


def _check_prompt(request: Request, config: SchedulerConfig) -> None:
    num_tokens = len(request.prompt_token_ids)
    if num_tokens == 0:
        raise InvalidRequest("prompt_token_ids", "the prompt has no tokens; it needs at least 1")
    num_more = 1 if request.numbers is None else 0
    if num_tokens + num_more > config.max_model_len:
        needs = " and needs room for at least 1 more" if num_more else ""
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens{needs}, but max_model_len is "
            f"{config.max_model_len}; shorten the prompt to {config.max_model_len - num_more} tokens"
        )
    max_blocks = config.max_kv_tokens // config.block_size
    if num_tokens > config.max_kv_tokens:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens and needs {-(-num_tokens // config.block_size)} KV blocks of "
            f"{config.block_size} tokens, but there are {max_blocks}; shorten the prompt to "
            f"{config.max_kv_tokens} tokens or raise kv_cache_bytes"
        )
    if not config.enable_chunked_prefill and num_tokens > config.max_num_batched_tokens:
        raise PromptTooLong(
            f"the prompt has {num_tokens} tokens and must be computed in one step, but max_num_batched_tokens is "
            f"{config.max_num_batched_tokens}; shorten the prompt, raise max_num_batched_tokens or set "
            "enable_chunked_prefill"
        )


def _check_resumed(request: Request, config: SchedulerConfig) -> None:
    num_resumed = len(request.resumed_output_token_ids)
    if not num_resumed:
        return
    if request.params.n != 1:
        raise InvalidRequest(
            "resumed_output_token_ids", f"given with n={request.params.n}; resume each sample as a request with n=1"
        )
    num_allowed = max_tokens_total(request, config) - len(request.prompt_token_ids)
    if num_resumed > num_allowed:
        raise InvalidRequest(
            "resumed_output_token_ids",
            f"{num_resumed} tokens, but max_tokens, max_model_len and the KV cache allow {num_allowed} output tokens",
        )


def _check_adapter(key: str, slots: AdapterSlots) -> None:
    if key not in slots:
        raise AdapterError(f"adapter {key!r} is not known to this engine; add_adapter() must come before the request")
    if slots.num_slots == 0:
        raise AdapterTooLarge(f"adapter {key!r} cannot be used: max_resident_adapters is 0, which turns LoRA off")
    room = slots.room
    if slots.size(key) > room.budget:
        raise AdapterTooLarge(
            f"adapter {key!r} has {slots.size(key)} {room.unit}, but adapter_bytes is {room.budget} {room.unit}; "
            "raise adapter_bytes (in pages: and kv_cache_bytes) or use a smaller rank"
        )
    if not slots.could_fit(key):
        raise AdapterTooLarge(
            f"adapter {key!r} has {slots.size(key)} {room.unit}, which find no room in {room.budget} {room.unit} "
            f"beside the pinned adapters {', '.join(map(repr, slots.kept()))}; unpin one of them"
        )
