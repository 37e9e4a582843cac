"""Intake: what the result of a plan means for the sequences of its slices."""

from __future__ import annotations

from engine.core.fairness import OUTPUT_WEIGHT, FairQueue
from engine.core.kv_blocks import KVBlocks
from engine.core.plan import Sample, SequenceSlice, Vector
from engine.core.roster import Roster
from engine.core.sequence import Ending, Sequence, SequenceState
from engine.errors import RequestFailed
from engine.request import FinishReason, OutputError


class Intake:
    """Turns slices and samples into progress, published and dropped blocks, charges and endings."""

    def __init__(self, eos_token_ids: tuple[int, ...], kv: KVBlocks, queue: FairQueue, roster: Roster) -> None:
        self._eos_token_ids = eos_token_ids
        self._kv = kv
        self._queue = queue
        self._roster = roster
        self.num_guessed_right = 0

    def take_in(self, seq: Sequence, piece: SequenceSlice, sample: Sample | None, vector: Vector | None = None) -> None:
        """What a slice computed counts as far as its tokens were right; then its sample, or its vector."""
        num_gained, ending = 0, None
        if sample is not None and sample.error is None:
            assert 1 <= len(sample.token_ids) <= 1 + piece.num_guesses, "a token for each guess, and one more, at most"
            num_gained, ending = seq.gain(sample.token_ids, self._eos_token_ids)
        seq.num_committed_tokens = piece.position + len(piece.token_ids)
        if piece.num_guesses:
            num_right = max(0, num_gained - 1)
            seq.num_committed_tokens -= piece.num_guesses - num_right
            seq.num_computed_tokens = seq.num_committed_tokens
            seq.learn(piece.num_guesses, num_right)
            self.num_guessed_right += num_right
        self._kv.publish(seq)
        if seq.state is SequenceState.RUNNING:
            self._kv.slide(seq)
        if sample is not None:
            self._tell(seq, sample, num_gained, ending)
        if vector is not None:
            assert vector.seq_id == piece.seq_id, "vectors follow the order of the slices"
            self._tell_vector(seq, vector)

    def _tell_vector(self, seq: Sequence, vector: Vector) -> None:
        """The only update of a sequence that is answered by numbers."""
        if vector.error is not None:
            error = OutputError(RequestFailed.code, vector.error)
            self._roster.end(seq, Ending(FinishReason.ERROR), error=error)
            return
        ending = Ending(FinishReason.STOP)
        self._roster.end(seq, ending, seq.update(ending=ending, vector=vector.data))

    def _tell(self, seq: Sequence, sample: Sample, num_gained: int, ending: Ending | None) -> None:
        if sample.error is not None:
            error = OutputError(RequestFailed.code, sample.error)
            self._roster.end(seq, Ending(FinishReason.ERROR), error=error)
            return
        self._queue.charge(seq.tenant, OUTPUT_WEIGHT * seq.token_cost * num_gained)
        logprobs = None if sample.logprobs is None else sample.logprobs[:num_gained]
        update = seq.update(sample.token_ids[:num_gained], logprobs, ending)
        seq.forced = () if seq.has_changing_choices else sample.forced_token_ids
        is_over = sample.is_over and num_gained == len(sample.token_ids)
        if is_over and (ending is None or ending.reason is FinishReason.LENGTH):
            # Its last token is text, which an ending by a stop token would keep silent: it is told before the ending.
            self._roster.updates.append(update._replace(finish_reason=None))
            over = Ending(FinishReason.STOP)
            self._roster.end(seq, over, seq.update((), None, over))
        elif ending is None:
            self._roster.updates.append(update)
        else:
            self._roster.end(seq, ending, update)
