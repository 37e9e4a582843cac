"""Replicas and a router with a wire between them that loses, delays and doubles: no token is lost, said twice or owed.

A schedule is drawn from a seed: what is delivered next, what breaks, who leaves, and how many turns the loop has in
between.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import Any

import pytest

from deployments.calls import Batch, Call, Receipt, StreamItem, Submission
from deployments.replica.subscribers import SILENT_S
from deployments.router.replicas import ServeBackend
from deployments.router.streams import ReplicaLost
from engine.request import SamplingParams
from tests.support.frame_wire import NAMES, Wire, make_replica

DEADLINE_S = 5.0


async def consume(backend: ServeBackend, call: Call, told: list[int]) -> str:
    try:
        async for item in backend.stream(call):
            assert isinstance(item, StreamItem)
            if item.fault is not None:
                return "fault"
            for delta in item.deltas:
                told.extend(delta.token_ids)
    except ReplicaLost:
        return "lost"
    return "done"


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def play(seed: int, *, is_breaking: bool, is_doubling: bool) -> None:
    rng = random.Random(seed)
    wire = Wire(rng)
    wire.is_doubling = is_doubling
    backend = ServeBackend(wire, wait_s=60.0)  # type: ignore[arg-type]
    running: dict[int, tuple[asyncio.Task[str], list[int], int]] = {}
    left: set[int] = set()
    for at in range(60):
        action = rng.random()
        if action < 0.12 and len(running) < 8:
            last, told = rng.choice((1, 1, 2, 4)), []  # type: ignore[var-annotated]
            params = SamplingParams(max_tokens=last)
            call = Call(request_id=f"q{at}", prompt_token_ids=(1,), params=params, seed=0)
            running[at] = (asyncio.ensure_future(consume(backend, call, told)), told, last)
        elif action < 0.16 and running:
            number = rng.choice(list(running))
            left.add(number)
            running[number][0].cancel()
        elif action < 0.22 and is_breaking:
            whole = [s for s in wire.subscriptions if not s.is_broken and not s.answer.cancelled]
            if whole:
                rng.choice(whole).break_off()
        elif action < 0.45:
            wire.step()
        elif waiting := wire.deliverable():
            rng.choice(waiting)()
        await turns(rng.choice((0, 0, 1, 2, 6)))
    pending = {task for task, _, _ in running.values()}
    for number_of_round in range(200):
        wire.step()
        while waiting := wire.deliverable():
            rng.choice(waiting)()
            await turns(2)
        await turns(4)
        if all(task.done() for task in pending):
            if not any(replica._in_hand for replica in wire.replicas.values()):
                break
            if number_of_round == 100:  # what is left is of routers that do not read, as far as the replicas know
                wire.now_s += SILENT_S + 1
                for replica in wire.replicas.values():
                    replica._subscribers.sweep()
    stuck = [number for number, (task, _, _) in running.items() if not task.done()]
    in_hand = {name: replica._in_hand for name, replica in wire.replicas.items()}
    await backend.close()
    for subscription in wire.subscriptions:
        subscription.task.cancel()
    for task in (*pending, *wire.tasks):
        task.cancel()
    await turns(20)
    assert not stuck, f"streams that wait for ever: {stuck}"
    for number, (task, told, last) in running.items():
        assert told == list(range(len(told))), f"stream {number} was told {told}"
        with suppress(asyncio.CancelledError):
            if number not in left and task.result() == "done":
                assert told == list(range(last)), f"stream {number} ended with {told} of {last}"
    assert in_hand == dict.fromkeys(NAMES, 0), f"calls that replicas still count: {in_hand}"
    for replica in wire.replicas.values():
        engine: Any = replica._engine
        assert engine.num_opened == engine.num_left, "sequences that nobody left"


NUM_SEEDS = 400


@pytest.mark.parametrize(
    ("is_breaking", "is_doubling"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["whole wire", "breaking wire", "doubled submissions", "breaking and doubling"],
)
def test_in_any_order_of_events_each_stream_has_its_tokens_once_or_is_lost(
    is_breaking: bool, is_doubling: bool
) -> None:
    faults: dict[int, str] = {}
    for seed in range(NUM_SEEDS):
        try:
            asyncio.run(asyncio.wait_for(play(seed, is_breaking=is_breaking, is_doubling=is_doubling), DEADLINE_S))
        except AssertionError as error:
            faults[seed] = str(error).splitlines()[0]
    first = dict(list(faults.items())[:8])
    assert not faults, f"{len(faults)} of {NUM_SEEDS} schedules failed, first: {first}"


def test_a_call_that_is_given_up_before_its_first_turn_is_not_counted_for_ever() -> None:
    """A router's frames end in the moment in which its call comes."""

    async def scenario() -> None:
        replica = make_replica("a")
        subscriber = replica._subscribers.opened("router")
        call = Call(request_id="q", prompt_token_ids=(1,), params=SamplingParams(max_tokens=3), seed=0, alone_tokens=5)
        (receipt,) = Receipt.read(await replica.submit(Batch.of([Submission(call, "router", 1)])))
        assert receipt.fault is None
        replica._subscribers.closed(subscriber)
        await turns(5)
        assert replica._in_hand == 0
        assert replica._turned_away(call) is None

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_a_number_that_is_submitted_again_as_its_first_call_ends_is_given_up_with_its_router() -> None:
    async def scenario() -> None:
        replica = make_replica("a")
        subscriber = replica._subscribers.opened("router")
        call = Call(request_id="q", prompt_token_ids=(1,), params=SamplingParams(max_tokens=1), seed=0)
        await replica.submit(Batch.of([Submission(call, "router", 1)]))
        await turns(3)
        replica._engine.step()  # type: ignore[attr-defined]
        await subscriber.frame(lambda: 0, bytes)  # the first has ended, and its task has not heard of it
        await replica.submit(Batch.of([Submission(call, "router", 1)]))
        await turns(5)
        replica._subscribers.closed(subscriber)
        await turns(5)
        assert replica._in_hand == 0

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))


def test_frames_that_break_are_heard_of_by_a_call_whose_receipt_comes_later() -> None:
    """Its only frame was lost with them: the replica, which has ended it, would never speak of it again."""

    async def scenario() -> None:
        wire = Wire(random.Random(0))
        backend = ServeBackend(wire, wait_s=60.0)  # type: ignore[arg-type]
        backend.start()
        await turns(5)
        for subscription in list(wire.subscriptions):
            subscription.deliver()
        call = Call(request_id="q", prompt_token_ids=(1,), params=SamplingParams(max_tokens=1), seed=0)
        told: list[int] = []
        task = asyncio.ensure_future(consume(backend, call, told))
        await turns(5)
        wire.later.pop(0)()  # the submission arrives
        await turns(5)
        wire.step()
        await turns(8)
        for subscription in list(wire.subscriptions):
            if subscription.frames:
                subscription.frames.clear()
                subscription.break_off()
        await turns(5)
        for _ in range(20):
            for deliver in wire.deliverable()[:1]:
                deliver()
            await turns(3)
        assert task.done(), "the stream waits for ever"
        assert task.result() == "lost"
        await backend.close()

    asyncio.run(asyncio.wait_for(scenario(), DEADLINE_S))
