"""Grammars in the sampler: which tokens each constrained row may choose, as bits made on the host.

They are made between the launch of the forward and the choice: on a GPU while it computes. What else limits a
constrained row's tokens for good (allowed_token_ids, single bad words, what min_tokens bans) is taken off the same
bits, so that it is known here whether anything is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.core.plan import Sample, SequenceStart
from engine.errors import InvalidRequest
from engine.grammar.compiler import Grammars
from engine.grammar.matcher import Matcher
from engine.request import SamplingParams
from engine.runner.inputs import SampledRow
from engine.to_device import to_device

_Bits = NDArray[np.uint8]
NOTHING_LEFT = "its grammar lets no token follow here that allowed_token_ids, bad_words and stop tokens leave"
_TOO_COMPLEX = "its grammar became too complex to follow"


@dataclass(slots=True)
class _Guide:
    matcher: Matcher
    allowed: _Bits | None  # None: all
    banned: _Bits | None  # until min_tokens, as long as something else is left
    min_tokens: int


class Guides:
    """Where each constrained sequence stands. Used by the step thread alone."""

    def __init__(self, vocab_size: int, device: torch.device, grammars: Grammars | None) -> None:
        self._vocab_size = vocab_size
        self._mask_bytes = (vocab_size + 7) // 8
        self._device = device
        self._grammars = grammars
        self._guides: dict[int, _Guide] = {}
        self._shifts = torch.arange(8, dtype=torch.uint8, device=device)

    def __len__(self) -> int:
        return len(self._guides)

    def open(self, start: SequenceStart, banned: Sequence[int]) -> str | None:
        """Follow a sequence from its output so far on. Returns: why that is not possible."""
        params = start.params
        if params.grammar is None:
            return None
        if self._grammars is None:
            return "this runner was made without grammars"
        try:
            compiled = self._grammars.compiled(params.grammar)  # found: who queued the request holds it
        except InvalidRequest as error:
            return str(error)
        matcher = compiled.matcher(start.output_token_ids)
        off = self._bits(banned) if banned and params.min_tokens else None
        self._guides[start.seq_id] = _Guide(matcher, self._allowed(params), off, params.min_tokens)
        return None

    def close(self, seq_id: int) -> None:
        """Nothing happens if it is not followed."""
        self._guides.pop(seq_id, None)

    def masks(self, rows: Iterable[SampledRow]) -> tuple[Tensor, dict[int, str]]:
        """Which tokens each of K rows may not choose, bool [K, V], and which rows may choose none, with the reason."""
        wanted = list(rows)
        bits = np.full((len(wanted), self._mask_bytes), 255, dtype=np.uint8)
        errors: dict[int, str] = {}
        first = 0
        for seq_id, group in groupby(wanted, key=lambda row: row.seq_id):
            guide, own = self._guides[seq_id], list(group)
            mine = bits[first : first + len(own)]
            guide.matcher.fill(mine, [row.guess for row in own[1:] if row.guess is not None])
            if (error := guide.matcher.error()) is not None:
                errors[first] = f"{_TOO_COMPLEX}: {error}"
            for i, row in enumerate(own):
                if not _limit(mine[i], guide, row.output_position):
                    errors.setdefault(first + i, NOTHING_LEFT)
            first += len(own)
        packed = to_device(torch.from_numpy(~bits), self._device)
        each = (packed[:, :, None] >> self._shifts).bitwise_and_(1).view(torch.bool)
        return each.view(len(wanted), -1)[:, : self._vocab_size], errors

    def took(self, sample: Sample) -> Sample:
        """What the sequence gained: up to the token that ends its answer, and with what its grammar forces next."""
        guide = self._guides.get(sample.seq_id)
        if guide is None or sample.error is not None:
            return sample
        num_taken = guide.matcher.take(sample.token_ids)
        token_ids = sample.token_ids[: max(1, num_taken)]
        logprobs = None if sample.logprobs is None else sample.logprobs[: len(token_ids)]
        is_over = guide.matcher.is_over and guide.matcher.error() is None
        return sample._replace(
            token_ids=token_ids, logprobs=logprobs, is_over=is_over, forced_token_ids=guide.matcher.forced()
        )

    def _allowed(self, params: SamplingParams) -> _Bits | None:
        never = [word[0] for word in params.bad_words_token_ids if len(word) == 1]
        if params.allowed_token_ids is None and not never:
            return None
        allowed = self._bits(params.allowed_token_ids) if params.allowed_token_ids is not None else None
        kept = ~self._bits(never)
        return kept if allowed is None else allowed & kept

    def _bits(self, token_ids: Sequence[int]) -> _Bits:
        flags = np.zeros(self._mask_bytes * 8, dtype=bool)
        flags[list(token_ids)] = True
        return np.packbits(flags, bitorder="little")


def _limit(bits: _Bits, guide: _Guide, output_position: int) -> bool:
    """Take off `bits` what the sequence's parameters do. Returns: whether anything is left."""
    if guide.allowed is not None:
        bits &= guide.allowed
    if not bits.any():
        return False
    if guide.banned is not None and output_position < guide.min_tokens:
        rest = bits & ~guide.banned
        if rest.any():
            bits[:] = rest
    return True
