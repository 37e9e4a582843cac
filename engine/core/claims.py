"""AdapterClaims: which waiting sequences get a LoRA slot, so that cold adapters hold up nobody and starve nowhere."""

from __future__ import annotations

from engine.core.adapter_slots import AdapterOp, AdapterSlots, AdapterState
from engine.core.sequence import Sequence, SequenceState


class AdapterClaims:
    """A claim is a pin that a waiting sequence takes when it nears the head of the queue; it keeps it until it is over.

    A sequence whose adapter is not resident is passed over by the others. When `patience` of them have taken slots
    past the first one that found no room, enough adapters to make room for it are drained: their running sequences
    go on, no other may pin them, and nobody else may start a load until that sequence has its claim.
    Where adapters and sequences share one room, every sequence takes from it: then those that are overtaken count all
    who pass, and while one starves only those that have their pin already are let in, until all others are over.
    Invariants:
      - a claimed adapter is COPYING or RESIDENT
      - while a sequence starves, free room and drained adapters together make room for its adapter
    """

    def __init__(self, slots: AdapterSlots, patience: int, *, shares_room: bool) -> None:
        self._slots = slots
        self._patience = patience
        self._shares_room = shares_room  # with sequences
        self._refused: Sequence | None = None  # the first of this step that found no room
        self._starving: Sequence | None = None
        self._drained: frozenset[str] = frozenset()

    def begin_step(self) -> None:
        self._refused = None
        starving = self._starving
        if starving is not None and (starving.has_pin or starving.state is SequenceState.FINISHED):
            self._starving, self._drained = None, frozenset()

    @property
    def has_refused(self) -> bool:
        """Whether an adapter found no room in this step."""
        return self._refused is not None

    def is_runnable(self, seq: Sequence) -> bool:
        """The adapter is there and may be pinned."""
        key = seq.request.adapter
        if self._shares_room and self._starving not in (None, seq) and not seq.has_pin:
            return False
        if key is None:
            return True
        if self._slots.state(key) is not AdapterState.RESIDENT:
            return False
        return seq.has_pin or self._may_pin(seq, key)

    def claim(self, seq: Sequence, headroom: int) -> tuple[AdapterOp, ...]:
        """Pin the adapter of a waiting sequence, loading it if need be and possible.

        A load leaves running sequences `headroom` blocks, unless `seq` starves.
        Returns: what the plan must do for it, in order.
        """
        key = seq.request.adapter
        if key is None or seq.has_pin:
            return ()
        if self._slots.state(key) is not AdapterState.HOST:
            if self._may_pin(seq, key):
                self.pin(seq)
            return ()
        ops: tuple[AdapterOp, ...] = ()
        if self._starving in (None, seq):
            ops = self._slots.load(key, headroom=headroom if self._starving is None else 0)
        if ops:
            self.pin(seq)
        elif self._refused is None:
            self._refused = seq
        return ops

    def pin(self, seq: Sequence) -> None:
        """Claim an adapter that has a slot, unless `seq` has done so."""
        key = seq.request.adapter
        if key is not None and not seq.has_pin:
            self._slots.pin(key)
            seq.has_pin = True

    def drop(self, seq: Sequence) -> None:
        """Give up the pin, if there is one."""
        key = seq.request.adapter
        if key is not None and seq.has_pin:
            self._slots.unpin(key)
            seq.has_pin = False

    def note_admission(self, seq: Sequence) -> None:
        """`seq` runs, past the first sequence that found no room."""
        refused = self._refused
        if refused is None or self._starving is not None or not (seq.request.adapter or self._shares_room):
            return
        refused.overtaken += 1
        if refused.overtaken >= self._patience:
            assert refused.request.adapter is not None
            self._starving = refused
            self._drained = self._slots.room_makers(refused.request.adapter)

    def _may_pin(self, seq: Sequence, key: str) -> bool:
        if self._starving in (None, seq):
            return True
        return not self._shares_room and key not in self._drained

    def check_invariants(self, waiting: list[Sequence]) -> None:
        for seq in waiting:
            if seq.has_pin:
                assert seq.request.adapter is not None
                assert self._slots.state(seq.request.adapter) is not AdapterState.HOST
        if self._starving is not None and not self._starving.has_pin:
            assert self._drained or self._shares_room or self._starving.state is SequenceState.FINISHED
