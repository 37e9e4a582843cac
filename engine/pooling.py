"""Requests that are answered by numbers and not by tokens: a pooled vector, or log-probabilities of the next token.

Frozen data, standard library only. A vector travels as bytes: float32, little-endian, one behind the other.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import InvalidRequest

MAX_SCORED_TOKENS = 4096  # of one NextToken


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


Numbers = Pooling | NextToken
"""What a request may ask for in the place of tokens."""


def as_floats(vector: bytes) -> tuple[float, ...]:
    """The numbers of a vector as it travels."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)
