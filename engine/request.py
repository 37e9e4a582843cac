"""What is asked of the engine and what it answers: plain frozen data, standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from engine.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16


class FinishReason(StrEnum):
    """Why a sequence ended. Each sequence ends exactly once."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # it failed; the output's `error` says how


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Immutable; a value out of range raises `InvalidRequest` naming the field.

    Order of application: logit_bias, repetition / presence / frequency penalties, min_tokens, temperature,
    top_k, top_p, min_p, then one uniform number keyed by (seed, sample index, output position).
    """

    max_tokens: int | None = 16  # None: until the model's context is full
    min_tokens: int = 0  # before this many tokens no end-of-sequence or stop token may be chosen
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most likely token
    repetition_penalty: float = 1.0  # > 1 discourages tokens of the prompt and the output (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # once per distinct output token
    frequency_penalty: float = 0.0  # per occurrence in the output
    seed: int | None = None  # None: the engine draws one
    n: int = 1  # samples of the same prompt
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k most likely

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in self.logit_bias.items()})
        self._check_counts()
        self._check_reals()

    def _check_counts(self) -> None:
        _in_range("max_tokens", self.max_tokens, 1, None)
        _in_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _in_range("top_k", self.top_k, 0, None)
        _in_range("n", self.n, 1, MAX_N)
        _in_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _in_range("seed", self.seed, 0, 2**64 - 1)
        _in_range("stop", len(self.stop), 0, MAX_STOP_STRINGS, what="number of stop strings")
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidRequest("stop", "a stop string must be a non-empty string")

    def _check_reals(self) -> None:
        _in_range("temperature", self.temperature, 0.0, 100.0)
        _in_range("top_p", self.top_p, 0.0, 1.0, exclusive_low=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, None, exclusive_low=True)
        _in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _in_range("logit_bias", bias, -100.0, 100.0, what=f"bias of token {token_id}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _in_range(
    param: str,
    value: float | None,
    low: float,
    high: float | None,
    *,
    exclusive_low: bool = False,
    what: str = "value",
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidRequest(param, f"{what} {value!r} is not a finite number")
    if value < low or (exclusive_low and value == low) or (high is not None and value > high):
        opening = "(" if exclusive_low else "["
        closing = "inf)" if high is None else f"{high}]"
        raise InvalidRequest(param, f"{what} {value} is outside {opening}{low}, {closing}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue, `params.n` times.

    Every token of the answer is a function of (weights, adapter version, prompt, params, seed, sample index, output
    position). So a request that was cut off goes on elsewhere from `resumed_output_token_ids`: they count as output
    (penalties, min_tokens, max_tokens, stop strings), never as a longer prompt.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int  # drawn by the router when the caller gave none
    adapter: str | None = None  # key of an adapter version (never a name); None: the base model
    tenant: str = ""  # fairness is between tenants; "" falls back to the adapter
    cache_salt: str = ""  # prefix blocks are shared only between equal salts
    sample_index: int = 0  # of the first sample; the others follow
    resumed_output_token_ids: tuple[int, ...] = ()  # only with params.n == 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one chosen token under the model (before temperature and filters), natural log."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob) of the most likely, best first


@dataclass(frozen=True, slots=True)
class OutputError:
    """Why a sequence ended with FinishReason.ERROR: a stable code and a sentence."""

    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDelta:
    """What one sample gained since its last delta: one item of a stream.

    `text` is UTF-8 safe and never holds anything beyond a stop string: concatenated deltas are the full text.
    The last delta of a sample has `finish_reason` set; exactly one delta of each sample has.
    """

    request_id: str
    sample_index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token id, when asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    error: OutputError | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
