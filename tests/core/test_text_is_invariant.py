"""The text of a request does not depend on what else runs, nor on how its tokens are cut into steps and blocks.

Ten thousand random workloads over tiny pools (half of them by default), with every text compared to that of the request
alone. To look at one:
    python -c "from tests.core.play import play; from tests.support.strategies import random_workload as w; play(w(7))"
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.play import Player, play
from tests.support.strategies import Workload, draw_workload, random_workload, window_workload, with_numbers

NUM_SHARDS = 10
WORKLOADS_PER_SHARD = 1000
SHARDS = [pytest.param(shard, marks=pytest.mark.slow) if shard >= 5 else shard for shard in range(NUM_SHARDS)]


@pytest.mark.parametrize("shard", SHARDS)
def test_text_is_invariant_under_everything_the_scheduler_does(shard: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(shard * WORKLOADS_PER_SHARD, (shard + 1) * WORKLOADS_PER_SHARD):
        try:
            counts.update(play(random_workload(seed)))
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error}") from error
    happened = {name for name, count in counts.items() if count >= 20}
    interesting = {"preemptions", "hits", "copies", "adapter_ops", "mixed", "abandoned", "polls", "refused"}
    interesting |= {"paged_loads", "preloads", "pins"}
    assert happened >= interesting | {"queue_full", "stop", "length", "abort", "error"}, counts


@pytest.mark.parametrize("shard", range(4))
def test_text_is_invariant_where_every_layer_has_a_window(shard: int) -> None:
    """The device reads what is in sight and nothing else; no sequence holds more than its formula says."""
    counts: Counter[str] = Counter()
    for seed in range(shard * 400, (shard + 1) * 400):
        try:
            counts.update(play(window_workload(seed)))
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error}") from error
    interesting = {"preemptions", "hits", "copies", "adapter_ops", "mixed", "abandoned", "refused", "paged_loads"}
    assert {name for name, count in counts.items() if count >= 20} >= interesting, counts
    assert counts["dropped"] > 5000, counts


@pytest.mark.parametrize("draw", [random_workload, window_workload])
def test_numbers_are_invariant_and_leave_the_texts_beside_them_alone(draw: Callable[[int], Workload]) -> None:
    """A vector of all rows sees each of them once, whatever was cached, cut, preempted or given up on the way."""
    counts: Counter[str] = Counter()
    for seed in range(500):
        try:
            counts.update(play(with_numbers(draw(seed))))
        except Exception as error:
            raise AssertionError(f"workload {seed}: {error}") from error
    interesting = {"preemptions", "hits", "mixed", "abandoned", "refused", "vectors", "stop", "abort"}
    assert {name for name, count in counts.items() if count >= 20} >= interesting, counts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(rng=st.randoms(use_true_random=False), seed=st.integers(0, 5))
def test_text_is_invariant_in_small_workloads(rng: random.Random, seed: int) -> None:
    play(draw_workload(rng, seed))


@pytest.mark.parametrize("seed", range(40))
def test_same_calls_give_the_same_plans(seed: int) -> None:
    first, second = Player(random_workload(seed)), Player(random_workload(seed))
    first.play()
    second.play()
    assert first.plans == second.plans
