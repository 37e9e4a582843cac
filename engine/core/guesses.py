"""Guesses: what a step computes ahead with the rows and blocks that nobody else can use."""

from __future__ import annotations

from engine.core.draft import PlanDraft
from engine.core.kv_blocks import KVBlocks
from engine.core.lookup import MIN_READ_TOKENS, READ_TOKENS
from engine.core.roster import Roster
from engine.core.sequence import Sequence


class Guesses:
    """Comes last in a step: guesses get what decoding, prompts under way and those who were waiting have left."""

    def __init__(self, kv: KVBlocks, roster: Roster) -> None:
        self._kv = kv
        self._roster = roster
        self.num_guessed = 0

    def run(self, guessing: list[tuple[int, Sequence]], draft: PlanDraft, *, lacks_room: bool) -> None:
        """Add guesses to slices of the draft, given by their places in it.

        `lacks_room`: somebody waits for blocks. Then guesses take none that their sequence does not have.
        """
        readers = [seq for seq in self._roster.running if seq.lookup is not None]
        for seq in readers:
            seq.read_for_guesses(max(MIN_READ_TOKENS, READ_TOKENS // len(readers)))
        headroom = self._kv.pool.num_blocks if lacks_room else len(self._roster.running)
        for index, seq in guessing:
            guesses = seq.guess(draft.rows_left) if draft.rows_left else ()
            if guesses:
                guesses = guesses[: self._kv.grow_for_guesses(seq, len(guesses), headroom)]
                draft.add_guesses(index, guesses)
                self.num_guessed += len(guesses)
