"""The sampling parameters of a batch, gathered into tensors once and kept while the batch stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.request import SamplingParams, TokenLogprobs
from engine.runner.choice import Filters, top_logprobs
from engine.runner.phrases import Phrases
from engine.to_device import to_device, upload


@dataclass(frozen=True, slots=True)
class SequenceSampling:
    """What the sampler keeps of one sequence."""

    params: SamplingParams
    seed: int  # as int64
    sample_index: int
    banned_token_ids: tuple[int, ...]  # until params.min_tokens
    history: int | None  # row in the TokenHistory
    error: str | None  # its parameters do not fit the model: each sample fails
    tail: int | None = None  # row in the OutputTails


class Rows:
    """Some rows of a batch. Taking all of them copies nothing."""

    def __init__(self, rows: list[int], num_rows: int, device: torch.device) -> None:
        self.rows = tuple(rows)
        self.index = upload(rows, device)
        self._all = len(rows) == num_rows

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, x: Tensor) -> Tensor:
        return x if self._all else x[self.index]


class BatchParams:
    """Parameters of the rows of a batch. Shapes: S rows; tensors of parameters have one element per row they are for.

    Every row is in exactly one of `greedy`, `plain` (temperature alone) and `filtered`.
    """

    def __init__(self, seq_ids: tuple[int, ...], sequences: list[SequenceSampling], device: torch.device) -> None:
        self.seq_ids = seq_ids
        self._device = device
        self._params = [s.params for s in sequences]
        self.errors = {row: s.error for row, s in enumerate(sequences) if s.error is not None}
        rows = range(len(sequences))
        self.greedy = self._rows([i for i in rows if self._params[i].greedy])
        self.random = self._rows([i for i in rows if not self._params[i].greedy])
        self.plain = self._rows([i for i in self.random.rows if not _filtered(self._params[i])])
        self.filtered = self._rows([i for i in self.random.rows if _filtered(self._params[i])])
        self.penalised = self._rows([i for i in rows if sequences[i].history is not None])
        self.logprobs = self._rows([i for i in rows if self._params[i].logprobs is not None])
        self._gather_random(sequences)
        self._gather_changes(sequences)

    def _rows(self, rows: list[int]) -> Rows:
        return Rows(rows, len(self._params), self._device)

    def _gather_random(self, sequences: list[SequenceSampling]) -> None:
        drawn = [sequences[i] for i in self.random.rows]
        self.seeds = self._ints([s.seed for s in drawn])
        self.sample_index = self._ints([s.sample_index for s in drawn])
        self.plain_temperature = self._filters(self.plain).temperature
        self.filters = self._filters(self.filtered)

    def _gather_changes(self, sequences: list[SequenceSampling]) -> None:
        """What changes logits: biases, penalties, bans."""
        packed = [(i, *p.packed_bias) for i, p in enumerate(self._params) if i not in self.errors and p.packed_bias[0]]
        biased = [(i, torch.frombuffer(ids, dtype=torch.int64)) for i, ids, _ in packed]
        self.bias_rows, self.bias_token_ids = self._pairs(biased)
        biases = [torch.frombuffer(values, dtype=torch.float32) for _, _, values in packed]
        self.biases = to_device(torch.cat(biases), self._device) if biases else self._reals([])
        punished = [sequences[i] for i in self.penalised.rows]
        self.history = self._ints([s.history for s in punished if s.history is not None])
        self.repetition = self._reals([s.params.repetition_penalty for s in punished])
        self.presence = self._reals([s.params.presence_penalty for s in punished])
        self.frequency = self._reals([s.params.frequency_penalty for s in punished])
        self._bans = [
            (i, s.params.min_tokens, torch.tensor(s.banned_token_ids, dtype=torch.int64))
            for i, s in enumerate(sequences)
            if s.params.min_tokens and s.banned_token_ids and s.params.grammar is None
        ]
        self._banned: tuple[list[int], tuple[Tensor, Tensor]] | None = None  # the rows it is for, and the pairs
        self._gather_choices(sequences)
        self.changes_logits = bool(
            packed or punished or self.guided or self._bans or self.limited or len(self.never[0]) or self.phrased
        )

    def _gather_choices(self, sequences: list[SequenceSampling]) -> None:
        """Which tokens may be chosen at all: those allowed, less the bad words."""
        fitting = [i for i in range(len(sequences)) if i not in self.errors]
        self.guided = self._rows([i for i in fitting if self._params[i].grammar is not None])
        free = [i for i in fitting if self._params[i].grammar is None]  # of the others the grammar's bits say it
        self.limited = self._rows([i for i in free if self._params[i].packed_allowed])
        self.allowed = self._pairs(
            [(i, torch.frombuffer(self._params[i].packed_allowed, dtype=torch.int64)) for i in self.limited.rows]
        )
        words = [(i, [word[0] for word in self._params[i].bad_words_token_ids if len(word) == 1]) for i in free]
        self.never = self._pairs([(i, torch.tensor(ids, dtype=torch.int64)) for i, ids in words if ids])
        tails = [(i, tail) for i in fitting if (tail := sequences[i].tail) is not None]
        self.phrased = self._rows([i for i, _ in tails])
        self.tails = self._ints([tail for _, tail in tails])
        self.phrases = Phrases([(i, tail, self._params[i].bad_words_token_ids) for i, tail in tails], self._device)

    def banned(self, positions: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Rows [N] and token ids [N] that min_tokens still bans, given each row's output position; None: nothing."""
        bans = [(row, ids) for row, until, ids in self._bans if positions[row] < until]
        rows = [row for row, _ in bans]
        if not rows:
            return None
        if self._banned is None or self._banned[0] != rows:
            self._banned = (rows, self._pairs(bans))
        return self._banned[1]

    def _pairs(self, ids_of_rows: list[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
        """(row, token ids [n]) -> rows [N] and token ids [N]."""
        if not ids_of_rows:
            return self._ints([]), self._ints([])
        counts = torch.tensor([len(ids) for _, ids in ids_of_rows])
        rows = torch.tensor([row for row, _ in ids_of_rows]).repeat_interleave(counts)
        return to_device(rows, self._device), to_device(torch.cat([ids for _, ids in ids_of_rows]), self._device)

    def pack_logprobs(self, raw: Tensor, chosen: Tensor) -> Tensor:
        """Log-probabilities of the rows that ask, for one copy to the host.

        Shapes: raw logits [L, V] of those rows, chosen [S] -> float64 [L, 2 + 2 k]: the chosen token id and its
        log-probability, then k ids and their k log-probabilities (a float64 holds an id exactly).
        """
        most = max(self._params[i].logprobs or 0 for i in self.logprobs.rows)
        ids, values, normaliser = top_logprobs(raw, min(most, raw.shape[1]))
        token_ids = self.logprobs.take(chosen)[:, None]
        logprobs = raw.gather(1, token_ids).double() - normaliser[:, None]
        return torch.cat((token_ids.double(), logprobs, ids.double(), values), dim=1)

    def unpack_logprobs(self, packed: Tensor) -> dict[int, TokenLogprobs]:
        """Row -> log-probabilities, each with as many of the most likely tokens as it asked for."""
        found = {}
        most = (packed.shape[1] - 2) // 2
        for row, numbers in zip(self.logprobs.rows, packed.tolist(), strict=True):
            k = self._params[row].logprobs or 0
            ids, values = numbers[2 : 2 + most], numbers[2 + most :]
            top = tuple((int(i), v) for i, v in zip(ids[:k], values[:k], strict=True))
            found[row] = TokenLogprobs(int(numbers[0]), numbers[1], top)
        return found

    def _filters(self, rows: Rows) -> Filters:
        params = [self._params[i] for i in rows.rows]
        nucleus = [i for i, p in enumerate(params) if p.top_k == 0 and p.top_p < 1.0]
        typical = [i for i, p in enumerate(params) if p.typical_p < 1.0]
        tiny = torch.finfo(torch.float32).tiny  # a temperature that float32 would make 0 stays above it
        return Filters(
            temperature=self._reals([max(p.temperature, tiny) for p in params]),
            top_k=self._ints([p.top_k for p in params]),
            top_p=self._reals([p.top_p for p in params], torch.float64),
            min_p=self._reals([p.min_p for p in params], torch.float64),
            typical_p=self._reals([p.typical_p for p in params], torch.float64),
            typical=self._ints(typical) if typical else None,
            nucleus=None if len(nucleus) == len(params) else self._ints(nucleus),
        )

    def _ints(self, values: list[int]) -> Tensor:
        return upload(values, self._device)

    def _reals(self, values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self._device)


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0 or params.typical_p < 1.0
