"""Which guesses of prompt lookup were right: those that the model, asked for the same position, chose itself."""

from __future__ import annotations

from collections.abc import Iterator

from engine.core.plan import RowOutput, Sample, SequenceSlice


def check_guesses(slices: tuple[SequenceSlice, ...], rows: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """One sample per sampling slice, out of one per sampled row.

    As long as all guesses before it are right, a row's choice is what it would have been without them: its random
    number belongs to its position. So choices count up to the first wrong guess, whose place they take.
    """
    if len(rows) == sum(s.output is RowOutput.SAMPLE for s in slices):
        return rows  # there were no guesses
    following = iter(rows)
    return tuple(_accept(s, following) for s in slices if s.output is RowOutput.SAMPLE)


def _accept(piece: SequenceSlice, following: Iterator[Sample]) -> Sample:
    rows = [next(following) for _ in range(1 + piece.num_guesses)]
    guesses = piece.token_ids[piece.num_sure_rows :]
    count = 1
    while count < len(rows) and rows[count - 1].token_ids == (guesses[count - 1],) and rows[count].error is None:
        count += 1
    if rows[0].error is not None:
        return rows[0]
    logprobs = None if rows[0].logprobs is None else tuple(item for row in rows[:count] for item in row.logprobs or ())
    return Sample(
        seq_id=piece.seq_id,
        token_ids=tuple(token for row in rows[:count] for token in row.token_ids),
        logprobs=logprobs,
    )
