"""The synchronous engine: one scheduler, one runner, and the loop that ties them. Used by one thread at a time."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

from engine.assembly import EngineParts, limits_of, load_parts
from engine.config import EngineConfig
from engine.core.adapter_room import ByteRoom
from engine.core.adapter_slots import AdapterSlots
from engine.core.plan import StepEvents, StepPlan
from engine.core.refusals import check_request, check_tokens
from engine.core.scheduler import Scheduler
from engine.core.sequence import SequenceUpdate
from engine.errors import AdapterError, EngineDead, InvalidRequest, RequestFailed
from engine.grammar.compiler import CompiledGrammar
from engine.request import FinishReason, OutputError, Request
from engine.runner.protocol import PendingStep, StepNotLaunched
from engine.sizing.room import ALONE, Neighbours
from engine.stats import EngineStats, RequestClock, RequestMetrics, Totals

if TYPE_CHECKING:
    from engine.lora.image import AdapterImage

LAUNCH_RETRIES = 2
"""So often a step that did not launch is scheduled anew; then it loses one sequence with each further failure."""
MAX_IDLE_STEPS = 100


class Engine:
    """Runs requests to their end, one step at a time. Not thread-safe.

    `step` schedules up to `pipeline_depth` plans ahead and commits the oldest. What goes wrong:
    - StepNotLaunched: nothing ran. The plan is abandoned, its sequences are preempted and scheduled again. When that
      has failed LAUNCH_RETRIES times in a row, each further failure ends the sequence with the most rows of the failed
      plan with `request_failed`, so that the step becomes smaller until it launches.
    - anything else a runner raises is fatal: `step` raises EngineDead, now and ever after.
    """

    def __init__(
        self, config: EngineConfig, *, parts: EngineParts | None = None, neighbours: Neighbours = ALONE
    ) -> None:
        """Loads the model, unless `parts` are given, and sizes it beside its `neighbours`.

        Raises: ConfigError, ModelNotSupported.
        """
        config.validate()
        parts = parts or load_parts(config, neighbours)
        self.config = config = parts.sized_config(config)
        self._sizes = parts.sizes
        self.tokenizer = parts.tokenizer
        self.image_spec = parts.image_spec
        self.dtype = parts.dtype
        self.grammars = parts.grammars
        self._grammars_used: dict[str, CompiledGrammar] = {}  # of live requests: the runner finds them compiled
        self.limits = limits_of(config, parts)
        self._page_bytes = parts.block_bytes if config.has_adapter_pages() else 0
        self._vocab_size, self._hidden_size = parts.vocab_size, parts.hidden_size
        self._quantized_bytes = (parts.quantized_bytes, parts.quantized_16bit_bytes)
        self._runner = parts.runner
        self._scheduler = Scheduler(self.limits)
        self._in_flight: deque[tuple[StepPlan, PendingStep]] = deque()
        self._images: set[str] = set()  # keys whose image the runner holds
        self._adapter_changes: list[tuple[str, bool]] = []
        self._aborts: list[str] = []
        self._clocks: dict[str, RequestClock] = {}  # of live requests
        self._ended: list[tuple[str, RequestMetrics]] = []
        self._failures: dict[tuple[str, int], OutputError] = {}
        self._num_failed_launches = 0  # in a row
        self._num_idle_steps = 0  # in a row
        self._dead_reason: str | None = None
        self._totals = Totals()

    # ---- requests

    def check_request(self, request: Request, image: AdapterImage | None = None) -> None:
        """Whether a request could run on the idle engine, without queueing it.

        Raises: InvalidRequest naming the field, PromptTooLong, AdapterTooLarge.
        """
        check_tokens(request, self.limits, self._vocab_size, self._hidden_size)
        if request.params.grammar is not None:
            self.grammars.compiled(request.params.grammar)
        limits = self.limits
        room = ByteRoom(limits.adapter_bytes)
        if limits.max_adapter_pages is not None:
            room = ByteRoom(limits.max_adapter_pages, "pages")
        slots = AdapterSlots(limits.max_resident_adapters, room)
        if request.adapter is not None:
            num_bytes, runs = (0, ()) if image is None else self._size(image)
            slots.add(request.adapter, sum(runs) if self._page_bytes else num_bytes)
        check_request(request, limits, slots)

    def add_request(self, request: Request, image: AdapterImage | None = None) -> None:
        """Queue a request. `image` is needed unless the engine still holds that adapter version.

        Raises: InvalidRequest naming the field, PromptTooLong, QueueFull, AdapterError, AdapterTooLarge.
        """
        self._raise_if_dead()
        if request.request_id in self._clocks:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use by a request that has not ended")
        check_tokens(request, self.limits, self._vocab_size, self._hidden_size)
        spec = request.params.grammar
        grammar = None if spec is None else self.grammars.compiled(spec)
        if request.adapter is not None and request.adapter not in self._images:
            self._add_image(request.adapter, image)
        self._scheduler.add(request)
        if grammar is not None:
            self._grammars_used[request.request_id] = grammar
            resumed = request.resumed_output_token_ids
            if resumed and grammar.matcher(resumed).is_over:  # cut off after its last token
                self._scheduler.finish(request.request_id, request.sample_index, FinishReason.STOP)
        self._clocks[request.request_id] = RequestClock(
            request.params.n, len(request.prompt_token_ids), time.monotonic()
        )

    def prepare_adapter(self, image: AdapterImage) -> None:
        """Optional: do now, from any thread, what else the step that loads the adapter would do."""
        self._runner.prepare_adapter(image)

    def _add_image(self, key: str, image: AdapterImage | None) -> None:
        if image is None:
            raise AdapterError(f"adapter {key!r} is not known to this engine; give its image with the request")
        if image.key != key:
            raise AdapterError(f"the request names adapter {key!r}, but the image is that of {image.key!r}")
        self._scheduler.add_adapter(key, *self._size(image))
        self._runner.add_adapter(image)
        self._images.add(key)
        self._adapter_changes.append((key, True))

    def _size(self, image: AdapterImage) -> tuple[int, tuple[int, ...]]:
        """Bytes of an adapter, and the runs of pages that it needs."""
        if not self._page_bytes:
            return image.num_bytes, ()
        from engine.lora.pages import lay_out

        return image.num_bytes, lay_out(image.manifest, self._page_bytes).runs

    def abort(self, request_id: str) -> None:
        """End all samples of a request in the next step. Nothing happens if it has ended or never was."""
        if request_id in self._clocks:
            self._aborts.append(request_id)

    def finish(self, request_id: str, sample_index: int, reason: FinishReason) -> None:
        """End one sample for a reason found outside (a stop string). Nothing happens if it has ended."""
        self._scheduler.finish(request_id, sample_index, reason)

    # ---- adapters without a request

    def preload(self, image: AdapterImage) -> None:
        """Load an adapter with the next step. Nothing happens if there is no room without evicting another.

        An image for which there is no room is dropped again at once. Raises: AdapterError when it is not taken in.
        """
        self._raise_if_dead()
        if image.key not in self._images:
            self._add_image(image.key, image)
        if not self._scheduler.preload_adapter(image.key):
            self._drop_images()

    def pin_adapter(self, key: str) -> None:
        """Keep a resident adapter until `unpin_adapter`. Raises: AdapterError if it is none, or the pin is too much."""
        self._raise_if_dead()
        self._scheduler.pin_adapter(key)

    def unpin_adapter(self, key: str) -> None:
        """Nothing happens if it is not pinned."""
        self._scheduler.unpin_adapter(key)

    @property
    def has_work(self) -> bool:
        """Whether `step` must be called again."""
        return bool(self._aborts) or bool(self._in_flight) or self._scheduler.has_work()

    # ---- a step

    def step(self) -> tuple[SequenceUpdate, ...]:
        """Schedule, launch and commit one step; what its sequences gained.

        Raises: EngineDead when the runner failed in a way that leaves the device in an unknown state.
        """
        self._raise_if_dead()
        try:
            updates = [*self._launch(), *self._retire()]
        except Exception as error:
            self._dead_reason = f"a step failed: {type(error).__name__}: {error}"
            raise EngineDead(self._dead_reason) from error
        except BaseException:
            self._dead_reason = "a step was interrupted, so that nobody knows how far it came; make a new engine"
            raise
        self._drop_images()
        now_s = time.monotonic()
        return tuple(self._account(update, now_s) for update in updates)

    def _launch(self) -> list[SequenceUpdate]:
        """Fill the pipeline. Returns: updates of sequences that ended without a step."""
        updates: list[SequenceUpdate] = []
        while len(self._in_flight) < self.limits.pipeline_depth:
            aborts, self._aborts = tuple(self._aborts), []
            plan = self._scheduler.schedule(StepEvents(time_ns=time.monotonic_ns(), aborts=aborts))
            updates.extend(self._scheduler.take_updates())
            if plan is None:
                self._check_progress(bool(updates))
                break
            self._num_idle_steps = 0
            self._note_starts(plan)
            try:
                pending = self._runner.submit(plan)
            except StepNotLaunched as error:
                self._abandon(plan, error)
                break
            self._num_failed_launches = 0
            self._in_flight.append((plan, pending))
        return updates

    def _check_progress(self, has_updates: bool) -> None:
        """A scheduler that has work and no plan for it would be asked for ever."""
        is_idle = not (has_updates or self._in_flight) and self._scheduler.has_work()
        self._num_idle_steps = self._num_idle_steps + 1 if is_idle else 0
        if self._num_idle_steps > MAX_IDLE_STEPS:
            raise RuntimeError(f"the scheduler has work but planned nothing {self._num_idle_steps} times in a row")

    def _retire(self) -> tuple[SequenceUpdate, ...]:
        """Wait for the oldest plan in flight and take in its result."""
        if not self._in_flight:
            return ()
        plan, pending = self._in_flight.popleft()
        result = pending.result()
        self._totals.steps += 1
        if result.waited_for_copy:
            self._totals.load_waits += bool(plan.slices)
            self._totals.idle_load_waits += not plan.slices
        return self._scheduler.commit(plan, result)

    def _abandon(self, plan: StepPlan, error: StepNotLaunched) -> None:
        self._totals.abandoned_steps += 1
        self._num_failed_launches += 1
        victim: tuple[str, int] | None = None
        if self._num_failed_launches > LAUNCH_RETRIES and plan.slices:
            sizes = [piece.num_rows for piece in plan.slices]
            victim = self._scheduler.owners(plan)[sizes.index(max(sizes))]
        self._scheduler.abandon(plan)
        if victim is not None:
            reason = f"it was part of {self._num_failed_launches} steps in a row that could not be launched: {error}"
            self._failures[victim] = OutputError(RequestFailed.code, reason)
            self._scheduler.finish(*victim, FinishReason.ERROR)
        elif self._num_failed_launches > LAUNCH_RETRIES:
            raise error  # a step without rows has nobody to give up

    def _drop_images(self) -> None:
        for key in self._scheduler.droppable_adapters():
            if self._scheduler.remove_adapter(key):
                self._runner.remove_adapter(key)
                self._images.discard(key)
                self._adapter_changes.append((key, False))

    def close(self) -> None:
        """End the runner's threads, which may be copying adapters. No step may follow."""
        self._dead_reason = self._dead_reason or "the engine was closed"
        self._runner.close()

    def _raise_if_dead(self) -> None:
        if self._dead_reason is not None:
            raise EngineDead(self._dead_reason)

    # ---- what it tells of itself

    def adapter_changes(self) -> tuple[tuple[str, bool], ...]:
        """(adapter version, whether its image is held from then on) since the last call, in the order of events.

        The memory of an image may go when the last that was told of its version is False.
        """
        changes, self._adapter_changes = tuple(self._adapter_changes), []
        return changes

    def take_ended(self) -> tuple[tuple[str, RequestMetrics], ...]:
        """Requests of which every sample has ended since the last call."""
        ended, self._ended = tuple(self._ended), []
        return ended

    def stats(self) -> EngineStats:
        now = self._scheduler.stats()
        return EngineStats(
            waiting=now.waiting,
            running=now.running,
            free_blocks=now.free_blocks,
            num_blocks=now.num_blocks,
            sizes=self._sizes,
            quantized_bytes=self._quantized_bytes[0],
            quantized_16bit_bytes=self._quantized_bytes[1],
            cached_blocks=now.cached_blocks,
            max_wait_s=now.max_wait_ns / 1e9,
            resident_adapters=now.resident_adapters,
            resident_adapter_bytes=now.resident_bytes,
            pinned_adapters=now.pinned_adapters,
            adapter_pages=now.adapter_pages,
            total_adapter_loads=now.adapter_loads,
            total_adapter_evictions=now.adapter_evictions,
            total_preemptions=now.preemptions,
            total_prefix_hit_tokens=now.prefix_hit_tokens,
            total_prefix_lookup_tokens=now.prefix_lookup_tokens,
            total_guessed_tokens=now.guessed_tokens,
            total_guessed_right_tokens=now.guessed_right_tokens,
            **self._totals.as_fields(),
        )

    def _note_starts(self, plan: StepPlan) -> None:
        if plan.starts:
            now_s = time.monotonic()
            for request_id, _ in self._scheduler.owners(plan):
                self._clocks[request_id].started(now_s)

    def _account(self, update: SequenceUpdate, now_s: float) -> SequenceUpdate:
        """Count what an update brings; the update, with the engine's own error if it is the cause."""
        self._totals.generated_tokens += len(update.token_ids)
        clock = self._clocks[update.request_id]
        is_over = update.finish_reason is not None
        is_answered = bool(update.token_ids) or update.vector is not None
        if clock.gained(
            len(update.token_ids), update.num_cached_tokens, answered=is_answered, ended=is_over, now_s=now_s
        ):
            update = update._replace(queue_s=clock.queue_s)
        if clock.num_samples_left == 0:
            del self._clocks[update.request_id]
            self._grammars_used.pop(update.request_id, None)
            metrics = clock.metrics()
            self._ended.append((update.request_id, metrics))
            self._totals.add(metrics)
        if update.finish_reason is None:
            return update
        failure = self._failures.pop((update.request_id, update.sample_index), None)
        return update if failure is None else update._replace(error=failure)
