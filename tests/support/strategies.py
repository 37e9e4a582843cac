"""Random workloads for the scheduler: so small and so alike that collisions are the norm."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from engine.core.limits import SchedulerConfig
from engine.pooling import NextToken, Numbers, Pool, Pooling
from engine.request import Request, SamplingParams
from tests.support.hash_model import EOS, STOP, Habits, expected_tokens

MAX_ABANDONED = 40  # of a workload with windows
ADAPTER_UNIT = 1 << 20  # so that loads and ranks count in the fairness
ADAPTERS = {"ada": 1 * ADAPTER_UNIT, "bob": 2 * ADAPTER_UNIT, "cyd": 3 * ADAPTER_UNIT, "dan": 5 * ADAPTER_UNIT}
ADAPTER_RUNS = {"ada": (1,), "bob": (1, 1), "cyd": (2, 1), "dan": (3, 1, 1)}  # pages, where adapters live in them


@dataclass(frozen=True)
class Workload:
    """Everything that happens from outside, by step. `seed` also drives the chances taken while it is played."""

    seed: int
    config: SchedulerConfig
    requests: tuple[tuple[int, Request], ...]  # (step of arrival, request), ascending
    aborts: tuple[tuple[int, str], ...] = ()
    finishes: tuple[tuple[int, str, int], ...] = ()  # (step, request id, sample index)
    abandon_percent: int = 0
    max_abandoned: int = 1_000_000  # plans, after which all goes well
    pin_percent: int = 0  # chance that a caller preloads, pins or unpins an adapter, at each step
    copy_steps: int = 0
    habits: Habits = field(default_factory=Habits)
    error_seeds: frozenset[int] = field(default_factory=frozenset)


def random_config(rng: random.Random) -> SchedulerConfig:
    max_num_seqs = rng.randint(1, 5)
    num_blocks = rng.choice((3, 4, 6, 9, 14))
    max_pages = min(rng.choice((1, 2, 3, 5, 8)), num_blocks - 1) if rng.random() < 0.6 else None
    return SchedulerConfig(
        num_blocks=1 + num_blocks,
        max_adapter_pages=max_pages,
        adapters_load_at_once=max_pages is None and rng.random() < 0.5,
        min_adapter_pages=rng.randint(0, max_pages) if max_pages and rng.random() < 0.5 else 0,
        block_size=rng.randint(1, 4),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 3, 12)),
        max_model_len=rng.randint(6, 20),
        max_queued_requests=rng.choice((2, 50, 50, 50)),
        adapter_bytes=rng.choice((4, 6, 11)) * ADAPTER_UNIT,
        max_resident_adapters=rng.randint(1, 3),
        enable_prefix_caching=rng.random() < 0.8,
        enable_chunked_prefill=rng.random() < 0.7,
        pipeline_depth=rng.randint(1, 3),
        eos_token_ids=(EOS,),
        cache_namespace="base",
    )


def random_params(rng: random.Random) -> SamplingParams:
    max_tokens = rng.choice((None, 1, 2, 4, 4, 8))
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=rng.choice((0, 0, 0, min(2, max_tokens or 2))),
        n=rng.choice((1, 1, 1, 2, 3)),
        ignore_eos=rng.random() < 0.2,
        stop_token_ids=(STOP,) if rng.random() < 0.5 else (),
        prompt_lookup_num_tokens=rng.choice((0, 0, 1, 3, 8)),
    )


def random_prompt(rng: random.Random) -> tuple[int, ...]:
    """Alphabet of two; most begin alike."""
    length = rng.choice((1, 2, 3, 4, 4, 5, 6, 8, 8, 11))
    start = rng.choice(((0,) * length, (0, 1) * length))
    tail = tuple(rng.randint(0, 1) for _ in range(rng.randint(0, 2)))
    return start[: max(1, length - len(tail))] + tail


def random_request(rng: random.Random, name: str, *, habits: Habits) -> Request:
    params = random_params(rng)
    request = Request(
        request_id=name,
        prompt_token_ids=random_prompt(rng),
        params=params,
        seed=rng.randint(0, 3),
        adapter=rng.choice((None, *ADAPTERS)),
        tenant=rng.choice(("", "", "x", "y")),
        cache_salt=rng.choice(("", "", "salt")),
        sample_index=rng.choice((0, 0, 2)),
    )
    if params.n > 1 or rng.random() < 0.8:
        return request
    resumed = expected_output(request, rng.randint(1, 4), habits)
    return Request(**{**_fields(request), "resumed_output_token_ids": tuple(resumed)})


def _fields(request: Request) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__slots__}


def expected_output(
    request: Request, num_tokens: int, habits: Habits, sample: int = 0, window: int | None = None
) -> list[int]:
    """What sample number `sample` of a request must say, alone, in at most `num_tokens` tokens."""
    params = request.params
    end_ids = {*params.stop_token_ids, *(() if params.ignore_eos else (EOS,))}
    return expected_tokens(
        request.prompt_token_ids,
        request.adapter,
        request.seed,
        request.sample_index + sample,
        num_tokens if params.max_tokens is None else min(num_tokens, params.max_tokens),
        end_ids=end_ids,
        min_tokens=params.min_tokens,
        habits=habits,
        window=window,
    )


def window_workload(seed: int) -> Workload:
    """Texts of many windows, in pools of little more than one."""
    rng = random.Random(seed)
    plain = draw_workload(rng, seed)
    max_num_seqs, window = rng.randint(1, 4), rng.choice((1, 2, 3, 4, 5, 7, 9))
    config = replace(
        plain.config,
        window_tokens=window,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + rng.choice((0, 1, 1, 4)),
        max_model_len=rng.randint(12, 70),
        enable_chunked_prefill=rng.random() < 0.8,
    )
    requests = [(step, _longer(rng, request, window, plain.habits)) for step, request in plain.requests]
    # A sequence whose plan is lost begins anew, and finds nothing in the cache if the first blocks of its text are gone
    # from it: while every fifth step is lost, a text of sixty steps is hardly ever done. Then the steps are counted.
    return replace(plain, config=config, requests=tuple(requests), max_abandoned=MAX_ABANDONED)


def _longer(rng: random.Random, request: Request, window: int, habits: Habits) -> Request:
    params, prompt = request.params, request.prompt_token_ids * rng.choice((1, 1, 3, 6))
    if params.max_tokens is not None:
        params = replace(params, max_tokens=params.max_tokens * rng.choice((1, 2, 4)))
    longer = Request(**{**_fields(request), "params": params, "prompt_token_ids": prompt})
    if not request.resumed_output_token_ids:
        return longer
    resumed = expected_output(longer, len(request.resumed_output_token_ids), habits, window=window)
    return Request(**{**_fields(longer), "resumed_output_token_ids": tuple(resumed)})


NUMBERS: tuple[Numbers, ...] = (*(Pooling(pool=pool) for pool in Pool), NextToken(token_ids=(0, 1)))


def with_numbers(workload: Workload) -> Workload:
    """Half of the requests are answered by numbers."""
    rng = random.Random(workload.seed)
    requests = []
    for step, request in workload.requests:
        if rng.random() < 0.5:
            changes = {"numbers": rng.choice(NUMBERS), "params": SamplingParams(), "resumed_output_token_ids": ()}
            request = Request(**{**_fields(request), **changes})
        requests.append((step, request))
    return replace(workload, requests=tuple(requests), error_seeds=frozenset())


def random_workload(seed: int) -> Workload:
    return draw_workload(random.Random(seed), seed)


def draw_workload(rng: random.Random, seed: int) -> Workload:
    """A workload drawn from `rng`; `seed` is for the chances taken while it is played."""
    habits = Habits(end_percent=rng.choice((0, 0, 10, 30)), echo_percent=rng.choice((0, 70, 95)))
    num_requests = rng.randint(1, 7)
    steps = sorted(rng.choice((0, 0, 0, 1, 2, 4, 7, 12)) for _ in range(num_requests))
    requests = [(step, random_request(rng, f"r{index}", habits=habits)) for index, step in enumerate(steps)]
    is_rough = rng.random() < 0.4
    aborts = [(step + rng.randint(0, 9), r.request_id) for step, r in requests if is_rough and rng.random() < 0.2]
    finishes = [(step + rng.randint(1, 9), r.request_id, r.sample_index) for step, r in requests if rng.random() < 0.1]
    return Workload(
        seed=seed,
        config=random_config(rng),
        requests=tuple(requests),
        aborts=tuple(aborts),
        finishes=tuple(finishes),
        abandon_percent=rng.choice((0, 0, 0, 5, 20)),
        pin_percent=rng.choice((0, 0, 5, 20)),
        copy_steps=rng.choice((0, 0, 1, 3)),
        habits=habits,
        error_seeds=frozenset({3}) if rng.random() < 0.1 else frozenset(),
    )
