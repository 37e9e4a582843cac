"""What may wait, what is refused at once, and who goes first."""

from __future__ import annotations

import pytest

from engine.core.plan import AdapterLoad, StepEvents, StepResult
from engine.core.scheduler import Scheduler
from engine.errors import AdapterError, AdapterTooLarge, ConfigError, InvalidRequest, PromptTooLong, QueueFull
from engine.request import FinishReason
from tests.core.build import config, order_of_ends, request, run, step


def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(config(max_model_len=16))
    scheduler.add(request("fits", 15))
    with pytest.raises(PromptTooLong, match=r"16 tokens.*max_model_len is 16; shorten the prompt to 15 tokens"):
        scheduler.add(request("long", 16))


def test_a_prompt_larger_than_the_whole_kv_cache_is_refused_with_the_numbers() -> None:
    scheduler = Scheduler(config(num_blocks=4))
    scheduler.add(request("fits", 12))
    with pytest.raises(PromptTooLong, match=r"13 tokens and needs 4 KV blocks of 4 tokens, but there are 3.*raise kv"):
        scheduler.add(request("long", 13))


def test_without_chunking_a_prompt_must_fit_into_one_step() -> None:
    scheduler = Scheduler(config(enable_chunked_prefill=False, max_num_batched_tokens=8))
    scheduler.add(request("fits", 8))
    with pytest.raises(PromptTooLong, match=r"9 tokens.*max_num_batched_tokens is 8.*enable_chunked_prefill"):
        scheduler.add(request("long", 9))


def test_a_request_that_can_never_fit_fails_alone() -> None:
    scheduler = Scheduler(config(num_blocks=4))
    scheduler.add(request("a"))
    with pytest.raises(PromptTooLong):
        scheduler.add(request("long", 50))
    scheduler.add(request("b"))
    assert order_of_ends(scheduler) == ["a", "b"]


def test_an_empty_prompt_and_an_id_in_use_are_refused_by_the_name_of_the_field() -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a"))
    with pytest.raises(InvalidRequest, match="prompt_token_ids: the prompt has no tokens"):
        scheduler.add(request("b", 0))
    with pytest.raises(InvalidRequest, match="request_id: 'a' is in use"):
        scheduler.add(request("a"))


def test_one_request_more_than_may_wait_is_refused_and_can_come_back() -> None:
    scheduler = Scheduler(config(max_queued_requests=2))
    scheduler.add(request("a", n=3))
    scheduler.add(request("b"))
    with pytest.raises(QueueFull, match="2 requests wait and max_queued_requests is 2"):
        scheduler.add(request("c"))
    step(scheduler)
    scheduler.add(request("c"))


def test_a_request_that_goes_on_is_not_refused_for_a_full_queue() -> None:
    scheduler = Scheduler(config(max_queued_requests=1))
    scheduler.add(request("a"))
    scheduler.add(request("b", resumed_output_token_ids=(7,)))
    with pytest.raises(QueueFull):
        scheduler.add(request("c"))


def test_an_adapter_must_be_known_and_fit_into_the_budget() -> None:
    scheduler = Scheduler(config(adapter_bytes=10))
    with pytest.raises(AdapterError, match="'ada' is not known"):
        scheduler.add(request("a", adapter="ada"))
    scheduler.add_adapter("ada", 11)
    with pytest.raises(AdapterTooLarge, match="'ada' has 11 bytes, but adapter_bytes is 10"):
        scheduler.add(request("a", adapter="ada"))
    assert scheduler.droppable_adapters() == ("ada",)
    with pytest.raises(AdapterError, match="12 bytes now and had 11"):
        scheduler.add_adapter("ada", 12)


def test_adapters_can_be_turned_off() -> None:
    scheduler = Scheduler(config(max_resident_adapters=0))
    scheduler.add_adapter("ada", 1)
    with pytest.raises(AdapterTooLarge, match="max_resident_adapters is 0"):
        scheduler.add(request("a", adapter="ada"))


def test_resumed_outputs_need_one_sample_and_must_fit() -> None:
    scheduler = Scheduler(config())
    with pytest.raises(InvalidRequest, match=r"resumed_output_token_ids: given with n=2"):
        scheduler.add(request("a", n=2, resumed_output_token_ids=(1,)))
    with pytest.raises(InvalidRequest, match=r"resumed_output_token_ids: 5 tokens.*allow 4"):
        scheduler.add(request("a", resumed_output_token_ids=(1,) * 5))


@pytest.mark.parametrize(("token", "reason"), [(2, FinishReason.STOP), (7, FinishReason.LENGTH)])
def test_a_request_cut_off_after_its_last_token_ends_at_once_when_resumed(token: int, reason: FinishReason) -> None:
    scheduler = Scheduler(config())
    scheduler.add(request("a", resumed_output_token_ids=(1, 1, 1, token)))
    (update,) = scheduler.take_updates()
    assert (update.token_ids, update.finish_reason) == ((), reason)
    assert not scheduler.has_work()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"num_blocks": 1}, "num_blocks=1 must be at least 2"),
        ({"adapter_bytes": -1}, "must not be negative; 0 turns LoRA off"),
        ({"max_num_batched_tokens": 7}, "max_num_batched_tokens=7 is less than max_num_seqs=8"),
    ],
)
def test_limits_that_cannot_work_are_refused_with_the_remedy(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_within_a_tenant_first_come_is_first_served() -> None:
    scheduler = Scheduler(config(max_num_seqs=1))
    names = [f"r{index}" for index in range(6)]
    for index, name in enumerate(names):
        scheduler.add(request(name, tenant="t", max_tokens=1 + index % 3))
    assert order_of_ends(scheduler) == names


def test_a_long_prompt_is_cut_into_the_rows_that_decoding_leaves() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8, max_num_seqs=2))
    scheduler.add(request("a", 4, max_tokens=8))
    step(scheduler)
    scheduler.add(request("b", 16))
    rows = [[piece.num_rows for piece in step(scheduler)[0].slices] for _ in range(3)]
    assert rows == [[1, 7], [1, 7], [1, 2]]


def test_without_chunking_a_prompt_waits_for_a_step_with_room_and_is_not_overtaken() -> None:
    scheduler = Scheduler(config(max_num_batched_tokens=8, enable_chunked_prefill=False))
    scheduler.add(request("a", 4, max_tokens=3))
    step(scheduler)
    scheduler.add(request("b", 8))
    scheduler.add(request("c", 1))
    rows = [[piece.num_rows for piece in step(scheduler)[0].slices] for _ in range(4)]
    assert rows == [[1], [1], [8], [1, 1]]


def test_requests_whose_adapter_is_cold_hold_up_nobody() -> None:
    scheduler = Scheduler(config())
    scheduler.add_adapter("cold", 10)
    scheduler.add(request("cold", adapter="cold", tenant="t"))
    scheduler.add(request("base", tenant="t"))
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    assert plan.adapter_ops == (AdapterLoad("cold", 1),)
    assert [piece.seq_id for piece in plan.slices] == [2]
    assert plan.lora_segments == ()


def test_one_copy_serves_all_who_wait_for_it_and_an_empty_plan_asks_for_it() -> None:
    scheduler = Scheduler(config())
    scheduler.add_adapter("ada", 10)
    scheduler.add(request("a", adapter="ada"))
    scheduler.add(request("b", adapter="ada"))
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    assert (plan.adapter_ops, plan.slices) == ((AdapterLoad("ada", 1),), ())
    scheduler.commit(plan, StepResult(plan.plan_id))
    poll = scheduler.schedule(StepEvents())
    assert poll is not None
    assert (poll.slices, poll.adapter_ops) == ((), ())
    scheduler.commit(poll, StepResult(poll.plan_id))
    joined = scheduler.schedule(StepEvents(copied=("ada",)))
    assert joined is not None
    assert [piece.lora_slot for piece in joined.slices] == [1, 1]
    assert [(s.row_start, s.row_end, s.slot) for s in joined.lora_segments] == [(0, 8, 1)]


def test_an_adapter_that_is_not_copied_serves_rows_of_the_step_that_loads_it() -> None:
    scheduler = Scheduler(config(adapters_load_at_once=True))
    scheduler.add_adapter("k", 10)
    scheduler.add(request("a", adapter="k"))
    plan, _ = step(scheduler)
    assert [op.adapter for op in plan.adapter_ops] == ["k"]
    assert [piece.lora_slot for piece in plan.slices] == [plan.adapter_ops[0].lora_slot]


def test_a_request_whose_adapter_finds_no_slot_is_not_overtaken_for_ever() -> None:
    """Two tenants keep the only slot busy with their common adapter; a third one's must get its turn."""
    scheduler = Scheduler(config(max_resident_adapters=1, max_num_seqs=2))
    for key in ("hot", "rare"):
        scheduler.add_adapter(key, 10)
    scheduler.add(request("hot0", adapter="hot", tenant="a", max_tokens=3))
    step(scheduler)
    scheduler.add(request("rare", adapter="rare", tenant="b"))
    ended: list[str] = []
    for index in range(1, 60):
        scheduler.add(request(f"hot{index}", adapter="hot", tenant="ab"[index % 2], max_tokens=3))
        _, updates = step(scheduler)
        ended.extend(update.request_id for update in updates if update.finish_reason)
        scheduler.check_invariants()
    assert "rare" in ended
    assert ended.index("rare") < 10


def test_a_large_adapter_gets_its_bytes_although_small_ones_keep_coming() -> None:
    scheduler = Scheduler(config(adapter_bytes=10, max_num_seqs=4))
    for index in range(8):
        scheduler.add_adapter(f"small{index}", 3)
    scheduler.add_adapter("large", 10)
    scheduler.add(request("s", adapter="small0"))
    step(scheduler)
    scheduler.add(request("large", adapter="large", tenant="zzz"))
    ended: list[str] = []
    for index in range(80):
        scheduler.add(request(f"s{index}", adapter=f"small{index % 8}", tenant=f"t{index % 3}", max_tokens=6))
        _, updates = step(scheduler)
        ended.extend(update.request_id for update in updates if update.finish_reason)
        scheduler.check_invariants()
    assert "large" in ended


def test_an_adapter_in_use_is_not_removed_and_an_idle_one_is_evicted_first() -> None:
    scheduler = Scheduler(config())
    scheduler.add_adapter("ada", 10)
    scheduler.add(request("a", adapter="ada"))
    assert not scheduler.remove_adapter("ada")
    assert sum(len(updates) for _, updates in run(scheduler)) == 4
    assert scheduler.stats().resident_adapters == ("ada",)
    assert not scheduler.remove_adapter("ada")
    plan, _ = step(scheduler)
    assert [op.adapter for op in plan.adapter_ops] == ["ada"]
    assert scheduler.droppable_adapters() == ("ada",)
    assert scheduler.remove_adapter("ada")
    assert scheduler.remove_adapter("never known")
