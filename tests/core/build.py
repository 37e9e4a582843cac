"""Short ways to build what the tests of the scheduler need, and to run it step by step."""

from __future__ import annotations

from collections.abc import Iterator

from engine.core.limits import SchedulerConfig
from engine.core.plan import RowOutput, Sample, StepEvents, StepPlan, StepResult
from engine.core.scheduler import Scheduler
from engine.core.sequence import SequenceUpdate
from engine.request import Request, SamplingParams

WORD = 100  # what every sample is, unless a test says otherwise


def config(**changes: object) -> SchedulerConfig:
    settings: dict[str, object] = {
        "num_blocks": 101,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "max_queued_requests": 1000,
        "adapter_bytes": 100,
        "max_resident_adapters": 4,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "pipeline_depth": 1,
        "eos_token_ids": (2,),
        "cache_namespace": "base",
    }
    return SchedulerConfig(**{**settings, **changes})  # type: ignore[arg-type]


def request(name: str, num_prompt: int = 4, max_tokens: int | None = 4, **changes: object) -> Request:
    params = {key: changes.pop(key) for key in ("n", "min_tokens", "ignore_eos", "stop_token_ids") if key in changes}
    settings: dict[str, object] = {
        "request_id": name,
        "prompt_token_ids": tuple(range(10, 10 + num_prompt)),
        "params": SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        "seed": 0,
    }
    return Request(**{**settings, **changes})  # type: ignore[arg-type]


def result(plan: StepPlan, token: int = WORD) -> StepResult:
    """What a device answers whose samples are all `token` and whose copies are done at once."""
    samples = [Sample(piece.seq_id, (token,)) for piece in plan.slices if piece.output is RowOutput.SAMPLE]
    return StepResult(plan.plan_id, tuple(samples), tuple(op.adapter for op in plan.adapter_ops))


def step(scheduler: Scheduler, token: int = WORD) -> tuple[StepPlan, tuple[SequenceUpdate, ...]]:
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    return plan, scheduler.commit(plan, result(plan, token))


def run(scheduler: Scheduler, max_steps: int = 1000) -> Iterator[tuple[StepPlan, tuple[SequenceUpdate, ...]]]:
    """Steps until there is nothing to do; the invariants hold after each."""
    for _ in range(max_steps):
        if not scheduler.has_work():
            return
        yield step(scheduler)
        scheduler.check_invariants()
    raise AssertionError(f"not done after {max_steps} steps")


def order_of_ends(scheduler: Scheduler) -> list[str]:
    """Request ids in the order in which they end."""
    return [u.request_id for _, updates in run(scheduler) for u in updates if u.finish_reason is not None]
