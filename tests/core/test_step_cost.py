"""What a step costs: not what waits, not how long a prompt is; and guesses cost nobody else anything."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from engine.core.block_pool import BlockPool
from engine.core.kv_blocks import MAX_WATCHES, KVBlocks
from engine.core.lookup import MAX_PLACES, MIN_READ_TOKENS, READ_TOKENS, PromptLookup
from engine.core.plan import RowOutput, Sample, StepEvents, StepPlan, StepResult
from engine.core.prefix_watch import PrefixWatch
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from engine.errors import QueueFull
from engine.request import Request, SamplingParams
from tests.core.build import config, request, run, step
from tests.core.play import Player
from tests.support.strategies import random_workload

SALAD = (5, 6, 7, 8)


def lookup_request(name: str, num_prompt: int = 16, guesses: int = 15, max_tokens: int = 400) -> Request:
    """Goes on repeating its prompt."""
    prompt = tuple(SALAD[i % 4] for i in range(num_prompt))
    params = SamplingParams(max_tokens=max_tokens, prompt_lookup_num_tokens=guesses)
    return Request(request_id=name, prompt_token_ids=prompt, params=params, seed=0)


def repeat(scheduler: Scheduler) -> StepPlan:
    """A step of a device that goes on with 5 6 7 8, so that guesses are right."""
    plan = scheduler.schedule(StepEvents())
    assert plan is not None
    samples = []
    for piece in plan.slices:
        if piece.output is RowOutput.SAMPLE:
            next_token = SALAD[(piece.position + piece.num_rows) % 4]
            samples.append(Sample(piece.seq_id, (*piece.token_ids[piece.num_sure_rows :], next_token)))  # type: ignore[arg-type]
    copied = tuple(op.adapter for op in plan.adapter_ops)
    scheduler.commit(plan, StepResult(plan.plan_id, tuple(samples), copied))
    scheduler.check_invariants()
    return plan


def rows_of(plan: StepPlan, seq_ids: set[int]) -> int:
    return sum(piece.num_rows - piece.num_guesses for piece in plan.slices if piece.seq_id in seq_ids)


# --- guesses ---------------------------------------------------------------------------------------------------------

LIMITS = {"max_num_batched_tokens": 64, "max_model_len": 1024, "max_num_seqs": 32, "num_blocks": 1500}
ARRIVALS: dict[str, tuple[dict[str, object], list[Request]]] = {
    "a prompt of many chunks": ({}, [request("new", 300)]),
    "a prompt of one chunk": ({}, [request("new", 30)]),
    "two prompts": ({}, [request("new", 100), request("other", 100)]),
    "eight short ones": ({}, [request(f"new{i}", 12) for i in range(8)]),
    "samples of one prompt": ({}, [request("new", 100, n=4)]),
    "a prompt with an adapter": ({}, [request("new", 200, adapter="ada")]),
    "a prompt that repeats": ({}, [request("new", 300, prompt_token_ids=SALAD * 75)]),
    "one that was cut off": ({}, [request("new", 200, max_tokens=60, resumed_output_token_ids=tuple(range(50)))]),
    "another salt": ({"enable_prefix_caching": True}, [request("new", 200, cache_salt="x")]),
    "a prompt in one piece": ({"enable_chunked_prefill": False}, [request("new", 40)]),
    "a prompt that guesses itself": ({}, [lookup_request("new", 200)]),
}


def rows_given(limits: dict[str, object], arrivals: list[Request], guesses: int) -> tuple[list[int], int]:
    """Rows of those that arrive, step by step until each has its first token; and how many tokens were guessed."""
    scheduler = Scheduler(config(**{**LIMITS, **limits}))
    scheduler.add_adapter("ada", 10)
    for index in range(8):
        scheduler.add(lookup_request(f"r{index}", guesses=guesses))
    for _ in range(6):
        repeat(scheduler)
    for item in arrivals:
        item = replace(item, params=replace(item.params, prompt_lookup_num_tokens=0)) if guesses == 0 else item
        scheduler.add(item)
    new = set(range(9, 9 + sum(item.params.n for item in arrivals)))
    rows, started = [], set[int]()
    for _ in range(60):
        plan = repeat(scheduler)
        rows.append(rows_of(plan, new))
        started |= {p.seq_id for p in plan.slices if p.seq_id in new and p.output is RowOutput.SAMPLE}
        if started == new:
            return rows, scheduler.stats().guessed_tokens
    raise AssertionError(f"no first token after {len(rows)} steps: {rows}")


@pytest.mark.parametrize("name", ARRIVALS)
def test_guesses_take_no_row_that_a_prompt_could_have(name: str) -> None:
    limits, arrivals = ARRIVALS[name]
    with_guesses, num_guessed = rows_given(limits, arrivals, guesses=15)
    without, none_guessed = rows_given(limits, arrivals, guesses=0)
    assert with_guesses == without
    assert num_guessed > none_guessed == 0


def test_rows_that_nobody_waits_for_are_guessed_with() -> None:
    scheduler = Scheduler(config(**LIMITS))
    scheduler.add(lookup_request("a"))
    sizes = [repeat(scheduler).num_rows for _ in range(8)]
    assert sizes[-1] == 5, "what followed the last time is four tokens"


def test_guesses_take_no_block_while_a_prompt_waits_for_blocks() -> None:
    scheduler = Scheduler(config(num_blocks=41, max_model_len=160, max_num_batched_tokens=64))
    scheduler.add(lookup_request("a", max_tokens=100))
    for _ in range(5):
        repeat(scheduler)
    scheduler.add(request("large", 140))
    num_steps = 0
    while scheduler.stats().waiting and scheduler.stats().running:
        seq = scheduler._roster.running[0]
        num_blocks, num_computed = len(seq.block_table), seq.num_computed_tokens
        num_guessed = scheduler.stats().guessed_tokens
        repeat(scheduler)
        if scheduler.stats().waiting and seq.block_table:
            assert len(seq.block_table) - num_blocks == (num_computed == 4 * num_blocks), "for its next token alone"
            num_steps += scheduler.stats().guessed_tokens > num_guessed
    assert num_steps > 5, "it guesses within the blocks it has"


@pytest.mark.parametrize("num_sequences", [1, 3, 80])
def test_a_step_takes_in_a_bounded_part_of_the_prompts_that_are_looked_up(
    num_sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [0]
    original = PromptLookup.read

    def counted(self: PromptLookup, prompt: tuple[int, ...], outputs: list[int], max_tokens: int) -> None:
        before = self.num_read
        original(self, prompt, outputs, max_tokens)
        read[0] += self.num_read - before

    monkeypatch.setattr(PromptLookup, "read", counted)
    limits = {"max_num_batched_tokens": 8192, "max_model_len": 40_000, "num_blocks": 40_000, "max_num_seqs": 100}
    scheduler = Scheduler(config(block_size=16, **limits))
    for index in range(num_sequences):
        prompt = tuple(range(10, 10 + 30_000 // num_sequences))
        params = SamplingParams(max_tokens=200, prompt_lookup_num_tokens=8)
        scheduler.add(Request(request_id=f"r{index}", prompt_token_ids=prompt, params=params, seed=0))
    total = 0
    for _ in range(60):
        read[0] = 0
        step(scheduler)
        assert read[0] <= max(READ_TOKENS, MIN_READ_TOKENS * num_sequences)
        total += read[0]
    assert total >= 29_900, "in the end it knows all of it"


def test_one_guess_looks_at_a_bounded_number_of_places() -> None:
    """Of the pair 1 2 there are thousands, none of which goes on like the end of the text."""
    prompt = [token for i in range(5000) for token in (10_000 + i, 1, 2)]
    lookup = PromptLookup(8)
    while lookup.num_read < len(prompt) - 1:
        lookup.read(prompt, [])
    looks = Looks(prompt)
    assert lookup.guess(looks, [], 8) == tuple(prompt[-3:])  # type: ignore[arg-type]
    assert looks.num_taken <= 6 * (MAX_PLACES + 2)


class Looks(list[int]):
    """A text that counts how many of its tokens are looked at."""

    num_taken = 0

    def __getitem__(self, place: slice) -> list[int]:  # type: ignore[override]
        found = list.__getitem__(self, place)
        self.num_taken += len(found)
        return found


# --- those who wait --------------------------------------------------------------------------------------------------


class Counted:
    """Look-ups in the block pool, and tokens that are copied for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.finds = self.tokens = 0
        find, between = BlockPool.find, Sequence.tokens_between

        def counted_find(pool: BlockPool, content: tuple[int, tuple[int, ...]]) -> int | None:
            self.finds += 1
            return find(pool, content)

        def counted_between(seq: Sequence, start: int, end: int) -> tuple[int, ...]:
            self.tokens += end - start
            return between(seq, start, end)

        monkeypatch.setattr(BlockPool, "find", counted_find)
        monkeypatch.setattr(Sequence, "tokens_between", counted_between)


def waiting_steps(num_blocks: int, **changes: object) -> Iterator[Scheduler]:
    """Steps in which a prompt of `num_blocks` cached blocks waits for room behind one that runs."""
    limits = {"num_blocks": 2 * num_blocks - 40, "block_size": 4, "max_model_len": 8 * num_blocks, "max_num_seqs": 8}
    limits |= {"max_num_batched_tokens": 4 * num_blocks, "enable_prefix_caching": True, "max_queued_requests": 64}
    scheduler = Scheduler(config(**{**limits, **changes}))
    document = tuple(range(10, 10 + 4 * num_blocks))
    params = SamplingParams(max_tokens=1)
    scheduler.add(Request(request_id="a", prompt_token_ids=document, params=params, seed=0))
    for _ in run(scheduler):
        pass
    other = tuple(range(100_000, 100_000 + 4 * num_blocks - 80))
    scheduler.add(Request(request_id="b", prompt_token_ids=other, params=SamplingParams(max_tokens=70), seed=0))
    step(scheduler)
    for index in range(3):
        params = SamplingParams(max_tokens=4 * num_blocks - 10)
        fields = {"prompt_token_ids": (*document, index), "params": params, "seed": 0, "tenant": f"{index}"}
        scheduler.add(Request(request_id=f"c{index}", **fields))  # type: ignore[arg-type]
    step(scheduler)
    step(scheduler)
    while scheduler.stats().waiting == 3:
        yield scheduler


@pytest.mark.parametrize("num_blocks", [100, 1000])
def test_a_prompt_that_waits_is_not_looked_up_anew_in_every_step(
    num_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    num_steps = 0
    for scheduler in waiting_steps(num_blocks):
        counted.finds = counted.tokens = 0
        step(scheduler)
        num_steps += 1
        if scheduler.stats().waiting == 3:
            assert counted.finds <= 8, "its next block, blocks that changed hands, and one that was filled"
            assert counted.tokens <= 12 * 4
    assert num_steps > 20


def test_sequences_that_waited_run_with_the_prefix_they_were_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = [0]
    update = PrefixWatch.update

    def counted(self: PrefixWatch) -> None:
        updates[0] += 1
        update(self)

    monkeypatch.setattr(PrefixWatch, "update", counted)
    for scheduler in waiting_steps(60):
        step(scheduler)
    assert updates[0] > 10
    before = scheduler.stats().prefix_hit_tokens
    for _ in run(scheduler):
        pass
    assert scheduler.stats().prefix_hit_tokens - before >= 2 * 4 * 58, "two find what the first has brought back"


def test_plans_are_those_of_prompts_looked_up_anew_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In random workloads over tiny pools."""
    updates = [0]
    update = PrefixWatch.update

    def counted(self: PrefixWatch) -> None:
        updates[0] += 1
        update(self)

    monkeypatch.setattr(PrefixWatch, "update", counted)
    for seed in range(120):
        watched, anew = Player(random_workload(seed)), Player(random_workload(seed))
        watched.play()
        with monkeypatch.context() as patch:
            patch.setattr(KVBlocks, "expect", lambda self, seq: None)
            anew.play()
        assert watched.plans == anew.plans, f"workload {seed}"
    assert updates[0] > 100


def test_watches_are_few_and_end_with_the_wait() -> None:
    scheduler = Scheduler(config(num_blocks=20, enable_prefix_caching=True, max_num_seqs=4))
    for index in range(30):
        scheduler.add(request(f"r{index}", 40, max_tokens=8, tenant=f"t{index}"))
    for _ in run(scheduler):
        assert len(scheduler._kv._watches) <= MAX_WATCHES
        assert len(scheduler._kv.pool.watches) == len(scheduler._kv._watches)
    assert not scheduler._kv._watches


def test_samples_that_wait_for_their_prompt_are_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = [0]
    original = Sequence.has_prompt_computed.fget  # type: ignore[attr-defined]

    def counted(seq: Sequence) -> bool:
        looked[0] += 1
        return bool(original(seq))

    monkeypatch.setattr(Sequence, "has_prompt_computed", property(counted))
    limits = {"num_blocks": 2000, "max_num_batched_tokens": 200, "max_model_len": 2048, "max_num_seqs": 200}
    scheduler = Scheduler(config(**limits))
    scheduler.add(request("a", 1000, n=128, max_tokens=2))
    for _ in range(5):
        looked[0] = 0
        step(scheduler)
        assert looked[0] <= 128


def test_a_request_that_finds_the_queue_full_costs_the_same_however_many_wait() -> None:
    class Unread(dict[str, tuple[Sequence, ...]]):
        def values(self) -> object:  # type: ignore[override]
            raise AssertionError("all requests are looked through")

    scheduler = Scheduler(config(max_queued_requests=50))
    scheduler._roster.requests = Unread()
    for index in range(50):
        scheduler.add(request(f"r{index}"))
    with pytest.raises(QueueFull, match="50 requests wait"):
        scheduler.add(request("one more"))
    step(scheduler)
    scheduler.add(request("now there is room"))


def test_lookups_of_long_texts_hold_little_memory() -> None:
    import tracemalloc

    rng = random.Random(0)
    prompt = tuple(rng.randrange(128_000) for _ in range(20_000))
    tracemalloc.start()
    lookup = PromptLookup(10)
    while lookup.num_read < len(prompt) - 1:
        lookup.read(prompt, [])
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 250 * len(prompt)
