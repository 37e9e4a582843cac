"""Plays a workload against a scheduler and the KV-checking device, and compares every text with the oracle."""

from __future__ import annotations

import contextlib
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.core.block_pool import NULL_BLOCK
from engine.core.limits import SchedulerConfig
from engine.core.plan import AdapterLoad, StepEvents, StepPlan
from engine.core.scheduler import Scheduler
from engine.core.sequence import SequenceUpdate
from engine.errors import AdapterError, AdapterTooLarge, InvalidRequest, PromptTooLong, QueueFull
from engine.pooling import Numbers
from engine.request import FinishReason, Request
from tests.support.hash_model import expected_vector
from tests.support.kv_checking_runner import FinishedStep, KVCheckingRunner
from tests.support.strategies import ADAPTER_RUNS, ADAPTERS, Workload, expected_output


@dataclass(frozen=True)
class Image:
    key: str

    @property
    def num_bytes(self) -> int:
        return ADAPTERS[self.key]

    @property
    def runs(self) -> tuple[int, ...]:
        return ADAPTER_RUNS[self.key]


@dataclass
class Text:
    """What came of one sample."""

    request: Request
    sample: int  # 0 .. n - 1
    tokens: list[int] = field(default_factory=list)
    finish: SequenceUpdate | None = None
    was_stopped_outside: bool = False


class Player:
    """One engine's life: `play()` returns how often what happened (so that a test can tell that it did happen)."""

    def __init__(self, workload: Workload, make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler) -> None:
        self.workload = workload
        self.rng = random.Random(workload.seed)
        self.scheduler = make_scheduler(workload.config)
        self.runner = KVCheckingRunner(
            workload.config,
            copy_steps=workload.copy_steps,
            habits=workload.habits,
            error_seeds=workload.error_seeds,
        )
        self.in_flight: deque[tuple[StepPlan, FinishedStep]] = deque()
        self.texts: dict[tuple[str, int], Text] = {}
        self.counts: Counter[str] = Counter()
        self.plans: list[StepPlan] = []
        self._arrivals = deque(workload.requests)
        self._aborts: list[str] = []
        self._refused: list[Request] = []

    def play(self) -> Counter[str]:
        step = 0
        while self._arrivals or self.scheduler.has_work():
            self._happen(step)
            self._want_adapters()
            num_plans = self._launch()
            self.scheduler.check_invariants()
            is_stuck = not num_plans and not self.in_flight and self.scheduler.has_work()
            assert not is_stuck, "there is work, and nothing is scheduled or in flight"
            self._drop_idle_adapters()
            if self.in_flight and (num_plans == 0 or self.rng.random() < 0.7):
                self._retire()
                self.scheduler.check_invariants()
            step += 1
            assert step < self._max_steps(), f"not done after {step} steps"
        self._check_all_is_free()
        assert all(self._can_never_run(request) for request in self._refused), self._refused
        for text in self.texts.values():
            self._check_text(text)
        stats = self.scheduler.stats()
        self.counts.update(steps=step, preemptions=stats.preemptions, hits=stats.prefix_hit_tokens)
        return self.counts

    def _max_steps(self) -> int:
        """Far more than needed one after the other, so that only what hangs or starves gets there."""
        sequences = sum(request.params.n for _, request in self.workload.requests)
        alone = self.workload.config.max_model_len + self.workload.copy_steps + 5
        patience = 12 + self.counts["abandoned"]
        return 40 + 4 * patience * sequences * alone

    # --- what comes from outside -----------------------------------------------------------------------------------

    def _happen(self, step: int) -> None:
        while self._arrivals and self._arrivals[0][0] <= step:
            self._arrive(self._arrivals.popleft()[1])
        self._aborts = [name for at, name in self.workload.aborts if at == step]
        for at, name, sample_index in self.workload.finishes:
            text = next((t for (n, i), t in self.texts.items() if (n, i) == (name, sample_index)), None)
            if at == step and text is not None and text.finish is None:
                text.was_stopped_outside = True
                self.scheduler.finish(name, sample_index, FinishReason.STOP)
                self.scheduler.finish(name, sample_index, FinishReason.STOP)  # again changes nothing

    def _arrive(self, request: Request) -> None:
        key = request.adapter
        if key is not None:
            self._add_adapter(key)
        try:
            self.scheduler.add(request)
        except QueueFull:
            self.counts["queue_full"] += 1
            return
        except (PromptTooLong, AdapterTooLarge, InvalidRequest) as error:
            self.counts["refused"] += 1
            if "beside the pinned" not in str(error) or not self.scheduler.stats().pinned_adapters:
                self._refused.append(request)
            return
        assert not self._can_never_run(request), request
        for sample in range(request.params.n):
            self.texts[request.request_id, request.sample_index + sample] = Text(request, sample)

    def _add_adapter(self, key: str) -> None:
        if key not in self.runner.images:
            self.runner.add_adapter(Image(key))
            self.scheduler.add_adapter(key, ADAPTERS[key], ADAPTER_RUNS[key])

    def _want_adapters(self) -> None:
        """A caller preloads, pins and unpins as it likes."""
        if not self._chance(self.workload.pin_percent):
            return
        key = self.rng.choice(list(ADAPTERS))
        self._add_adapter(key)
        if self.rng.random() < 0.4:
            self.scheduler.unpin_adapter(key)
        else:
            self.counts["preloads"] += self.scheduler.preload_adapter(key)
            with contextlib.suppress(AdapterError):
                self.scheduler.pin_adapter(key)
                self.counts["pins"] += 1
        self.runner.pinned = set(self.scheduler.stats().pinned_adapters)

    def _can_never_run(self, request: Request) -> bool:
        config = self.workload.config
        num_tokens = len(request.prompt_token_ids)
        return (
            num_tokens + (request.numbers is None) > config.max_model_len
            or num_tokens > self._max_kv_tokens()
            or (not config.enable_chunked_prefill and num_tokens > config.max_num_batched_tokens)
            or (request.adapter is not None and self._is_too_large(request.adapter))
            or len(request.resumed_output_token_ids) > self._max_output(request)
        )

    def _is_too_large(self, adapter: str) -> bool:
        config = self.workload.config
        if config.max_adapter_pages is None:
            return ADAPTERS[adapter] > config.adapter_bytes
        return sum(ADAPTER_RUNS[adapter]) > config.max_adapter_pages

    def _max_kv_tokens(self) -> int:
        config = self.workload.config
        num_blocks = config.num_blocks - 1 - (config.max_adapter_pages or 0)
        if config.window_tokens is not None:
            in_sight = config.window_tokens - 1 + config.pipeline_depth * config.max_num_batched_tokens
            if num_blocks >= -(-in_sight // config.block_size) + 1:
                return config.max_model_len
        return num_blocks * config.block_size

    def _max_output(self, request: Request) -> int:
        config = self.workload.config
        limit = min(config.max_model_len, self._max_kv_tokens() + 1)
        room = limit - len(request.prompt_token_ids)
        return room if request.params.max_tokens is None else min(room, request.params.max_tokens)

    def _drop_idle_adapters(self) -> None:
        if self.rng.random() < 0.2:
            for key in ADAPTERS:
                if key in self.runner.images and self.scheduler.remove_adapter(key):
                    self.runner.remove_adapter(key)

    # --- the engine's loop -----------------------------------------------------------------------------------------

    def _launch(self) -> int:
        """Fill the pipeline. Returns: the number of plans, those that the host gave up at once included."""
        num_plans = 0
        while True:
            copied = self.runner.copied() if self.rng.random() < 0.1 else ()
            plan = self.scheduler.schedule(StepEvents(aborts=tuple(self._aborts), copied=copied))
            self._aborts.clear()
            self._take(self.scheduler.take_updates())
            if plan is None:
                return num_plans
            num_plans += 1
            self.plans.append(plan)
            self._count(plan)
            if self._may_abandon():
                self._abandon(plan)
                return num_plans
            self.in_flight.append((plan, self.runner.submit(plan)))
            if self._may_abandon() and self._chance(30):
                self._abandon(self.in_flight[self.rng.randrange(len(self.in_flight))][0])
                return num_plans
            if self.rng.random() < 0.2:
                return num_plans

    def _may_abandon(self) -> bool:
        return self._chance(self.workload.abandon_percent) and self.counts["abandoned"] < self.workload.max_abandoned

    def _abandon(self, plan: StepPlan) -> None:
        """`plan` was submitted, or could not be; the later ones go with it."""
        self.counts["abandoned"] += 1
        self._want_adapters()  # after the plan was made: it is undone first
        given_up = [p for p, _ in self.in_flight if p.plan_id >= plan.plan_id]
        for _ in given_up:
            self.in_flight.pop()
        self.runner.abandon(given_up or [plan])
        self.scheduler.abandon(plan)
        self.runner.pinned = set(self.scheduler.stats().pinned_adapters)

    def _retire(self) -> None:
        plan, pending = self.in_flight.popleft()
        self._take(self.scheduler.commit(plan, pending.result()))

    def _take(self, updates: tuple[SequenceUpdate, ...]) -> None:
        for update in updates:
            text = self.texts[update.request_id, update.sample_index]
            assert text.finish is None, f"{update} after {text.finish}"
            text.tokens.extend(update.token_ids)
            if update.finish_reason is not None:
                text.finish = update
                self.counts[update.finish_reason] += 1

    def _chance(self, percent: int) -> bool:
        return percent > 0 and self.rng.random() * 100 < percent

    def _count(self, plan: StepPlan) -> None:
        self.counts["copies"] += len(plan.block_copies)
        self.counts["dropped"] += sum(NULL_BLOCK in piece.block_table for piece in plan.slices)
        self.counts["adapter_ops"] += len(plan.adapter_ops)
        self.counts["mixed"] += len({piece.lora_slot for piece in plan.slices}) > 1
        self.counts["paged_loads"] += sum(isinstance(op, AdapterLoad) and bool(op.pages) for op in plan.adapter_ops)
        self.counts["polls"] += not (plan.slices or plan.adapter_ops)

    # --- what must hold in the end ---------------------------------------------------------------------------------

    def _check_all_is_free(self) -> None:
        stats = self.scheduler.stats()
        assert (stats.waiting, stats.running, stats.in_flight) == (0, 0, 0), stats
        assert stats.free_blocks + stats.adapter_pages == stats.num_blocks, stats
        for key in stats.pinned_adapters:
            self.scheduler.unpin_adapter(key)
        self.runner.pinned.clear()
        self.scheduler.schedule(StepEvents(copied=tuple(self.runner.images)))  # copies nobody waits for any more
        for key in tuple(self.runner.images):
            if self.scheduler.remove_adapter(key):
                self.runner.remove_adapter(key)
        if (plan := self.scheduler.schedule(StepEvents())) is not None:
            self.scheduler.commit(plan, self.runner.submit(plan).result())
            assert not self.runner.sequences, f"the runner still knows {list(self.runner.sequences)}"
        for key in tuple(self.runner.images):
            assert self.scheduler.remove_adapter(key), f"adapter {key} is held by nobody and cannot be removed"
            self.runner.remove_adapter(key)
        assert self.scheduler.stats().free_blocks == stats.num_blocks, self.scheduler.stats()
        self.scheduler.check_invariants()

    def _check_vector(self, text: Text, numbers: Numbers) -> None:
        end = text.finish
        assert end is not None, text
        assert not text.tokens, f"{text}: who asks for numbers gets no tokens"
        self.counts["vectors"] += end.vector is not None
        if end.vector is None:
            assert end.finish_reason is FinishReason.ABORT or text.was_stopped_outside, text
            return
        request, window = text.request, self.workload.config.window_tokens
        prompt, all_rows = request.prompt_token_ids, numbers.needs_all_rows
        assert end.vector == expected_vector(prompt, request.adapter, all_rows=all_rows, window=window), text
        assert end.finish_reason is FinishReason.STOP, text

    def _check_text(self, text: Text) -> None:
        if text.request.numbers is not None:
            self._check_vector(text, text.request.numbers)
            return
        request, reason = text.request, text.finish.finish_reason if text.finish else None
        limit = self._max_output(request)
        window = self.workload.config.window_tokens
        expected = expected_output(request, limit, self.workload.habits, text.sample, window)
        tokens = [*request.resumed_output_token_ids, *text.tokens]
        assert tokens == expected[: len(tokens)], f"{text}: expected {expected}"
        if reason in (FinishReason.ABORT, FinishReason.ERROR):
            return
        if text.was_stopped_outside:
            assert reason in (FinishReason.STOP, FinishReason.LENGTH), text
            return
        assert tokens == expected, f"{text}: expected {expected}"
        is_stopped = len(tokens) > request.params.min_tokens and tokens[-1] in _end_ids(request)
        assert reason is (FinishReason.STOP if is_stopped else FinishReason.LENGTH), text


def _end_ids(request: Request) -> set[int]:
    return {*request.params.stop_token_ids, *(() if request.params.ignore_eos else (2,))}


def play(workload: Workload, make_scheduler: Callable[[SchedulerConfig], Scheduler] = Scheduler) -> Counter[str]:
    return Player(workload, make_scheduler).play()


MAX_WORKLOADS = 600


def first_failure(draw: Callable[[int], Workload]) -> int | None:
    """The first of so many workloads that shows a planted fault; None: it goes unnoticed."""
    for seed in range(MAX_WORKLOADS):
        try:
            play(draw(seed))
        except (AssertionError, KeyError, IndexError):
            return seed
    return None
