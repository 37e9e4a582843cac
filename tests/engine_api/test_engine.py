"""The synchronous engine: what it does with requests, adapters and runners that fail."""

from __future__ import annotations

import pytest

from engine.core.plan import StepPlan
from engine.core.scheduler import Scheduler
from engine.core.sequence import SequenceUpdate
from engine.engine import LAUNCH_RETRIES
from engine.errors import AdapterError, AdapterTooLarge, EngineDead, InvalidRequest, PromptTooLong, QueueFull
from engine.request import FinishReason
from engine.runner.protocol import StepNotLaunched
from tests.engine_api.alphabet import AlphabetRunner, make_engine, make_image, make_request, run


def test_a_request_runs_to_its_end() -> None:
    engine = make_engine()
    engine.add_request(make_request("one"))
    engine.add_request(make_request("two", "xy", n=2, max_tokens=3))
    assert run(engine) == {("one", 0): "bcdefghi", ("two", 0): "zab", ("two", 1): "zab"}


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_as_many_steps_are_in_flight_as_asked_for_and_the_text_is_the_same(depth: int) -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner, pipeline_depth=depth)
    for i in range(5):
        engine.add_request(make_request(str(i), "abc"[: i % 3 + 1], max_tokens=20 - i))
    texts = run(engine)
    assert runner.num_most_in_flight == depth
    assert texts[("2", 0)] == "defghijklmnopqrstu"


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt_token_ids", {"prompt": ""}),
        ("stop_token_ids", {"stop_token_ids": (259,)}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("resumed_output_token_ids", {"resumed_output_token_ids": (500,)}),
    ],
)
def test_an_id_the_model_cannot_compute_is_refused_by_the_name_of_its_field(param: str, fields: dict) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as raised:
        engine.add_request(make_request(**fields))
    assert raised.value.param == param
    assert not engine.has_work


def test_a_request_that_can_never_fit_fails_alone() -> None:
    engine = make_engine()
    engine.add_request(make_request("fits"))
    with pytest.raises(PromptTooLong, match="128"):
        engine.add_request(make_request("never", "a" * 200))
    assert run(engine) == {("fits", 0): "bcdefghi"}


def test_one_request_more_than_the_queue_holds_is_refused() -> None:
    engine = make_engine(max_queued_requests=2)
    engine.add_request(make_request("one"))
    engine.add_request(make_request("two"))
    with pytest.raises(QueueFull, match="max_queued_requests"):
        engine.add_request(make_request("three"))


def test_an_aborted_request_ends_and_frees_its_blocks_within_a_step() -> None:
    engine = make_engine(enable_prefix_caching=False)
    free_blocks = engine.stats().free_blocks
    engine.add_request(make_request("gone", "a" * 30, max_tokens=50))
    engine.add_request(make_request("stays"))
    engine.step()
    engine.abort("gone")
    ended = [update for update in engine.step() if update.finish_reason is not None]
    assert [(update.request_id, update.finish_reason) for update in ended] == [("gone", FinishReason.ABORT)]
    assert free_blocks - engine.stats().free_blocks == 1  # what "stays" holds
    assert run(engine)[("stays", 0)].endswith("ghi")
    assert engine.stats().free_blocks == free_blocks


def test_an_id_is_free_again_only_when_the_end_of_its_request_was_reported() -> None:
    engine = make_engine()
    engine.add_request(make_request("r"))
    engine.step()
    engine.finish("r", 0, FinishReason.STOP)
    with pytest.raises(InvalidRequest, match="request_id"):
        engine.add_request(make_request("r"))
    run(engine)
    engine.add_request(make_request("r"))
    assert run(engine) == {("r", 0): "bcdefghi"}


def test_aborting_a_request_that_is_over_or_never_was_does_nothing() -> None:
    engine = make_engine()
    engine.abort("never")
    assert not engine.has_work
    engine.add_request(make_request())
    run(engine)
    engine.abort("r")
    assert engine.step() == ()


# ---- adapters


def test_an_adapter_changes_only_the_requests_that_name_it() -> None:
    engine = make_engine()
    engine.add_request(make_request("base"))
    engine.add_request(make_request("lora", adapter="k1"), make_image("k1"))
    assert run(engine) == {("base", 0): "bcdefghi", ("lora", 0): "cegikmoq"}


def test_the_image_is_needed_only_while_the_engine_does_not_hold_it() -> None:
    engine = make_engine()
    with pytest.raises(AdapterError, match="k1"):
        engine.add_request(make_request("early", adapter="k1"))
    engine.add_request(make_request("first", adapter="k1"), make_image("k1"))
    engine.add_request(make_request("second", adapter="k1"))
    assert set(run(engine).values()) == {"cegikmoq"}


def test_an_image_of_another_adapter_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"'k1'.*'k2'"):
        make_engine().add_request(make_request(adapter="k1"), make_image("k2"))


def test_evicted_and_unused_images_are_dropped_and_reported_once() -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner, max_resident_adapters=1)
    for key in ("k1", "k2", "k3"):
        engine.add_request(make_request(key, adapter=key), make_image(key))
    run(engine)
    changes = engine.adapter_changes()
    assert [key for key, is_held in changes if is_held] == ["k1", "k2", "k3"]
    assert {key for key, is_held in changes if not is_held} == {"k1", "k2", "k3"} - set(runner.images)
    assert set(runner.images) == set(engine.stats().resident_adapters)
    assert engine.adapter_changes() == ()


def test_an_image_whose_request_was_refused_is_dropped_with_the_next_step() -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner)
    with pytest.raises(AdapterTooLarge, match="adapter_bytes"):
        engine.add_request(make_request(adapter="big"), make_image("big", 4096))
    engine.step()
    assert engine.adapter_changes() == (("big", True), ("big", False))
    assert runner.images == {}


# ---- runners that fail


def test_a_step_that_did_not_launch_is_tried_again_and_nobody_notices() -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner)
    engine.add_request(make_request("one", adapter="k1"), make_image("k1"))
    engine.add_request(make_request("two"))
    for _ in range(4):
        runner.submit_errors.extend([StepNotLaunched("out of memory")] * LAUNCH_RETRIES)
        for _ in range(LAUNCH_RETRIES):
            assert engine.step() == ()
        engine.step()
    run(engine)
    assert engine.stats().total_abandoned_steps == 4 * LAUNCH_RETRIES
    assert engine.stats().total_generated_tokens == 16
    assert dict(engine.take_ended())["one"].num_output_tokens == 8


def test_a_step_without_rows_that_never_launches_is_the_death_of_the_engine() -> None:
    """Only an adapter was to be loaded: no sequence can be given up to make it smaller."""
    engine = make_engine(AlphabetRunner(fails_with=lambda plan: StepNotLaunched("out of memory")))
    engine.preload(make_image("k1"))
    for _ in range(LAUNCH_RETRIES):
        assert engine.step() == ()
    with pytest.raises(EngineDead, match="out of memory"):
        engine.step()


def test_a_step_that_never_launches_loses_its_largest_sequence_and_the_others_go_on() -> None:
    def too_large(plan: StepPlan) -> Exception | None:
        return StepNotLaunched("out of memory") if plan.num_rows > 10 else None

    engine = make_engine(AlphabetRunner(fails_with=too_large))
    engine.add_request(make_request("small", "xyz"))
    engine.add_request(make_request("large", "a" * 20))
    engine.add_request(make_request("medium", "abc" * 2))
    updates: list[SequenceUpdate] = []
    while engine.has_work:
        updates.extend(engine.step())
    ends = {update.request_id: update for update in updates if update.finish_reason is not None}
    assert {key: end.finish_reason for key, end in ends.items()} == {
        "small": FinishReason.LENGTH,
        "large": FinishReason.ERROR,
        "medium": FinishReason.LENGTH,
    }
    error = ends["large"].error
    assert error is not None
    assert error.code == "request_failed"
    assert "out of memory" in error.message


@pytest.mark.parametrize("where", ["submit", "result"])
def test_any_other_failure_of_the_runner_is_the_death_of_the_engine(where: str) -> None:
    runner = AlphabetRunner()
    engine = make_engine(runner)
    engine.add_request(make_request())
    engine.step()
    if where == "submit":
        runner.submit_errors.append(RuntimeError("device-side assert"))
    else:
        runner.result_error = RuntimeError("device-side assert")
    with pytest.raises(EngineDead, match="device-side assert"):
        engine.step()
    with pytest.raises(EngineDead, match="device-side assert"):
        engine.step()
    with pytest.raises(EngineDead):
        engine.add_request(make_request("next"))


def test_a_scheduler_that_plans_nothing_for_its_work_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    engine.add_request(make_request())
    monkeypatch.setattr(Scheduler, "schedule", lambda self, events: None)
    with pytest.raises(EngineDead, match="planned nothing"):
        run(engine)


# ---- figures


def test_stats_count_what_happened() -> None:
    engine = make_engine()
    before = engine.stats()
    assert (before.waiting, before.running, before.total_steps, before.total_requests) == (0, 0, 0, 0)
    engine.add_request(make_request("one", max_tokens=5))
    engine.add_request(make_request("two", n=2, max_tokens=3))
    assert engine.stats().waiting == 3
    run(engine)
    after = engine.stats()
    assert (after.waiting, after.running, after.free_blocks) == (0, 0, after.num_blocks)
    assert (after.total_generated_tokens, after.total_requests) == (11, 2)
    assert after.total_steps >= 5


def test_each_request_has_metrics_of_its_own() -> None:
    engine = make_engine()
    engine.add_request(make_request("first", "abcdefghij"))
    run(engine)
    engine.add_request(make_request("again", "abcdefghij", n=2))
    run(engine)
    metrics = dict(engine.take_ended())
    assert engine.take_ended() == ()
    assert [metrics[key].num_cached_tokens for key in ("first", "again")] == [0, 8]
    again = metrics["again"]
    assert (again.num_prompt_tokens, again.num_output_tokens) == (10, 16)
    assert 0 <= again.queue_s <= again.ttft_s
    assert again.decode_s > 0
