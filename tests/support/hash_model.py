"""How the model of the KV-checking device talks: every token is a hash of all that it depends on."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

EOS = 2
STOP = 3
FIRST_WORD = 10
NUM_WORDS = 1000
ROOT = 17  # what the first token of a sequence finds before it


def adapter_digest(adapter: str | None) -> int:
    return 0 if adapter is None else zlib.crc32(adapter.encode())


@dataclass(frozen=True)
class Habits:
    """How the model of this device talks."""

    end_percent: int = 0  # chance of a token that ends the text
    echo_percent: int = 0  # chance of a word of the prompt, in its order: what prompt lookup guesses


PLAIN = Habits()


def next_digest(before: Sequence[int], token: int, key: int, window: int | None) -> int:
    """What the slot of a token holds: of all tokens before it by the last slot, or of those in its window by theirs."""
    if window is None:
        return hash((before[-1] if before else ROOT, token, key))
    return hash((ROOT, tuple(before[max(0, len(before) - window + 1) :]), token, key))


def choose_token(
    digests: Sequence[int],
    prompt: Sequence[int],
    seed: int,
    sample_index: int,
    outputs: Sequence[int],
    min_tokens: int,
    habits: Habits,
) -> int:
    """The next token: a pure function of what was read and of what the sampler remembers."""
    value = hash((tuple(digests), seed, sample_index, tuple(outputs), len(outputs)))
    if len(outputs) >= min_tokens and value % 101 < habits.end_percent:
        return EOS if value % 2 else STOP
    if (value >> 8) % 100 < habits.echo_percent:
        return prompt[len(outputs) % len(prompt)]
    return FIRST_WORD + (value >> 16) % NUM_WORDS


def vector_of(digests: Sequence[int]) -> bytes:
    """What a request for numbers is answered, which depends on all of these rows."""
    return repr(hash(tuple(digests))).encode()


def expected_vector(prompt: Sequence[int], adapter: str | None, *, all_rows: bool, window: int | None = None) -> bytes:
    """The oracle: the vector of one prompt alone."""
    digests: list[int] = []
    for token in prompt:
        digests.append(next_digest(digests, token, adapter_digest(adapter), window))
    return vector_of(digests if all_rows else digests[-1:])


def expected_tokens(
    prompt: Sequence[int],
    adapter: str | None,
    seed: int,
    sample_index: int,
    num_tokens: int,
    *,
    end_ids: Collection[int] = (),
    min_tokens: int = 0,
    habits: Habits = PLAIN,
    window: int | None = None,
) -> list[int]:
    """The oracle: the output of one sequence alone."""
    outputs: list[int] = []
    digests: list[int] = []
    while len(outputs) < num_tokens and not (len(outputs) > min_tokens and outputs[-1] in end_ids):
        for token in [*prompt, *outputs][len(digests) :]:
            digests.append(next_digest(digests, token, adapter_digest(adapter), window))
        read = digests if window is None else digests[-window:]
        outputs.append(choose_token(read, prompt, seed, sample_index, outputs, min_tokens, habits))
    return outputs
