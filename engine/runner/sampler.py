"""From logits to tokens: one batched pass over rows with different parameters.

Order: logit_bias; repetition, presence and frequency penalties; grammar, allowed tokens, bad words and the ban of
min_tokens;
temperature; top_k, top_p, min_p, typical_p and the choice itself (`choice.py`), with one uniform number per row
(`philox.py`) keyed by (seed, sample index, output position). A greedy row takes the most likely token after the bans,
of equals the lowest id. So the token of a row is a function of its logits, its parameters and its history, never of
the other rows or of their order.

min_tokens bans stop_token_ids, and the end-of-sequence tokens unless ignore_eos says that they mean nothing. Should
that be all that may be chosen, nothing is banned: a token must come. A logit_bias of -100 only makes a token unlikely.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from engine.core.plan import Sample, SequenceStart
from engine.grammar.compiler import Grammars
from engine.native.library import NativeLibrary
from engine.request import SamplingParams, TokenLogprobs
from engine.runner import choice
from engine.runner.batch_params import BatchParams, SequenceSampling
from engine.runner.guides import NOTHING_LEFT, Guides
from engine.runner.inputs import SampledRow
from engine.runner.penalties import TokenHistory, uses_history
from engine.runner.philox import as_int64, uniform
from engine.runner.phrases import OutputTails
from engine.runner.scan import scan
from engine.to_device import HostCopy, upload

_NOT_FINITE = "the model's logits for this sequence were not finite (NaN or infinity)"
_FAILED, _NOTHING = -1, -2  # in place of a token id
_WHY = {_FAILED: _NOT_FINITE, _NOTHING: NOTHING_LEFT}
NO_ERRORS: Mapping[int, str] = MappingProxyType({})


class SampledStep:
    """What one call of `Sampler.sample` produced.

    token_ids: [S] int64 on the device, there at once, for the next plan's token references; a failed row has some
    token of the vocabulary, which nobody may show.
    """

    def __init__(
        self, batch: BatchParams, chosen: Tensor, logprobs: Tensor | None, errors: Mapping[int, str] = NO_ERRORS
    ) -> None:
        self.token_ids = chosen.clamp(min=0)
        self._batch = batch
        self._errors = {**batch.errors, **errors} if errors else batch.errors
        self._chosen = HostCopy(chosen)
        self._logprobs = None if logprobs is None else HostCopy(logprobs)

    @cached_property
    def samples(self) -> tuple[Sample, ...]:
        """One per row, in order. Waits for the device, but not for steps launched after this one."""
        batch = self._batch
        logprobs = {} if self._logprobs is None else batch.unpack_logprobs(self._logprobs.wait())
        chosen: list[int] = self._chosen.wait().tolist()
        return tuple(
            self._sample(row, seq_id, token_id, logprobs.get(row))
            for row, (seq_id, token_id) in enumerate(zip(batch.seq_ids, chosen, strict=True))
        )

    def _sample(self, row: int, seq_id: int, token_id: int, logprobs: TokenLogprobs | None) -> Sample:
        error = self._errors.get(row, _WHY.get(token_id))
        if error is not None:
            return Sample(seq_id=seq_id, token_ids=(), error=error)
        return Sample(seq_id=seq_id, token_ids=(token_id,), logprobs=None if logprobs is None else (logprobs,))


class Sampler:
    """Chooses tokens for sequences that `start` made known. One per model; used by the step thread alone."""

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        eos_token_ids: tuple[int, ...] = (),
        library: NativeLibrary | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[int, SequenceSampling] = {}
        self._history = TokenHistory(vocab_size, self._device)
        self._tails = OutputTails(self._device)
        self._guides = Guides(vocab_size, self._device, grammars)
        self._batch: BatchParams | None = None
        self._stand_in = -torch.arange(vocab_size, dtype=torch.float32, device=self._device)

    def start(self, start: SequenceStart) -> None:
        """Remember a sequence. One that is known already starts anew, from the given output."""
        self.end(start.seq_id)
        params = start.params
        history = None
        if uses_history(params):
            history = self._history.open(start.prompt_token_ids, start.output_token_ids)
        banned = self._banned(params)
        self._sequences[start.seq_id] = SequenceSampling(
            params=params,
            seed=as_int64(start.seed),
            sample_index=start.sample_index,
            banned_token_ids=banned,
            history=history,
            error=self._misfit(params) or self._guides.open(start, banned),
            tail=self._tails.open(start.output_token_ids) if params.has_bad_phrases else None,
        )

    def end(self, seq_id: int) -> None:
        """Forget a sequence; one that is not known is forgotten already."""
        sequence = self._sequences.pop(seq_id, None)
        if sequence is None:
            return
        self._guides.close(seq_id)
        if sequence.history is not None:
            self._history.close(sequence.history)
        if sequence.tail is not None:
            self._tails.close(sequence.tail)
        if self._batch is not None and seq_id in self._batch.seq_ids:
            self._batch = None

    def sample(self, logits: Tensor, rows: tuple[SampledRow, ...]) -> SampledStep:
        """One token for each row. A sequence may have several rows, unless what it said counts (penalties, phrases).

        logits: [S, V], row i for rows[i]; they may be overwritten. Raises: KeyError for a sequence that was not
        started, ValueError if the shape does not fit.
        """
        if logits.shape != (len(rows), self._vocab_size):
            raise ValueError(f"logits {tuple(logits.shape)} should be ({len(rows)}, {self._vocab_size})")
        batch = self._batch_of(tuple(row.seq_id for row in rows))
        with torch.inference_mode():
            return self._run(logits, batch, rows)

    def took(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """What sequences gained by a step, once it is known: those that a grammar constrains move on in it."""
        return tuple(map(self._guides.took, samples)) if self._guides else samples

    def _run(self, logits: Tensor, batch: BatchParams, rows: tuple[SampledRow, ...]) -> SampledStep:
        positions = [row.output_position for row in rows]
        errors: dict[int, str] = {}
        greedy = not (batch.random or batch.logprobs or batch.changes_logits)
        found = scan(logits, self._stand_in, self._library, as_float=not greedy)
        logits, blocks, finite = found.values, found.blocks, found.finite
        raw = None
        if batch.logprobs:
            raw = batch.logprobs.take(logits)
            raw = raw.clone() if raw is logits and batch.changes_logits else raw
        if batch.changes_logits:
            self._change(logits, batch, positions)
            errors = self._guide(logits, batch, rows) if batch.guided else errors
            blocks = choice.block_max(logits)
        chosen = _choose(logits, blocks, batch, positions, self._library)
        if batch.penalised:
            self._history.add(batch.history, batch.penalised.take(chosen))
        if batch.phrased:
            self._tails.add(batch.tails, batch.phrased.take(chosen))
        logprobs = None if raw is None else batch.pack_logprobs(raw, chosen)
        if batch.guided and batch.phrased:
            chosen = chosen.masked_fill(blocks.amax(-1) == -torch.inf, _NOTHING)
        chosen = chosen if finite is None else chosen.masked_fill(~finite, _FAILED)
        return SampledStep(batch, chosen, logprobs, errors)

    def _batch_of(self, seq_ids: tuple[int, ...]) -> BatchParams:
        if self._batch is None or self._batch.seq_ids != seq_ids:
            self._batch = BatchParams(seq_ids, [self._sequences[i] for i in seq_ids], self._device)
        return self._batch

    def _change(self, logits: Tensor, batch: BatchParams, positions: list[int]) -> None:
        """Bias, penalties and bans, in place."""
        if len(batch.biases):
            logits.index_put_((batch.bias_rows, batch.bias_token_ids), batch.biases, accumulate=True)
        if batch.penalised:
            self._history.penalise(
                logits, batch.penalised.index, batch.history, batch.repetition, batch.presence, batch.frequency
            )
        if batch.limited:
            allowed = logits[batch.allowed]
            logits.index_fill_(0, batch.limited.index, -torch.inf)
            logits[batch.allowed] = allowed
        if len(batch.never[0]):
            logits[batch.never] = -torch.inf
        banned = batch.banned(positions)
        if banned is not None:
            logits[banned] = -torch.inf
        if batch.phrased:
            batch.phrases.ban(logits, self._tails)

    def _guide(self, logits: Tensor, batch: BatchParams, rows: tuple[SampledRow, ...]) -> dict[int, str]:
        """What grammars let follow, in place. Returns: rows for which that is nothing, with the reason."""
        forbidden, errors = self._guides.masks(rows[i] for i in batch.guided.rows)
        guided = batch.guided.take(logits).masked_fill_(forbidden, -torch.inf)
        if guided is not logits:
            logits[batch.guided.index] = guided
        return {batch.guided.rows[i]: error for i, error in errors.items()}

    def _banned(self, params: SamplingParams) -> tuple[int, ...]:
        ids = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self._eos_token_ids))
        banned = sorted(i for i in ids if 0 <= i < self._vocab_size)
        return tuple(banned) if self._num_left(params, ids) else ()

    def _num_left(self, params: SamplingParams, banned: Set[int] = frozenset()) -> int:
        """How many tokens may be chosen when `banned` may not."""
        banned = banned | {word[0] for word in params.bad_words_token_ids if len(word) == 1}
        if params.allowed_token_ids is not None:
            return len(set(params.allowed_token_ids) - banned)
        return self._vocab_size - sum(0 <= i < self._vocab_size for i in banned)

    def _misfit(self, params: SamplingParams) -> str | None:
        for name, token_ids in (
            ("logit_bias", params.packed_bias[0]),
            ("allowed_token_ids", params.packed_allowed),
            ("bad_words_token_ids", [i for word in params.bad_words_token_ids for i in word]),
        ):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                unknown = next(i for i in token_ids if not 0 <= i < self._vocab_size)
                return f"{name} names token {unknown}, the model's tokens are 0 to {self._vocab_size - 1}"
        if not self._num_left(params):
            return "the bad words are all the tokens that the model may say"
        return None


def _choose(
    logits: Tensor, blocks: Tensor, batch: BatchParams, positions: list[int], library: NativeLibrary | None
) -> Tensor:
    """[S, V], [S, ceil(V / 64)] -> token ids [S]."""
    if not batch.random:
        return choice.argmax(logits, blocks)
    chosen = torch.empty(len(positions), dtype=torch.int64, device=logits.device)
    if batch.greedy:
        chosen[batch.greedy.index] = choice.argmax(batch.greedy.take(logits), batch.greedy.take(blocks))
    place = upload([positions[i] for i in batch.random.rows], logits.device)
    u = torch.empty(len(positions), dtype=torch.float64, device=logits.device)
    u[batch.random.index] = uniform(batch.seeds, batch.sample_index, place)
    if batch.plain:
        chosen[batch.plain.index] = choice.choose(
            batch.plain.take(logits), batch.plain.take(blocks), batch.plain.take(u), batch.plain_temperature, library
        )
    if batch.filtered:
        chosen[batch.filtered.index] = choice.choose_filtered(
            batch.filtered.take(logits), batch.filtered.take(blocks), batch.filtered.take(u), batch.filters, library
        )
    return chosen
