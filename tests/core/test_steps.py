"""What a step holds, what its result does, and what becomes of sequences that are cut short."""

from __future__ import annotations

import pickle

import pytest

from engine.core.plan import BlockCopy, Sample, StepEvents, StepPlan, StepResult, TokenRef
from engine.core.scheduler import Scheduler
from engine.core.sequence import TRANSITIONS, Sequence, SequenceState
from engine.request import FinishReason
from tests.core.build import WORD, config, order_of_ends, request, result, run, step


def schedule(scheduler: Scheduler, **events: tuple[str, ...]) -> StepPlan:
    plan = scheduler.schedule(StepEvents(**events))  # type: ignore[arg-type]
    assert plan is not None
    scheduler.check_invariants()
    return plan


def ends(scheduler: Scheduler) -> dict[tuple[str, int], FinishReason | None]:
    updates = [update for _, updates in run(scheduler) for update in updates]
    return {(u.request_id, u.sample_index): u.finish_reason for u in updates if u.finish_reason}


def test_a_plan_is_a_value_that_survives_pickling() -> None:
    scheduler = Scheduler(config())
    scheduler.add_adapter("ada", 10)
    scheduler.add(request("a", adapter="ada"))
    scheduler.add(request("b"))
    plan = schedule(scheduler)
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_nothing_to_do_is_no_plan() -> None:
    scheduler = Scheduler(config())
    assert scheduler.schedule(StepEvents()) is None
    assert not scheduler.has_work()


def test_rows_of_one_adapter_are_neighbours_and_segments_are_merged() -> None:
    scheduler = Scheduler(config())
    for key in ("ada", "bob"):
        scheduler.add_adapter(key, 10)
    for index, adapter in enumerate(("ada", None, "bob", "ada", None, "bob")):
        scheduler.add(request(f"r{index}", 2, adapter=adapter))
    step(scheduler)
    plan = schedule(scheduler)
    assert [piece.lora_slot for piece in plan.slices] == [0, 0, 1, 1, 2, 2]
    assert [piece.row_start for piece in plan.slices] == [0, 1, 2, 4, 6, 8]
    assert [(s.row_start, s.row_end, s.slot) for s in plan.lora_segments] == [(2, 6, 1), (6, 10, 2)]


def test_the_next_input_is_a_reference_while_the_last_sample_is_in_flight() -> None:
    scheduler = Scheduler(config(pipeline_depth=2))
    scheduler.add(request("a", 3))
    first, second = schedule(scheduler), schedule(scheduler)
    assert scheduler.schedule(StepEvents()) is None, "the pipeline is full"
    assert second.slices[0].token_ids == (TokenRef(first.plan_id, 2),)
    assert (second.slices[0].position, second.slices[0].output_position) == (3, 1)
    scheduler.commit(first, result(first))
    third = schedule(scheduler)
    assert third.slices[0].token_ids == (TokenRef(second.plan_id, 0),)


def test_a_finish_found_late_drops_the_sample_in_flight_and_frees_after_it() -> None:
    scheduler = Scheduler(config(pipeline_depth=2))
    scheduler.add(request("a", 3))
    first, second = schedule(scheduler), schedule(scheduler)
    (update,) = scheduler.commit(first, result(first, token=2))
    assert (update.token_ids, update.finish_reason) == ((2,), FinishReason.STOP)
    assert scheduler.stats().free_blocks < scheduler.stats().num_blocks
    assert scheduler.commit(second, result(second)) == ()
    assert scheduler.stats().free_blocks == scheduler.stats().num_blocks
    assert not scheduler.has_work()
    scheduler.add(request("b"))
    assert schedule(scheduler).ends == (1,)


def test_nothing_is_computed_for_a_token_beyond_the_last() -> None:
    scheduler = Scheduler(config(pipeline_depth=3))
    scheduler.add(request("a", 3, max_tokens=1))
    first = schedule(scheduler)
    assert scheduler.schedule(StepEvents()) is None
    (update,) = scheduler.commit(first, result(first))
    assert update.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("max_model_len", "num_blocks", "num_tokens"), [(10, 101, 6), (64, 3, 5)])
def test_without_max_tokens_a_sequence_ends_where_the_context_or_the_cache_does(
    max_model_len: int, num_blocks: int, num_tokens: int
) -> None:
    """With a cache of 2 x 4 tokens: 8 can be computed, and one more can be sampled from them."""
    scheduler = Scheduler(config(max_model_len=max_model_len, num_blocks=num_blocks))
    scheduler.add(request("a", 4, max_tokens=None))
    updates = [update for _, updates in run(scheduler) for update in updates]
    assert len(updates) == num_tokens
    assert updates[-1].finish_reason is FinishReason.LENGTH


def test_stop_tokens_end_a_sequence_by_their_id_but_not_before_min_tokens() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", stop_token_ids=(WORD,), min_tokens=1))
    scheduler.add(request("b", stop_token_ids=(2,), ignore_eos=True, max_tokens=2))
    updates = [update for _, updates in run(scheduler) for update in updates]
    last = {update.request_id: update for update in updates if update.finish_reason}
    assert (last["a"].finish_reason, last["a"].stop_reason) == (FinishReason.STOP, WORD)
    assert [len([u for u in updates if u.request_id == name]) for name in "ab"] == [2, 2]
    assert (last["b"].finish_reason, last["b"].stop_reason) == (FinishReason.LENGTH, None)


def test_the_newest_sequence_is_preempted_and_comes_back() -> None:
    scheduler = Scheduler(config(num_blocks=5, max_model_len=16))
    for name in "abc":
        scheduler.add(request(name, 4, max_tokens=6))
    preempted = [len(plan.ends) for plan, _ in run(scheduler)]
    assert scheduler.stats().preemptions > 0
    assert sum(preempted) > 0
    scheduler = Scheduler(config(num_blocks=5, max_model_len=16))
    for name in "abc":
        scheduler.add(request(name, 4, max_tokens=6))
    assert order_of_ends(scheduler)[0] == "a", "the oldest is never preempted for another"


def test_a_preempted_sequence_tells_the_runner_its_outputs_when_it_joins_again() -> None:
    scheduler = Scheduler(config(num_blocks=4, max_model_len=12))
    for name in "ab":
        scheduler.add(request(name, 4, max_tokens=6))
    starts = [start for plan, _ in run(scheduler) for start in plan.starts if start.seq_id == 2]
    assert [start.output_token_ids for start in starts] == [(), (WORD,)]


def test_a_reprefill_longer_than_a_step_is_cut_although_chunking_is_off() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8, enable_chunked_prefill=False))
    scheduler.add(request("a", 8, max_tokens=20, resumed_output_token_ids=(WORD,) * 12))
    rows = [plan.num_rows for plan, _ in run(scheduler)]
    assert rows == [8, 8, 4] + [1] * 7


def test_samples_of_one_prompt_compute_it_once_and_copy_the_block_they_write() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", 10, n=3))
    first, _ = step(scheduler)
    assert [(piece.num_rows, piece.block_table) for piece in first.slices] == [(10, (1, 2, 3))]
    second, _ = step(scheduler)
    assert [(piece.num_rows, piece.block_table) for piece in second.slices] == [
        (1, (1, 2, 3)),
        (1, (1, 2, 4)),
        (1, (1, 2, 5)),
    ]
    assert second.block_copies == (BlockCopy(3, 4), BlockCopy(3, 5))
    assert [start.sample_index for start in second.starts] == [1, 2]
    assert ends(scheduler) == {("a", index): FinishReason.LENGTH for index in range(3)}


def test_samples_need_no_copy_when_the_last_prompt_token_opens_a_block() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", 9, n=2))
    step(scheduler)
    second, _ = step(scheduler)
    assert second.block_copies == ()
    assert second.slices[1].block_table == (1, 2, 4)


def test_eight_samples_hold_one_prompt_and_their_own_tails() -> None:
    """Here each but the first also holds a copy of the prompt's last block, whose last token it computes again."""
    limits = {"block_size": 16, "max_num_batched_tokens": 1024, "max_model_len": 1024}
    scheduler = Scheduler(config(num_blocks=400, **limits))
    scheduler.add(request("a", 512, max_tokens=24, n=8))
    most = max(399 - scheduler.stats().free_blocks for _ in run(scheduler))
    assert most <= 1.15 * (32 + 8 * 2)


@pytest.mark.parametrize("after", [0, 1])
def test_the_other_samples_go_on_when_the_first_is_ended(after: int) -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", 10, n=3))
    for _ in range(after):
        step(scheduler)
    scheduler.finish("a", 0, FinishReason.STOP)
    scheduler.finish("a", 0, FinishReason.ABORT)
    (update,) = scheduler.take_updates()
    assert (update.sample_index, update.token_ids, update.finish_reason) == (0, (), FinishReason.STOP)
    assert ends(scheduler) == {("a", 1): FinishReason.LENGTH, ("a", 2): FinishReason.LENGTH}


def test_an_abort_ends_every_sample_exactly_once_and_frees_everything() -> None:
    scheduler = Scheduler(config(max_num_seqs=2))
    scheduler.add(request("a", 10, n=3))
    step(scheduler)
    step(scheduler)
    assert scheduler.schedule(StepEvents(aborts=("a", "unknown"))) is None
    updates = scheduler.take_updates()
    assert [(u.sample_index, u.finish_reason) for u in updates] == [(i, FinishReason.ABORT) for i in range(3)]
    assert scheduler.take_updates() == ()
    assert not scheduler.has_work()
    assert scheduler.stats().free_blocks == scheduler.stats().num_blocks


def test_a_sequence_whose_logits_are_broken_fails_alone() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    plan = schedule(scheduler)
    samples = (Sample(1, (), error="the logits are not finite"), Sample(2, (WORD,)))
    failed, other = scheduler.commit(plan, StepResult(plan.plan_id, samples))
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error is not None
    assert (failed.error.code, failed.error.message) == ("request_failed", "the logits are not finite")
    assert (other.request_id, other.finish_reason) == ("b", None)
    assert ends(scheduler) == {("b", 0): FinishReason.LENGTH}


def test_an_abandoned_plan_and_all_later_ones_are_computed_again() -> None:
    scheduler = Scheduler(config(pipeline_depth=3))
    scheduler.add(request("a", 4, max_tokens=5))
    first, second, third = schedule(scheduler), schedule(scheduler), schedule(scheduler)
    scheduler.abandon(second)
    scheduler.check_invariants()
    assert scheduler.schedule(StepEvents()) is None, "its first plan still names it"
    (update,) = scheduler.commit(first, result(first))
    assert update.token_ids == (WORD,)
    again = schedule(scheduler)
    assert again.plan_id > third.plan_id
    assert again.ends == (1,)
    assert [start.output_token_ids for start in again.starts] == [(WORD,)]
    assert [piece.num_rows for piece in again.slices] == [5]


def test_an_abandoned_load_is_evicted_before_it_is_tried_again() -> None:
    scheduler = Scheduler(config())
    scheduler.add_adapter("ada", 10)
    scheduler.add(request("a", adapter="ada"))
    scheduler.abandon(schedule(scheduler))
    scheduler.check_invariants()
    assert [type(op).__name__ for op in schedule(scheduler).adapter_ops] == ["AdapterEvict", "AdapterLoad"]


def test_a_prefix_is_computed_once_within_a_salt_and_an_adapter() -> None:
    scheduler = Scheduler(config(enable_prefix_caching=True))
    scheduler.add_adapter("ada", 10)
    num_rows = {}
    for index, changes in enumerate([{}, {}, {"cache_salt": "s"}, {"adapter": "ada"}, {"adapter": "ada"}]):
        scheduler.add(request(f"r{index}", 9, max_tokens=1, **changes))
        num_rows[index] = sum(plan.num_rows for plan, _ in run(scheduler))
    assert num_rows == {0: 9, 1: 1, 2: 9, 3: 9, 4: 1}
    stats = scheduler.stats()
    assert (stats.prefix_hit_tokens, stats.prefix_lookup_tokens) == (16, 45)


def test_the_update_tells_how_much_came_from_the_cache() -> None:
    scheduler = Scheduler(config(enable_prefix_caching=True))
    cached = []
    for name in "ab":
        scheduler.add(request(name, 8, max_tokens=1))
        cached.extend(update.num_cached_tokens for _, updates in run(scheduler) for update in updates)
    assert cached == [0, 4], "at least one prompt token is computed, and blocks are shared whole"


def test_stats_tell_how_long_the_oldest_has_waited() -> None:
    scheduler = Scheduler(config(max_num_seqs=1))
    scheduler.add(request("a"))
    scheduler.add(request("b"))
    for time_ns in (5, 12):
        plan = scheduler.schedule(StepEvents(time_ns=time_ns))
        assert plan is not None
        scheduler.commit(plan, result(plan))
    stats = scheduler.stats()
    assert (stats.waiting, stats.running, stats.max_wait_ns) == (1, 1, 12)


def test_a_plan_tells_whose_its_slices_are() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a"))
    scheduler.add(request("b", sample_index=3))
    plan = schedule(scheduler)
    assert scheduler.owners(plan) == (("a", 0), ("b", 3))


def test_only_the_transitions_of_the_table_are_possible() -> None:
    for before in SequenceState:
        for after in SequenceState:
            seq = Sequence(1, request("a"), 0, max_tokens_total=9, cache_namespace="base")
            seq.state = before
            if after in TRANSITIONS[before]:
                seq.move_to(after)
                assert seq.state is after
            else:
                with pytest.raises(AssertionError, match="is not a transition"):
                    seq.move_to(after)


def test_plans_are_committed_in_order() -> None:
    scheduler = Scheduler(config(pipeline_depth=2))
    scheduler.add(request("a"))
    schedule(scheduler)
    second = schedule(scheduler)
    with pytest.raises(AssertionError, match="plan 2 is committed before plan 1"):
        scheduler.commit(second, result(second))
