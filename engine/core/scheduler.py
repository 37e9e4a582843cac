"""Scheduler: which tokens the next step computes, and what came of the last one."""

from __future__ import annotations

from collections import deque

from engine.core.adapter_desk import AdapterDesk
from engine.core.adapter_room import AdapterRoom, ByteRoom, PageRoom
from engine.core.adapter_slots import AdapterSlots
from engine.core.admission import HEADROOM_DIVISOR, Admission
from engine.core.claims import AdapterClaims
from engine.core.draft import Flight, PlanDraft
from engine.core.fairness import FairQueue, token_cost
from engine.core.guesses import Guesses
from engine.core.intake import Intake
from engine.core.kv_blocks import KVBlocks
from engine.core.limits import SchedulerConfig
from engine.core.plan import RowOutput, StepEvents, StepPlan, StepResult
from engine.core.refusals import check_request, max_tokens_total
from engine.core.roster import Roster
from engine.core.sequence import Ending, Sequence, SequenceState, SequenceUpdate
from engine.core.stats import SchedulerStats
from engine.errors import InvalidRequest, QueueFull
from engine.request import FinishReason, Request


class Scheduler:
    """Turns requests into plans and results into updates: same calls, same plans.

    A step: decode every running sequence, go on with prompts under way, then admit from the queue, within
    `max_num_batched_tokens` rows. A plan never has more rows than that: with chunked prefill off a sequence is computed
    in one slice, unless it alone is longer than the limit (only a re-prefill can be; then it is cut as with chunking).
    When a decoding sequence finds no block, idle adapters give up their pages, down to what is kept for adapters; then
    the newest running sequence is preempted: it gives back its blocks and computes its tokens again later.

    A plan is in flight from `schedule` to `commit` or `abandon`. Nothing that a plan in flight names is reused: the
    blocks, the LoRA slot and the runner's state of a sequence go when the last plan naming it retires, and until then
    it keeps its seat.

    Invariants:
      - at most `pipeline_depth` plans are in flight, committed in order; at most `max_num_seqs` sequences are started
      - the oldest running sequence is never preempted for another, and every sequence fits into the pool alone beside
        as many adapters as there may be, so some sequence always gets on
      - those of its parts: Roster, KVBlocks, BlockPool, PrefixCache, AdapterSlots, AdapterClaims, FairQueue
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._kv = KVBlocks(config)
        self._slots = AdapterSlots(
            config.max_resident_adapters, _room(config, self._kv), loads_at_once=config.adapters_load_at_once
        )
        self._desk = AdapterDesk(self._slots, self._kv.cache)
        shares_room = config.max_adapter_pages is not None
        self._claims = AdapterClaims(self._slots, patience=config.max_num_seqs, shares_room=shares_room)
        self._queue = FairQueue()
        self._roster = Roster(self._kv, self._slots, self._claims, self._queue)
        self._admission = Admission(config, self._kv, self._slots, self._claims, self._queue, self._roster)
        self._guesses = Guesses(self._kv, self._roster)
        self._intake = Intake(config.eos_token_ids, self._kv, self._queue, self._roster)
        self._in_flight: deque[Flight] = deque()
        self._num_plans = 0
        self._num_sequences = 0
        self._time_ns = 0

    # --- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue the samples of a request.

        Raises: PromptTooLong, InvalidRequest, AdapterError, AdapterTooLarge (it could never run), QueueFull (never for
        a request that goes on with tokens it has: somebody is reading its answer).
        """
        if request.request_id in self._roster.requests:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request that has not ended")
        check_request(request, self.config, self._slots)
        if not request.resumed_output_token_ids:
            self._check_queue()
        siblings = tuple(self._new_sequence(request, index) for index in range(request.params.n))
        self._roster.enter(siblings)
        for seq in siblings:
            ending = seq.ending(self.config.eos_token_ids) if seq.outputs else None
            if ending is not None:  # resumed, and cut off after its last token
                self._roster.end(seq, ending)

    def _check_queue(self) -> None:
        limit = self.config.max_queued_requests
        num_queued = len(self._roster.unserved)
        if num_queued >= limit:
            raise QueueFull(f"{num_queued} requests wait and max_queued_requests is {limit}; try again later")

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        self._num_sequences += 1
        seq = Sequence(
            self._num_sequences,
            request,
            request.sample_index + index,
            max_tokens_total=max_tokens_total(request, self.config),
            cache_namespace=self.config.cache_namespace,
            long_from=self.config.long_from,
            recomputes_long=self.config.recomputes_long,
        )
        seq.token_cost = token_cost(0 if request.adapter is None else self._slots.num_bytes(request.adapter))
        seq.waiting_since_ns = self._time_ns
        return seq

    def finish(self, request_id: str, sample_index: int, reason: FinishReason) -> None:
        """End a sequence for a reason found outside (a stop string). Nothing happens if it has ended."""
        for seq in self._roster.requests.get(request_id, ()):
            if seq.sample_index == sample_index and seq.state is not SequenceState.FINISHED:
                self._roster.end(seq, Ending(reason))

    def take_updates(self) -> tuple[SequenceUpdate, ...]:
        """Endings that no commit has returned: of `finish`, of aborts, of requests that were over when they came."""
        updates = tuple(self._roster.updates)
        self._roster.updates.clear()
        return updates

    # --- adapters --------------------------------------------------------------------------------------------------

    def add_adapter(self, key: str, num_bytes: int, runs: tuple[int, ...] = ()) -> None:
        """The host image of this adapter version is there; in pages, it needs `runs` of so many neighbours.

        Raises: AdapterError if it was there with another size.
        """
        self._slots.add(key, num_bytes, runs)

    def remove_adapter(self, key: str) -> bool:
        """Forget an adapter. Returns: whether it is forgotten (or never was known), so that its host image may go.

        False while a sequence or a plan in flight uses it, or a caller has pinned it. If it is only resident, the next
        plan evicts it; call again when `droppable_adapters` names it.
        """
        return self._desk.remove(key, self._adapters_in_flight())

    def droppable_adapters(self) -> tuple[str, ...]:
        """Adapters that no sequence uses, that are not resident, and that no plan in flight or to come names."""
        return self._desk.droppable(self._adapters_in_flight())

    def _adapters_in_flight(self) -> set[str]:
        return {op.adapter for flight in self._in_flight for op in flight.plan.adapter_ops}

    def preload_adapter(self, key: str) -> bool:
        """Load a known adapter with the next plan. Returns: whether there is room without evicting anybody."""
        return self._desk.preload(key, self.config.num_blocks // HEADROOM_DIVISOR)

    def pin_adapter(self, key: str) -> None:
        """Never evict it until `unpin_adapter`. Raises: AdapterError if it is not resident, or the pin is too much."""
        self._slots.keep(key)

    def unpin_adapter(self, key: str) -> None:
        self._slots.stop_keeping(key)

    # --- a step ----------------------------------------------------------------------------------------------------

    def schedule(self, events: StepEvents) -> StepPlan | None:
        """The next step. None: nothing can be done now, or `pipeline_depth` plans are in flight.

        A plan without rows loads or evicts adapters, or only asks whether a copy has finished (when nothing can run
        before that): the runner may wait for one in `result()`.
        """
        self._take_note(events)
        if len(self._in_flight) >= self.config.pipeline_depth:
            return None
        draft = PlanDraft(self._num_plans + 1, self.config.max_num_batched_tokens)
        draft.adapter_ops.extend(self._desk.ops)
        guessing = self._continue_running(draft)
        self._admission.run(draft)
        self._guesses.run(guessing, draft, lacks_room=self._admission.lacks_room)
        must_poll = not self._in_flight and (
            (len(self._queue) > 0 and self._slots.is_copying) or self._desk.is_preloading()
        )
        if not (draft.has_rows or draft.adapter_ops or must_poll):
            return None
        flight = draft.build(self._roster.ends)
        self._roster.ends.clear()
        self._desk.ops.clear()
        self._num_plans += 1
        self._in_flight.append(flight)
        return flight.plan

    def _take_note(self, events: StepEvents) -> None:
        self._time_ns = events.time_ns
        for key in events.copied:
            self._slots.copied(key)
        for request_id in events.aborts:
            self._roster.abort(request_id)

    def _continue_running(self, draft: PlanDraft) -> list[tuple[int, Sequence]]:
        """Decode first, then prompts under way. Oldest first: whoever is preempted has no slice in the draft yet.

        Returns: sequences that could guess, with the places of their slices in the draft.
        """
        prefills: list[Sequence] = []
        guessing: list[tuple[int, Sequence]] = []
        for seq in tuple(self._roster.running):
            num_rows = seq.num_to_compute
            if seq.is_outgrown:
                if not seq.num_pending and seq.state is SequenceState.RUNNING:
                    self._roster.preempt(seq, self._time_ns)
            elif num_rows > 1:
                if seq.state is SequenceState.RUNNING and self._make_room(seq, draft):
                    prefills.append(seq)
            elif num_rows == 1 and seq.state is SequenceState.RUNNING and self._make_room(seq, draft):
                if seq.may_guess:
                    guessing.append((draft.num_slices, seq))
                draft.add(seq, 1)
        for seq in prefills:
            num_rows = min(seq.num_to_compute, draft.rows_left, self._kv.extend(seq))
            if num_rows and seq.state is SequenceState.RUNNING:
                draft.add(seq, num_rows)
        return guessing

    def _make_room(self, seq: Sequence, draft: PlanDraft) -> bool:
        """A block for the next token of `seq`: from idle adapters, or by preempting the newest. False: not now."""
        while not self._kv.grow(seq):
            evictions = self._slots.yield_pages(1)
            if evictions:
                draft.adapter_ops.extend(evictions)
                continue
            if self._roster.retiring:
                return False  # their blocks come back soon: nobody else has to go
            victim = self._roster.running[-1]
            self._roster.preempt(victim, self._time_ns)
            if victim is seq:
                return False
        return True

    def commit(self, plan: StepPlan, result: StepResult) -> tuple[SequenceUpdate, ...]:
        """Take in what the oldest plan in flight produced. Returns: one update per sequence that gained a token."""
        flight = self._in_flight.popleft()
        assert flight.plan is plan, f"plan {plan.plan_id} is committed before plan {flight.plan.plan_id}"
        assert result.plan_id == plan.plan_id, f"result of plan {result.plan_id} for plan {plan.plan_id}"
        for key in result.copied:
            self._slots.copied(key)
        num_earlier = len(self._roster.updates)
        samples, vectors = iter(result.samples), iter(result.vectors)
        for seq, piece in zip(flight.sequences, plan.slices, strict=True):
            sample = next(samples) if piece.output is RowOutput.SAMPLE else None
            seq.num_in_flight -= 1
            if sample is not None:
                assert sample.seq_id == piece.seq_id, "samples follow the order of the slices"
                seq.drop_pending(1 + piece.num_guesses)
            vector = next(vectors) if piece.output.is_vector else None
            if seq.state is not SequenceState.FINISHED:  # else: found late; what it computed since does not count
                self._intake.take_in(seq, piece, sample, vector)
            if self._roster.retiring:
                self._roster.settle(seq)
        self._kv.release(flight.held_blocks)
        updates = tuple(self._roster.updates[num_earlier:])
        del self._roster.updates[num_earlier:]
        return updates

    def abandon(self, plan: StepPlan) -> None:
        """The host failed before the device ran `plan`: it and all later plans are void.

        Their sequences are preempted and tried again. The runner may or may not have begun with them, so the next plan
        repeats their `ends` and evicts what they loaded: the runner must take such a repetition for done already.
        """
        assert any(flight.plan is plan for flight in self._in_flight), f"plan {plan.plan_id} is not in flight"
        abandoned: list[Flight] = []
        while not abandoned or abandoned[-1].plan is not plan:
            abandoned.append(self._in_flight.pop())
        for flight in abandoned:
            for seq, piece in zip(flight.sequences, flight.plan.slices, strict=True):
                seq.num_in_flight -= 1
                seq.num_computed_tokens = piece.position
                if piece.output is RowOutput.SAMPLE:
                    seq.drop_pending(1 + piece.num_guesses)
            self._kv.release(flight.held_blocks)
        for seq in (seq for flight in abandoned for seq in flight.sequences):
            if seq.state is SequenceState.RUNNING:
                self._roster.preempt(seq, self._time_ns)
            self._roster.settle(seq)
        for flight in abandoned:
            self._roster.ends.update(dict.fromkeys(flight.plan.ends))
            named = {op.adapter for op in flight.plan.adapter_ops}
            for seq in self._queue.sequences():
                if seq.request.adapter in named:
                    self._claims.drop(seq)
            self._desk.undo(flight.plan.adapter_ops)
        self._desk.load_again()

    # --- what it tells ---------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Whether there is anything to schedule, to commit or to take."""
        return bool(self._roster.requests or self._in_flight or self._roster.updates or self._desk.has_work())

    def owners(self, plan: StepPlan) -> tuple[tuple[str, int], ...]:
        """Request id and sample index of each slice of a plan in flight, in their order."""
        flight = next(flight for flight in self._in_flight if flight.plan is plan)
        return tuple((seq.request.request_id, seq.sample_index) for seq in flight.sequences)

    def stats(self) -> SchedulerStats:
        waiting = self._queue.sequences()
        return SchedulerStats(
            waiting=len(waiting),
            running=len(self._roster.running),
            in_flight=len(self._in_flight),
            max_wait_ns=max((self._time_ns - seq.waiting_since_ns for seq in waiting), default=0),
            free_blocks=self._kv.pool.num_free,
            num_blocks=self.config.num_blocks - 1,
            cached_blocks=self._kv.pool.num_cached,
            resident_adapters=self._slots.resident(),
            resident_bytes=self._slots.used_bytes,
            pinned_adapters=self._slots.kept(),
            adapter_pages=sum(1 for _ in self._slots.pages()),
            adapter_loads=self._slots.num_loads,
            adapter_evictions=self._slots.num_evictions,
            preemptions=self._roster.num_preemptions,
            prefix_hit_tokens=self._kv.hit_tokens,
            prefix_lookup_tokens=self._kv.lookup_tokens,
            guessed_tokens=self._guesses.num_guessed,
            guessed_right_tokens=self._intake.num_guessed_right,
        )

    def check_invariants(self) -> None:
        """Asserts the invariants of every part: for tests, in O(everything)."""
        assert len(self._in_flight) <= self.config.pipeline_depth
        assert self._roster.num_seats_taken <= self.config.max_num_seqs
        self._roster.check_invariants(self.config.block_size)
        holders = [*self._roster.running, *self._roster.retiring.values()]
        held_blocks = [block for flight in self._in_flight for block in flight.held_blocks]
        adapter_pages = list(self._slots.pages())
        self._kv.check_invariants(holders, held_blocks, adapter_pages)
        most, least = self.config.max_adapter_pages or 0, self.config.min_adapter_pages
        assert len(adapter_pages) <= most, f"adapters hold {len(adapter_pages)} of at most {most} pages"
        used = 0 if self.config.max_adapter_pages is None else self._slots.room.used
        assert len(adapter_pages) == used, f"adapters hold {len(adapter_pages)} pages and count {used}"
        for_sequences = self.config.num_blocks - 1 - max(least, len(adapter_pages))
        num_held = self.config.num_blocks - 1 - self._kv.pool.num_free - len(adapter_pages)
        assert num_held <= for_sequences, f"sequences hold {num_held} of at most {for_sequences} blocks"
        self._slots.check_invariants()
        self._queue.check_invariants()
        self._claims.check_invariants(self._queue.sequences())
        in_flight = [seq.seq_id for flight in self._in_flight for seq in flight.sequences]
        for seq in holders:
            assert seq.num_in_flight == in_flight.count(seq.seq_id), seq


def _room(config: SchedulerConfig, kv: KVBlocks) -> AdapterRoom:
    if config.max_adapter_pages is None:
        return ByteRoom(config.adapter_bytes)
    return PageRoom(kv.pool, config.max_adapter_pages, config.min_adapter_pages)
