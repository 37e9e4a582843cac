"""Requests that are answered by numbers and not by tokens: a pooled vector, or log-probabilities of the next token.

Frozen data, standard library only. A vector travels as bytes: float32, little-endian, one behind the other.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from engine.errors import InvalidRequest

MAX_SCORED_TOKENS = 4096  # of one NextToken
MAX_TOP = 20  # of PromptScores; ids are float32 numbers, exact below 2^24


class Pool(StrEnum):
    """Which of a prompt's hidden states (after the final norm, as transformers' last of `hidden_states`) count."""

    LAST = "last"  # the last token's
    MEAN = "mean"  # the mean over all tokens
    CLS = "cls"  # the first token's


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """One vector for the whole prompt: `hidden` numbers, or the first `dimensions` of them.

    Normalised to length 1 after it was cut, unless `normalize` is False. Raises: InvalidRequest naming the field.
    """

    pool: Pool = Pool.LAST
    normalize: bool = True
    dimensions: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pool, str) or self.pool not in tuple(Pool):
            known = ", ".join(Pool)
            raise InvalidRequest("pool", f"{self.pool!r} is none of the ways to pool: {known}")
        object.__setattr__(self, "pool", Pool(self.pool))
        if not isinstance(self.normalize, bool):
            raise InvalidRequest("normalize", f"{self.normalize!r} is neither True nor False")
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequest("dimensions", f"{self.dimensions!r} is not a whole number from 1 on")

    @property
    def needs_all_rows(self) -> bool:
        """Whether hidden states of other tokens than the last count: those of a cached prefix are not kept."""
        return self.pool is not Pool.LAST


@dataclass(frozen=True, slots=True)
class PoolingDefaults:
    """What a request for a vector means that says nothing, and what it may say."""

    pool: Pool = Pool.LAST
    normalize: bool = True
    # Whether the first numbers of a vector are a vector of fewer dimensions (arXiv 2205.13147), and of which numbers.
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()  # empty: any
    refusal: str = ""  # why no vectors can be had of this model

    def pooling(
        self, dimensions: int | None = None, pool: Pool | None = None, normalize: bool | None = None
    ) -> Pooling:
        """Raises: InvalidRequest: `dimensions` if this model's vectors must not be cut so, `model` if it has none."""
        if self.refusal:
            raise InvalidRequest("model", f"no vectors are made of this model: {self.refusal}")
        if dimensions is not None:
            if not self.is_matryoshka:
                raise InvalidRequest(
                    "dimensions", f"{dimensions}: this model was not trained for vectors that are cut; leave it out"
                )
            if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
                known = ", ".join(map(str, self.matryoshka_dimensions))
                raise InvalidRequest("dimensions", f"{dimensions} is none of this model's: {known}")
        return Pooling(
            pool=self.pool if pool is None else pool,
            normalize=self.normalize if normalize is None else normalize,
            dimensions=dimensions,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """Log-probabilities (natural) of `token_ids` as the token behind the prompt, in their order.

    Of the model itself: before temperature, penalties and filters. Raises: InvalidRequest (`token_ids`).
    """

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.token_ids) > MAX_SCORED_TOKENS:
            count = len(self.token_ids)
            raise InvalidRequest("token_ids", f"{count} token ids, it must be 1 to {MAX_SCORED_TOKENS}")
        if not set(map(type, self.token_ids)) <= {int}:
            wrong = next(i for i in self.token_ids if type(i) is not int)
            raise InvalidRequest("token_ids", f"{wrong!r} is a {type(wrong).__name__}, not a token id")
        object.__setattr__(self, "token_ids", tuple(self.token_ids))

    @property
    def needs_all_rows(self) -> bool:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptScores:
    """What the model says of each token of the prompt but the first: `width` numbers each, one token behind the other.

    Its log-probability (natural), its rank (1: the likeliest), then the ids of the `top` likeliest tokens and their
    log-probabilities, the likeliest first. Of the model itself: before temperature, penalties and filters.
    Raises: InvalidRequest (`prompt_logprobs`).
    """

    top: int = 0

    def __post_init__(self) -> None:
        if type(self.top) is not int or not 0 <= self.top <= MAX_TOP:
            raise InvalidRequest("prompt_logprobs", f"{self.top!r} is not a whole number from 0 to {MAX_TOP}")

    @property
    def needs_all_rows(self) -> bool:
        return True

    @property
    def width(self) -> int:
        return 2 + 2 * self.top


Numbers = Pooling | NextToken | PromptScores
"""What a request may ask for in the place of tokens."""


def as_floats(vector: bytes) -> tuple[float, ...]:
    """The numbers of a vector as it travels."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


class PromptToken(NamedTuple):
    """What the model says of one token of a prompt."""

    token_id: int
    logprob: float
    rank: int  # 1: the likeliest
    top: tuple[tuple[int, float], ...]  # (token id, log-probability) of the likeliest, best first


def prompt_tokens(vector: bytes, asked: PromptScores, token_ids: Sequence[int]) -> tuple[PromptToken, ...]:
    """The answer to `asked` of a prompt of `token_ids`, whose first token nothing is said of."""
    numbers, width = as_floats(vector), asked.width
    if len(numbers) != width * max(0, len(token_ids) - 1):
        raise ValueError(f"{len(numbers)} numbers are none for {len(token_ids)} tokens of {width}")
    found = []
    for index, token_id in enumerate(token_ids[1:]):
        logprob, rank, *rest = numbers[index * width : (index + 1) * width]
        ids, values = rest[: asked.top], rest[asked.top :]
        top = tuple((int(i), value) for i, value in zip(ids, values, strict=True))
        found.append(PromptToken(token_id, logprob, int(rank), top))
    return tuple(found)
