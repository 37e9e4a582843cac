"""Philox4x32-10: random numbers that are a pure function of a key and a counter.

No state: the number for a token depends on (seed, sample index, output position) alone, so that batch mix, chunking,
preemption and a move to another replica change nothing.

Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); checked against the
known-answer vectors of the authors' Random123 library.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds of the bijection.

    Shapes: counter [..., 4], key [..., 2] -> [..., 4]; int64 tensors holding unsigned 32-bit words.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for i in range(_ROUNDS):
        # An int64 product wraps modulo 2^64, so its bits are those of the unsigned product.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        round_key_0, round_key_1 = (k0 + i * _WEYL_0) & _WORD, (k1 + i * _WEYL_1) & _WORD
        c0, c1, c2, c3 = (
            (product_1 >> 32) & _WORD ^ c1 ^ round_key_0,
            product_1 & _WORD,
            (product_0 >> 32) & _WORD ^ c3 ^ round_key_1,
            product_0 & _WORD,
        )
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(seed: Tensor, sample_index: Tensor, output_position: Tensor) -> Tensor:
    """One number in (0, 1) per row, never 0 or 1, with 52 random bits.

    Key: the 64-bit seed, low word first. Counter: (output_position, sample_index, 0, 0).
    Shapes: three int64 tensors [S] (seeds through `as_int64`) -> float64 [S].
    """
    zero = torch.zeros_like(output_position)
    counter = torch.stack((output_position & _WORD, sample_index & _WORD, zero, zero), dim=-1)
    key = torch.stack((seed & _WORD, (seed >> 32) & _WORD), dim=-1)
    words = philox4x32(counter, key)
    bits = (words[..., 0] << 20) | (words[..., 1] >> 12)
    return (bits.to(torch.float64) + 0.5) * 2.0**-52  # one bit more, and the largest would round to 1


def as_int64(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit seed."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
