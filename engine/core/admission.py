"""Admission: which waiting sequences join the step that is being drafted."""

from __future__ import annotations

from engine.core.adapter_slots import AdapterSlots
from engine.core.claims import AdapterClaims
from engine.core.draft import PlanDraft
from engine.core.fairness import FairQueue, load_cost
from engine.core.kv_blocks import KVBlocks, Placement
from engine.core.limits import SchedulerConfig
from engine.core.plan import NO_LORA, AdapterLoad
from engine.core.roster import Roster
from engine.core.sequence import Sequence, SequenceState

LOOKAHEAD = 32  # of the sequences that are passed over in a step, so many may claim their adapter
HEADROOM_DIVISOR = 100  # 1 % of the blocks stays free for running sequences to grow into


class Admission:
    """Takes sequences from the queue in the order in which they are entitled to run.

    - One that is not ready (adapter not resident; a sibling is computing their prompt; a plan in flight still names
      it) is passed over and claims its adapter.
    - The first ready one that does not fit (rows, seats, blocks) ends admission for this step: what it needs is not
      given to those behind it, so it is not overtaken for ever.
    - A prompt's blocks are taken whole, so that only decoding grows and only decoding can run out of blocks. Where
      every layer has a window, as many are taken as the prompt will ever hold at a time: it goes on in those that it
      drops, and lacks one only if somebody shares what it has dropped.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVBlocks,
        slots: AdapterSlots,
        claims: AdapterClaims,
        queue: FairQueue,
        roster: Roster,
    ) -> None:
        self._config = config
        self._kv = kv
        self._slots = slots
        self._claims = claims
        self._queue = queue
        self._roster = roster
        self._families: dict[str, tuple[bool, Sequence | None]] = {}  # by request, as they are in this step
        self.lacks_room = False  # somebody waited for blocks in the last step

    def run(self, draft: PlanDraft) -> None:
        """Add slices, adapter operations and block copies to the draft."""
        self._claims.begin_step()
        self.lacks_room = False
        self._families.clear()
        turns = self._queue.turns()
        lookahead = LOOKAHEAD
        is_open = self._has_seat(draft)
        while (seq := turns.current) is not None and (is_open or lookahead > 0):
            if is_open and self._is_ready(seq, draft):
                is_open = self._admit(seq, draft)
                if is_open:
                    turns.took_current()
                    is_open = self._has_seat(draft)
                    continue
            is_loaded = lookahead > 0 and not seq.num_in_flight and self._claim(seq, draft)
            lookahead -= 1
            if not (is_loaded and is_open and self._is_ready(seq, draft)):  # else it joins the step that loads it
                turns.skip_current()
        self.lacks_room = self.lacks_room or (self._config.max_adapter_pages is not None and self._claims.has_refused)

    def _has_seat(self, draft: PlanDraft) -> bool:
        return draft.rows_left > 0 and self._roster.num_seats_taken < self._config.max_num_seqs

    def _claim(self, seq: Sequence, draft: PlanDraft) -> bool:
        """Returns: whether the plan loads its adapter."""
        ops = self._claims.claim(seq, self._headroom())
        draft.adapter_ops.extend(ops)
        is_load = any(isinstance(op, AdapterLoad) for op in ops)
        if is_load and seq.request.adapter is not None:
            self._queue.charge(seq.tenant, load_cost(self._slots.num_bytes(seq.request.adapter)))
        return is_load

    def _is_ready(self, seq: Sequence, draft: PlanDraft) -> bool:
        if seq.num_in_flight or not self._claims.is_runnable(seq):
            return False
        siblings_run, source = self._family(seq, draft)
        return not siblings_run or source is not None

    def _family(self, seq: Sequence, draft: PlanDraft) -> tuple[bool, Sequence | None]:
        """Whether a sibling of `seq` runs, and one from which it can fork: an earlier plan leaves its prompt's KV in
        its blocks.

        Not one that joins in this step: even if it has all of the prompt, its own block copy has not happened yet.
        """
        if len(seq.siblings) == 1:
            return False, None
        found = self._families.get(seq.request.request_id)
        if found is None:
            running = [sibling for sibling in seq.siblings if sibling.state is SequenceState.RUNNING]
            computed = (sibling for sibling in running if sibling.has_prompt_computed)
            sources = (sibling for sibling in computed if not draft.has_start_of(sibling))
            source = min(sources, key=lambda sibling: sibling.num_dropped_blocks, default=None)
            found = self._families[seq.request.request_id] = (bool(running), source)
        return found

    def _admit(self, seq: Sequence, draft: PlanDraft) -> bool:
        placement = self._kv.place(seq, self._family(seq, draft)[1])
        num_tokens = (len(placement.shared) + placement.num_new) * self._config.block_size
        num_rows = min(seq.num_known_tokens, num_tokens) - placement.num_computed_tokens
        may_split = self._config.enable_chunked_prefill or num_rows > self._config.max_num_batched_tokens
        if num_rows > draft.rows_left:
            if not may_split:
                self._kv.expect(seq)
                return False
            num_rows = draft.rows_left
        if not self._make_room(seq, placement, draft):
            self._kv.expect(seq)
            self.lacks_room = True
            return False
        copy = self._kv.take(seq, placement)
        if copy is not None:
            draft.block_copies.append(copy)
        self._start(seq, placement.num_cached_tokens)
        self._families.pop(seq.request.request_id, None)
        draft.add(seq, num_rows)
        return True

    def _make_room(self, seq: Sequence, placement: Placement, draft: PlanDraft) -> bool:
        """Free blocks for a placement, those of idle adapters if need be."""
        num_missing = self._kv.num_missing(placement, self._headroom())
        if not num_missing:
            return True
        self._claims.pin(seq)  # its own adapter is no idle one; it keeps the pin as a claim
        evictions = self._slots.yield_pages(num_missing)
        draft.adapter_ops.extend(evictions)
        return bool(evictions)

    def _headroom(self) -> int:
        return self._config.num_blocks // HEADROOM_DIVISOR if self._roster.num_seats_taken else 0

    def _start(self, seq: Sequence, num_cached_tokens: int) -> None:
        self._claims.pin(seq)
        self._claims.note_admission(seq)
        seq.lora_slot = NO_LORA if seq.request.adapter is None else self._slots.slot(seq.request.adapter)
        self._roster.run(seq)
        if not seq.was_admitted:
            seq.was_admitted = True
            seq.num_cached_tokens = min(num_cached_tokens, len(seq.prompt))
            num_computed = min(seq.num_computed_tokens, len(seq.prompt))
            self._queue.charge(seq.tenant, seq.token_cost * (len(seq.prompt) - num_computed))
