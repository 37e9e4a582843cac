"""Calls that are on their way to one replica go together, and each has its own receipt, failure or farewell."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.calls import Batch, Call, Fault, Receipt, Submission
from deployments.router import submissions as module
from deployments.router.submissions import MAX_BATCH, Submissions, Ticket
from engine.request import SamplingParams
from tests.support.waiting import until_async, within


class World:
    """Batches as they leave, answered when the test says so."""

    def __init__(self) -> None:
        self.batches: list[tuple[Batch, asyncio.Future[bytes]]] = []
        self.cancelled: list[tuple[str, int]] = []
        handle = SimpleNamespace(submit=SimpleNamespace(remote=self._submit))
        self.submissions = Submissions(handle, lambda replica, number: self.cancelled.append((replica, number)))

    def _submit(self, batch: Batch) -> asyncio.Future[bytes]:
        response: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.batches.append((batch, response))
        return response

    def send(self, number: int, *aim: str) -> Ticket:
        call = Call(request_id=f"q{number}", prompt_token_ids=(number,), params=SamplingParams(), seed=0)
        return self.submissions.send(Submission(call, "router", number, aim))

    def numbers(self) -> list[list[int]]:
        return [[submission.number for submission in batch.submissions()] for batch, _ in self.batches]

    def answer(self, place: int, replica: str = "a", faults: tuple[int, ...] = ()) -> None:
        batch, response = self.batches[place]
        fault = Fault(code="queue_full", message="full")
        receipts = [Receipt(replica, 1, fault if each.number in faults else None) for each in batch.submissions()]
        response.set_result(Receipt.write(receipts))


def in_world(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        async def main() -> None:
            await test(World())

        asyncio.run(asyncio.wait_for(main(), 20))

    run.__name__ = test.__name__
    return run


@in_world
async def test_what_comes_in_one_turn_of_the_loop_for_one_replica_leaves_at_once_and_together(world: World):
    for number in range(4):
        world.send(number, "a")
    other = world.send(9, "b")
    await asyncio.sleep(0)
    assert world.numbers() == [[0, 1, 2, 3], [9]]
    assert [batch.aim for batch, _ in world.batches] == [("a",), ("b",)]
    world.answer(1, "b")
    assert (await within(other.receipt, "a receipt")).replica == "b"


@in_world
async def test_what_comes_while_a_batch_is_under_way_follows_its_answer(world: World):
    module.MAX_WAIT_S, before = 60.0, module.MAX_WAIT_S
    try:
        first = world.send(0, "a")
        await asyncio.sleep(0)
        more = [world.send(number, "a") for number in (1, 2)]
        await asyncio.sleep(0.01)
        assert world.numbers() == [[0]]
        world.answer(0)
        await within(first.receipt, "the first receipt")
        await until_async(lambda: len(world.batches) == 2, "the next batch")
        assert world.numbers() == [[0], [1, 2]]
        world.answer(1, faults=(2,))
        receipts = [await within(ticket.receipt, "a receipt") for ticket in more]
        assert [receipt.fault is None for receipt in receipts] == [True, False], "each has its own"
    finally:
        module.MAX_WAIT_S = before


@in_world
async def test_a_replica_that_does_not_answer_holds_nobody_back_for_long(world: World):
    world.send(0, "a")
    await asyncio.sleep(0)
    late = world.send(1, "a")
    await until_async(lambda: len(world.batches) == 2, "the second batch to leave without the first one's answer")
    world.answer(1)
    assert (await within(late.receipt, "a receipt")).load == 1


@in_world
async def test_no_batch_is_larger_than_the_limit(world: World):
    for number in range(2 * MAX_BATCH + 1):
        world.send(number, "a")
    await until_async(lambda: len(world.batches) == 3, "three batches")
    assert [len(numbers) for numbers in world.numbers()] == [MAX_BATCH, MAX_BATCH, 1]


@in_world
async def test_one_that_leaves_takes_nobody_along_and_its_replica_is_told(world: World):
    tickets = [world.send(number, "a") for number in range(3)]
    await asyncio.sleep(0)
    world.submissions.take_back(tickets[1])
    assert not world.batches[0][1].cancelled()
    world.answer(0, faults=(2,))
    assert (await within(tickets[0].receipt, "a receipt")).fault is None
    await within(tickets[2].receipt, "a receipt")
    assert world.cancelled == [("a", 1)]


@in_world
async def test_one_that_leaves_before_its_batch_is_not_sent_and_a_batch_of_nobody_is_taken_back(world: World):
    early, stays = world.send(0, "a"), world.send(1, "a")
    world.submissions.take_back(early)
    await asyncio.sleep(0)
    assert world.numbers() == [[1]]
    world.submissions.take_back(stays)
    assert world.batches[0][1].cancelled()
    await asyncio.sleep(0)
    world.send(2, "a")
    await asyncio.sleep(0)
    assert world.numbers() == [[1], [2]], "nothing waits for the one that was taken back"


@in_world
async def test_a_batch_that_fails_fails_each_of_its_calls_and_the_next_leaves(world: World):
    tickets = [world.send(number, "a") for number in range(2)]
    await asyncio.sleep(0)
    waiting = world.send(2, "a")
    world.batches[0][1].set_exception(ConnectionError("gone"))
    for ticket in tickets:
        with pytest.raises(ConnectionError, match="gone"):
            await within(ticket.receipt, "the failure")
    await until_async(lambda: len(world.batches) == 2, "the next batch")
    world.batches[1][1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting.receipt


def test_a_batch_and_its_receipts_are_read_as_they_were_written():
    params = SamplingParams(max_tokens=7, temperature=0.5)
    calls = [Call(request_id=str(n), prompt_token_ids=tuple(range(n)), params=params, seed=n) for n in range(3)]
    sent: list[Any] = [Submission(call, "router", n, ("a", "b")) for n, call in enumerate(calls)]
    batch = Batch.of(sent)
    assert (batch.aim, list(batch.submissions())) == (("a", "b"), sent)
    receipts = [Receipt("a", 3), Receipt("b", 0, Fault(code="c", message="m", param="p"), 7)]
    assert list(Receipt.read(Receipt.write(receipts))) == receipts
