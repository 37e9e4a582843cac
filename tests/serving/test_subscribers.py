"""What a replica keeps for its routers: every call ends once, and nothing is kept for a router that does not read."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from deployments import frames
from deployments.calls import UNREAD_CODE, Call, Fault, Submission
from deployments.replica.subscribers import (
    FORGOTTEN_S,
    SILENT_S,
    SUBSCRIBE_S,
    Run,
    Subscriber,
    Subscribers,
)
from engine.aio.streams import Stream
from engine.errors import EngineDead
from engine.request import FinishReason, OutputDelta, Request, SamplingParams
from tests.support.waiting import for_ever

ROUTER = "router-1"


def delta(token: int, sample: int = 0, reason: FinishReason | None = None) -> OutputDelta:
    return OutputDelta("q", sample, (token,), chr(97 + token % 26), finish_reason=reason)


class World:
    """One replica's subscribers, and calls whose tokens the test makes."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.observed: list[tuple[int, int]] = []
        self.subscribers = Subscribers("r1", self._observe, clock=lambda: self.now_s)
        self.aborted: set[int] = set()
        self.released: set[int] = set()

    def _observe(self, run: Run, deltas: list[OutputDelta]) -> None:
        self.observed.append((run.submission.number, sum(len(d.token_ids) for d in deltas)))

    def submit(self, number: int, n: int = 1, router: str = ROUTER) -> Run:
        call = Call(request_id=f"q{number}", prompt_token_ids=(1,), params=SamplingParams(n=n), seed=0)
        subscriber = self.subscribers.of(router)
        run = subscriber.runs[number] = Run(Submission(call, router, number), subscriber)
        run.task = asyncio.ensure_future(self._serve(run))
        return run

    async def _serve(self, run: Run) -> None:
        """As `Replica._serve`, with a stream that no engine fills."""
        number, call = run.submission.number, run.submission.call
        request = Request(request_id="q", prompt_token_ids=(1,), params=call.params, seed=0)
        try:
            run.stream = Stream(request, "q", asyncio.get_running_loop(), run.wake)
            try:
                await run.ended
            finally:
                if run.num_unfinished:
                    self.aborted.add(number)
        except Exception as error:
            run.fail(Fault(code="failed", message=str(error)))
        finally:
            run.end()
            self.released.add(number)

    async def put(self, run: Run, *deltas: OutputDelta) -> None:
        """One step of the engine."""
        assert run.stream is not None
        for each in deltas:
            run.stream.put(each)
        run.stream.wake()

    async def read(self, subscriber: Subscriber) -> dict[int, list[int]]:
        """The tokens of the next frame, by number of the call; -1 for a fault."""
        frame = await asyncio.wait_for(subscriber.frame(lambda: 7), 5.0)
        load, items = frames.read(frame)[:2]
        assert load == 7
        return {
            number: [t for d in item.deltas for t in d.token_ids] + ([-1] if item.fault else [])
            for number, item in items
        }


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def played(scenario: Callable[[World], Coroutine[Any, Any, None]]) -> World:
    async def play() -> World:
        world = World()
        await asyncio.wait_for(scenario(world), 20.0)
        await settle()
        seen = World()  # what ends now, ends because the loop does
        seen.observed, seen.aborted, seen.released = world.observed, set(world.aborted), set(world.released)
        return seen

    return asyncio.run(play())


def test_a_frame_holds_what_a_step_brought_for_all_calls_of_a_router() -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        runs = [world.submit(number) for number in range(3)]
        await settle()
        for number, run in enumerate(runs):
            await world.put(run, delta(number))
        assert await world.read(subscriber) == {0: [0], 1: [1], 2: [2]}
        await world.put(runs[1], delta(9, reason=FinishReason.STOP))
        assert await world.read(subscriber) == {1: [9]}
        assert list(subscriber.runs) == [0, 2]

    world = played(scenario)
    assert world.released == {1}
    assert not world.aborted


def test_a_reader_that_is_slow_finds_the_tokens_of_many_steps_together() -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        run = world.submit(1)
        await settle()
        for token in range(50):
            await world.put(run, delta(token))
        assert await world.read(subscriber) == {1: list(range(50))}

    assert played(scenario).observed == [(1, 50)]


def test_an_answer_waits_for_its_router_to_read() -> None:
    async def scenario(world: World) -> None:
        run = world.submit(1)
        await settle()
        await world.put(run, delta(3, reason=FinishReason.STOP))
        world.now_s += SUBSCRIBE_S - 1
        world.subscribers.sweep()
        assert await world.read(world.subscribers.opened(ROUTER)) == {1: [3]}

    assert played(scenario).released == {1}


@pytest.mark.parametrize(("is_reading", "wait_s"), [(True, SILENT_S), (False, SUBSCRIBE_S)])
def test_calls_of_a_router_that_is_not_heard_of_are_given_up(is_reading: bool, wait_s: float) -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER) if is_reading else world.subscribers.of(ROUTER)
        world.submit(1)
        await settle()
        world.now_s += wait_s - 1
        world.subscribers.sweep()
        assert world.subscribers.is_here(subscriber)
        world.now_s += 2
        world.subscribers.sweep()
        assert not world.subscribers.is_here(subscriber)

    world = played(scenario)
    assert world.aborted == world.released == {1}


def test_a_router_that_beats_keeps_its_calls() -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        world.submit(1)
        await settle()
        for _ in range(10):
            world.now_s += SILENT_S - 1
            world.subscribers.heard(ROUTER, ())
            world.subscribers.sweep()
        assert world.subscribers.is_here(subscriber)

    assert not played(scenario).aborted


def test_a_cancelled_call_is_aborted_and_its_number_means_nothing_any_more() -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        first, second = world.submit(1), world.submit(2)
        await settle()
        await world.put(first, delta(5))
        world.subscribers.heard(ROUTER, (1, 77))
        await world.put(second, delta(6))
        assert await world.read(subscriber) == {2: [6]}

    world = played(scenario)
    assert world.aborted == world.released == {1}


def test_an_error_comes_behind_the_tokens_before_it() -> None:
    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        run = world.submit(1)
        await settle()
        assert run.stream is not None
        run.stream.put(delta(5))
        run.stream.fail(EngineDead("gone"))
        run.stream.wake()
        assert await world.read(subscriber) == {1: [5]}
        assert await world.read(subscriber) == {1: [-1]}

    assert played(scenario).released == {1}


def test_a_router_that_reads_anew_is_told_what_was_given_up_meanwhile() -> None:
    """A receipt may have been on its way when its frames broke: without a word the call would wait for ever."""

    async def scenario(world: World) -> None:
        before = world.subscribers.opened(ROUTER)
        world.submit(1)
        await settle()
        world.subscribers.closed(before)
        after = world.subscribers.opened(ROUTER)
        _, items = frames.read(await after.frame(lambda: 0))[:2]
        assert [(number, item.fault and item.fault.code) for number, item in items] == [(1, UNREAD_CODE)]

    world = played(scenario)
    assert world.aborted == {1}


def test_a_second_subscription_takes_the_place_of_the_first() -> None:
    async def scenario(world: World) -> None:
        before = world.subscribers.opened(ROUTER)
        run = world.submit(1)
        await settle()
        after = world.subscribers.opened(ROUTER)
        assert not world.subscribers.is_here(before)
        world.subscribers.closed(before)  # its generator ends late: that closes nothing of the second
        assert world.subscribers.is_here(after)
        assert await world.read(after) == {1: [-1]}
        assert run.ended.done()

    assert played(scenario).aborted == {1}


def test_what_was_given_up_is_forgotten_in_the_end() -> None:
    async def scenario(world: World) -> None:
        for number in range(20):
            subscriber = world.subscribers.opened(f"router-{number}")
            world.submit(number, router=f"router-{number}")
            await settle()
            world.subscribers.closed(subscriber)
        assert len(world.subscribers._untold) == 20
        world.now_s += FORGOTTEN_S + 1
        world.subscribers.sweep()
        assert not world.subscribers._untold

    assert played(scenario).aborted == set(range(20))


EVENTS = ("first token", "last token", "cancel", "close", "sweep")


@pytest.mark.parametrize("order", list(itertools.permutations(EVENTS)), ids=",".join)
def test_in_every_order_of_events_a_call_ends_once_and_its_image_is_released(order: tuple[str, ...]) -> None:
    """And no token is told twice, or after the end."""

    async def scenario(world: World) -> None:
        subscriber = world.subscribers.opened(ROUTER)
        run = world.submit(1, n=2)
        await settle()
        told: list[int] = []
        reader = asyncio.ensure_future(_collect(world, subscriber, told))
        for event in order:
            if event == "first token":
                await world.put(run, delta(1, 0), delta(2, 1))
            elif event == "last token":
                await world.put(run, delta(3, 0, FinishReason.STOP), delta(4, 1, FinishReason.STOP))
            elif event == "cancel":
                world.subscribers.heard(ROUTER, (1,))
            elif event == "close":
                world.subscribers.closed(subscriber)
            else:
                world.now_s += SILENT_S + 1
                world.subscribers.sweep()
            await settle()
        reader.cancel()
        assert len(told) == len(set(told))
        assert run.ended.done()
        assert not subscriber.runs

    world = played(scenario)
    assert world.released == {1}


async def _collect(world: World, subscriber: Subscriber, told: list[int]) -> None:
    while world.subscribers.is_here(subscriber):
        for tokens in (await world.read(subscriber)).values():
            told.extend(tokens)
    await for_ever()
