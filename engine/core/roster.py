"""Roster: where each sequence is, and what it lets go when it leaves."""

from __future__ import annotations

from bisect import insort
from operator import attrgetter

from engine.core.adapter_slots import AdapterSlots
from engine.core.claims import AdapterClaims
from engine.core.fairness import FairQueue
from engine.core.kv_blocks import KVBlocks
from engine.core.sequence import Ending, Sequence, SequenceState, SequenceUpdate
from engine.request import FinishReason, OutputError

_arrival = attrgetter("seq_id")


class Roster:
    """All sequences that have not ended, and those that have but are still named by a plan in flight.

    Invariants:
      - a sequence is in the queue if and only if it is WAITING or PREEMPTED, in `running` if and only if it is RUNNING
      - `running` is in order of arrival
      - `retiring`: sequences that have left `running` and are still named by a plan in flight; only then do they
        keep blocks, pin and the runner's state
      - each sequence ends with exactly one update that has a finish_reason
    """

    def __init__(self, kv: KVBlocks, slots: AdapterSlots, claims: AdapterClaims, queue: FairQueue) -> None:
        self._kv = kv
        self._slots = slots
        self._claims = claims
        self._queue = queue
        self.requests: dict[str, tuple[Sequence, ...]] = {}  # of which a sequence has not ended yet
        self.unserved: set[str] = set()  # requests of which no sequence has run yet
        self.running: list[Sequence] = []
        self.retiring: dict[int, Sequence] = {}
        self.ends: dict[int, None] = {}  # seq ids that the runner may forget
        self.updates: list[SequenceUpdate] = []
        self.num_preemptions = 0

    @property
    def num_seats_taken(self) -> int:
        """Sequences for which the runner keeps state once the next plan's `ends` are done."""
        return len(self.running) + len(self.retiring)

    def enter(self, siblings: tuple[Sequence, ...]) -> None:
        """The samples of a request wait."""
        request = siblings[0].request
        self.requests[request.request_id] = siblings
        self.unserved.add(request.request_id)
        for seq in siblings:
            seq.siblings = siblings
            if request.adapter is not None:
                self._slots.add_user(request.adapter)
            self._queue.push(seq)

    def run(self, seq: Sequence) -> None:
        """A waiting sequence has got its blocks and its adapter."""
        self._queue.remove(seq)
        self.unserved.discard(seq.request.request_id)
        seq.move_to(SequenceState.RUNNING)
        insort(self.running, seq, key=_arrival)

    def preempt(self, seq: Sequence, time_ns: int) -> None:
        """A running sequence goes back to the queue, and computes its tokens again later."""
        seq.waiting_since_ns = time_ns
        self.running.remove(seq)
        seq.move_to(SequenceState.PREEMPTED)
        self.num_preemptions += 1
        self._queue.push(seq)
        self.retiring[seq.seq_id] = seq
        self.settle(seq)

    def end(
        self,
        seq: Sequence,
        ending: Ending,
        update: SequenceUpdate | None = None,
        error: OutputError | None = None,
    ) -> None:
        """The last update of a sequence: `update`, or one that brings nothing but the ending."""
        if seq.state is SequenceState.RUNNING:
            self.running.remove(seq)
        else:
            self._queue.remove(seq)
        seq.move_to(SequenceState.FINISHED)
        self.updates.append(update or seq.update(ending=ending, error=error))
        if all(sibling.state is SequenceState.FINISHED for sibling in seq.siblings):
            del self.requests[seq.request.request_id]
            self.unserved.discard(seq.request.request_id)
            for sibling in seq.siblings:
                sibling.siblings = ()  # a cycle less for the garbage collector
        self.retiring[seq.seq_id] = seq
        self.settle(seq)

    def abort(self, request_id: str) -> None:
        for seq in self.requests.get(request_id, ()):
            if seq.state is not SequenceState.FINISHED:
                self.end(seq, Ending(FinishReason.ABORT))

    def settle(self, seq: Sequence) -> None:
        """Free what a sequence that has left `running` holds, once no plan in flight names it."""
        if seq.num_in_flight or seq.seq_id not in self.retiring:
            return
        del self.retiring[seq.seq_id]
        self._kv.give_back(seq)
        self._claims.drop(seq)
        if seq.is_started:
            seq.is_started = False
            self.ends[seq.seq_id] = None
        if seq.state is SequenceState.FINISHED and seq.request.adapter is not None:
            self._slots.drop_user(seq.request.adapter)

    def check_invariants(self, block_size: int) -> None:
        waiting = self._queue.sequences()
        for seq in waiting:
            assert seq.state in (SequenceState.WAITING, SequenceState.PREEMPTED), seq
        for seq in self.running:
            assert seq.state is SequenceState.RUNNING, seq
            assert seq.block_table, seq
            assert seq.has_pin == (seq.request.adapter is not None), seq
        assert [seq.seq_id for seq in self.running] == sorted(seq.seq_id for seq in self.running)
        for seq in self.retiring.values():
            assert seq.state is not SequenceState.RUNNING, seq
            assert seq.num_in_flight, seq
        for seq in [*waiting, *self.running, *self.retiring.values()]:
            seq.check_invariants(block_size)
        served = {name for name, group in self.requests.items() if any(seq.was_admitted for seq in group)}
        assert self.unserved == self.requests.keys() - served
        listed = sorted(seq.seq_id for seq in [*waiting, *self.running])
        alive = [seq for group in self.requests.values() for seq in group if seq.state is not SequenceState.FINISHED]
        assert sorted(seq.seq_id for seq in alive) == listed
