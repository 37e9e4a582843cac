"""What is asked of the engine and what it answers: plain frozen data, standard library only."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sized
from copy import copy
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from reprlib import Repr
from typing import Any, NamedTuple

from engine.errors import InvalidRequest
from engine.grammar.spec import GrammarSpec
from engine.pooling import Numbers

MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024  # of one stop string
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024  # tokens
MAX_ALLOWED_TOKEN_IDS = 65_536
MAX_BAD_WORDS = 256  # token sequences that may not occur in the output
MAX_BAD_WORD_TOKENS = 64  # of one
MAX_NAME_CHARS = 1024  # of request ids, tenants, salts and adapter keys
MAX_TOP_K = 2**31 - 1  # more than any vocabulary
MAX_SEED = 2**64 - 1
MAX_PRIORITY = 2**31 - 1  # either way
MAX_LOOKUP_TOKENS = 64
MAX_REPETITION_PENALTY = 1e6  # a float32 logit times it is finite

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80


class FinishReason(StrEnum):
    """Why a sequence ended. Each sequence ends exactly once."""

    STOP = "stop"  # an end-of-sequence token, a stop token or a stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORT = "abort"  # the caller went away
    ERROR = "error"  # it failed; the output's `error` says how


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Immutable; a value out of range raises `InvalidRequest` naming the field.

    Order of application: logit_bias, repetition / presence / frequency penalties, grammar, allowed_token_ids,
    bad_words_token_ids, min_tokens, temperature, top_k, top_p, min_p, typical_p, then one uniform number keyed by
    (seed, sample index, output position).
    """

    max_tokens: int | None = 16  # None: until the model's context is full
    min_tokens: int = 0  # before this many tokens no end-of-sequence or stop token may be chosen
    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all; -1 says the same, as elsewhere, and becomes 0
    top_p: float = 1.0  # 0: the most likely token
    min_p: float = 0.0  # relative to the most likely token
    typical_p: float = 1.0  # mass of the tokens whose information is nearest to the expected (arXiv 2202.00666); 1: all
    repetition_penalty: float = 1.0  # > 1 discourages tokens of the prompt and the output (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # once per distinct output token
    frequency_penalty: float = 0.0  # per occurrence in the output
    seed: int | None = None  # None: the engine draws one
    n: int = 1  # samples of the same prompt
    stop: tuple[str, ...] = ()  # also of special tokens' names, e.g. "<|im_end|>"
    skip_special_tokens: bool = True  # False: their names are part of the text
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    allowed_token_ids: tuple[int, ...] | None = None  # no other token is chosen; None: all are allowed
    bad_words_token_ids: tuple[
        tuple[int, ...], ...
    ] = ()  # no token is chosen that completes one of these in the output
    logprobs: int | None = None  # None: none; k: of the chosen token and of the k most likely
    grammar: GrammarSpec | None = None  # what the whole output must be; None: anything
    prompt_lookup_num_tokens: int = 0  # guessed ahead from earlier text, at most: speed, never text. Not with penalties
    # What logit_bias says as int64 ids and float32 biases, written once, where a request is made: not on a step.
    packed_bias: tuple[array[int], array[float]] = field(init=False, repr=False, compare=False)
    packed_allowed: array[int] = field(init=False, repr=False, compare=False)  # empty: all are

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        stop_token_ids = _token_ids("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequest("logit_bias", f"{_brief(self.logit_bias)} does not map token ids to numbers")
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIAS, "tokens")
        _token_ids("logit_bias", tuple(self.logit_bias), MAX_LOGIT_BIAS)
        self._check_tokens()
        if not isinstance(self.grammar, GrammarSpec | None):
            raise InvalidRequest("grammar", f"{_brief(self.grammar)} is not a GrammarSpec")
        self._check_reals()
        if type(self.top_k) is int and self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        self._check_counts()
        biases = {i: float(bias) for i, bias in self.logit_bias.items()}
        object.__setattr__(self, "logit_bias", biases)
        object.__setattr__(self, "packed_bias", (array("q", biases), array("f", biases.values())))

    def _check_tokens(self) -> None:
        """Which tokens may be chosen at all."""
        if self.allowed_token_ids is not None:
            allowed = _token_ids("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
            if not allowed:
                raise InvalidRequest("allowed_token_ids", "the list is empty; name at least one token, or leave it out")
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(allowed)))
        object.__setattr__(self, "packed_allowed", array("q", self.allowed_token_ids or ()))
        words = _items("bad_words_token_ids", self.bad_words_token_ids, MAX_BAD_WORDS, "bad words")
        words = tuple(_token_ids("bad_words_token_ids", word, MAX_BAD_WORD_TOKENS) for word in words)
        if not all(words):
            raise InvalidRequest("bad_words_token_ids", "a bad word has no tokens; leave it out")
        if self.allowed_token_ids is not None and {(i,) for i in self.allowed_token_ids} <= set(words):
            raise InvalidRequest("bad_words_token_ids", "they are all that allowed_token_ids allows; allow others too")
        object.__setattr__(self, "bad_words_token_ids", tuple(dict.fromkeys(words)))

    def _check_counts(self) -> None:
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, None)
        _whole("min_tokens", self.min_tokens, 0, self.max_tokens)
        _whole("top_k", self.top_k, 0, MAX_TOP_K)
        _whole("n", self.n, 1, MAX_N)
        _whole("prompt_lookup_num_tokens", self.prompt_lookup_num_tokens, 0, MAX_LOOKUP_TOKENS)
        if self.prompt_lookup_num_tokens and (self.has_penalties or self.has_bad_phrases):
            other = (
                "repetition, presence or frequency penalties" if self.has_penalties else "bad words of several tokens"
            )
            raise InvalidRequest(
                "prompt_lookup_num_tokens",
                f"{self.prompt_lookup_num_tokens} cannot be combined with {other}, which change with every token; "
                "set it to 0 or leave them out",
            )
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _whole("seed", self.seed, 0, MAX_SEED)
        for name, flag in (
            ("ignore_eos", self.ignore_eos),
            ("skip_special_tokens", self.skip_special_tokens),
            ("include_stop_str_in_output", self.include_stop_str_in_output),
        ):
            if not isinstance(flag, bool):
                raise InvalidRequest(name, f"{_brief(flag)} is neither True nor False")

    def _check_reals(self) -> None:
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("typical_p", self.typical_p, 0.0, 1.0, exclusive_low=True)
        _real("repetition_penalty", self.repetition_penalty, 0.0, MAX_REPETITION_PENALTY, exclusive_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        for token_id, bias in self.logit_bias.items():
            _real("logit_bias", bias, -100.0, 100.0, what=f"bias of token {token_id}")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def has_bad_phrases(self) -> bool:
        """Whether what may be chosen depends on the last tokens of the output."""
        return any(len(word) > 1 for word in self.bad_words_token_ids)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _whole(param: str, value: object, low: int, high: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(param, f"value {_brief(value)} is not a whole number")
    if value < low or (high is not None and value > high):
        closing = "inf)" if high is None else f"{_brief(high)}]"
        raise InvalidRequest(param, f"value {_brief(value)} is outside [{low}, {closing}")


def _real(
    param: str, value: object, low: float, high: float, *, exclusive_low: bool = False, what: str = "value"
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidRequest(param, f"{what} {_brief(value)} is not a number")
    if not low <= value <= high or (exclusive_low and value == low):
        opening = "(" if exclusive_low else "["
        raise InvalidRequest(param, f"{what} {_brief(value)} is outside {opening}{low}, {high}]")


def _brief(value: object) -> str:
    """The value as it is written, cut where nobody would read on (Python refuses to write out the largest numbers)."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"of {value.bit_length()} bits"
    return str(value) if isinstance(value, int | float) else _REPR.repr(value)


def _at_most(param: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise InvalidRequest(param, f"{count} {what}, the limit is {limit}; send fewer")


def _items(param: str, values: object, limit: int | None = None, what: str = "entries") -> tuple[Any, ...]:
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise InvalidRequest(param, f"{_brief(values)} is not a list")
    if limit is not None and isinstance(values, Sized):
        _at_most(param, len(values), limit, what)
    items = tuple(values if limit is None else islice(values, limit + 1))
    if limit is not None and len(items) > limit:
        raise InvalidRequest(param, f"more than {limit} {what}, which is the limit; send fewer")
    return items


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _items("stop", stop, MAX_STOP_STRINGS, "stop strings")
    for text in strings:
        if not isinstance(text, str) or not text:
            raise InvalidRequest("stop", f"{_brief(text)} is not a stop string: it must be a non-empty string")
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(
                "stop", f"a stop string has {len(text)} characters, the limit is {MAX_STOP_CHARS}; send a shorter one"
            )
    return strings


def _token_ids(param: str, values: object, limit: int | None = None) -> tuple[int, ...]:
    """A tuple of ints; whether the model has such tokens is the engine's to say."""
    token_ids = _items(param, values, limit, "token ids")
    if not set(map(type, token_ids)) <= {int}:
        wrong = next(i for i in token_ids if type(i) is not int)
        raise InvalidRequest(param, f"{_brief(wrong)} is a {type(wrong).__name__}, not a token id")
    if token_ids and max(max(token_ids), -min(token_ids)).bit_length() > 63:
        raise InvalidRequest(param, "a number of more than 63 bits is no token id of any model")
    return token_ids


def _name(param: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidRequest(param, f"{_brief(value)} is not a string")
    if len(value) > MAX_NAME_CHARS:
        raise InvalidRequest(param, f"{len(value)} characters, the limit is {MAX_NAME_CHARS}; send a shorter one")


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
    priority: int = 0  # of those of one tenant that wait, the lowest is first; it changes nothing between tenants
    sample_index: int = 0  # of the first sample; the others follow
    resumed_output_token_ids: tuple[int, ...] = ()  # only with params.n == 1
    numbers: Numbers | None = None  # what it is answered by in the place of tokens; then params.n is 1

    def __post_init__(self) -> None:
        """Raises: InvalidRequest naming a field of the wrong type: nothing later looks at types any more."""
        for name in ("prompt_token_ids", "resumed_output_token_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        if not isinstance(self.params, SamplingParams):
            raise InvalidRequest("params", f"{_brief(self.params)} is not a SamplingParams")
        if self.numbers is not None:
            self._check_numbers(self.numbers)
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("sample_index", self.sample_index, 0, 2**32 - 1)
        _whole("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        for name in ("request_id", "tenant", "cache_salt"):
            _name(name, getattr(self, name))
        if self.adapter is not None:
            if not (isinstance(self.adapter, str) and self.adapter):
                raise InvalidRequest(
                    "adapter", f"{_brief(self.adapter)} is not the key of an adapter version; None: the base"
                )
            _name("adapter", self.adapter)

    def _check_numbers(self, numbers: object) -> None:
        if not isinstance(numbers, Numbers):
            raise InvalidRequest("numbers", f"{_brief(numbers)} is neither a Pooling, a NextToken nor PromptScores")
        if self.params.n != 1:
            raise InvalidRequest("n", f"{self.params.n} samples, but a request for numbers has one answer; set n to 1")
        if self.params.prompt_lookup_num_tokens or self.params.grammar is not None:
            field = "prompt_lookup_num_tokens" if self.params.grammar is None else self.params.grammar.field
            raise InvalidRequest(field, "a request for numbers has no output tokens; leave it out")
        if self.resumed_output_token_ids:
            raise InvalidRequest("resumed_output_token_ids", "a request for numbers has no output tokens to go on from")

    def renamed(self, request_id: str) -> Request:
        """The same under another id. What was checked is not looked at again: that would cost as much as the prompt."""
        other = copy(self)
        object.__setattr__(other, "request_id", request_id)
        return other


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


class OutputDelta(NamedTuple):
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
    queue_s: float = 0.0  # before the first step of its request; told once, in the request's first delta
    vector: bytes | None = None  # the answer to `Request.numbers`, in the only delta
