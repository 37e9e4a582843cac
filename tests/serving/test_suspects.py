"""A request that ends the process of its replica costs three of them; one that was only there loses time."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

import pytest

from deployments.calls import Call, Refused, StreamItem
from deployments.losses import Meaning
from deployments.router.streams import ReplicaLost, answer, merge
from deployments.router.suspects import SUSPECT_DEATHS, Suspects, fingerprint
from engine.request import OutputDelta, SamplingParams
from tests.serving.fakes import FakeBackend
from tests.serving.fleet import DEADLINE_S, FakeReplica, Fleet, Kills, call_of, outcome, outcomes
from tests.support.waiting import patience

REFUSED = "request_ends_replicas"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.streams.FIRST_PAUSE_S", 0.0)
    for name in ("HEARSAY_S", "FIRST_ALONE_PAUSE_S"):
        monkeypatch.setattr(f"deployments.router.attempt.{name}", 0.0)
    monkeypatch.setattr("deployments.router.streams.MAX_WAITS", 1_000_000)  # waits of no length


def innocents(rng: random.Random, number: int) -> list[str]:
    return [f"innocent {i} " + "x" * rng.randrange(5, 30) for i in range(number)]


def is_guilty(call: Call) -> bool:
    return bytes(call.prompt_token_ids).startswith(b"guilty")


def position(call: Call, life: int) -> int:
    return len(call.resumed_output_token_ids) + life


SCHEDULES: dict[str, Kills] = {
    "before its first token": lambda call, life: is_guilty(call),
    "after one token of each life": lambda call, life: is_guilty(call) and life == 1,
    "after five tokens of each life": lambda call, life: is_guilty(call) and life == 5,
    "at one position": lambda call, life: is_guilty(call) and position(call, life) == 7,
    "from one position on": lambda call, life: is_guilty(call) and position(call, life) >= 4,
    "later each time": lambda call, life: is_guilty(call) and life == 1 + len(call.avoid) * 2,
}


@pytest.mark.parametrize("num_replicas", [1, 2, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("seed", range(3))
def test_a_request_that_ends_replicas_costs_three_and_takes_no_other_with_it(
    schedule: str, num_replicas: int, seed: int
):
    async def run() -> None:
        rng = random.Random(seed)
        fleet = Fleet(num_replicas, seed=seed, kills=SCHEDULES[schedule])
        suspects = Suspects()
        texts = [*innocents(rng, 8), "guilty " + "y" * 40]
        rng.shuffle(texts)
        found = await outcomes(fleet, [suspects], texts, rng)
        assert found == {text: REFUSED if text.startswith("guilty") else text for text in texts}
        assert len(fleet.deaths) == 3
        assert all(any(text.startswith("guilty") for text in there) for there in fleet.deaths)
        assert await outcome(fleet, suspects, call_of("guilty " + "y" * 40)) == REFUSED
        assert len(fleet.deaths) == 3, "sent again, it costs nothing"
        assert all(replica.calls == [] for replica in fleet.replicas)

    asyncio.run(run())


@pytest.mark.parametrize("num_routers", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_several_such_requests_cost_three_each_however_they_meet(num_routers: int, seed: int):
    async def run() -> None:
        rng = random.Random(seed)
        kills = rng.choice(list(SCHEDULES.values()))
        fleet = Fleet(rng.choice([1, 2, 3]), seed=seed, kills=kills)
        guilty = [f"guilty {i} " + "y" * 40 for i in range(3)]
        texts = [*innocents(rng, 8), *guilty]
        rng.shuffle(texts)
        found = await outcomes(fleet, [Suspects() for _ in range(num_routers)], texts, rng)
        assert found == {text: REFUSED if text in guilty else text for text in texts}
        assert len(fleet.deaths) <= 3 * len(guilty)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(8))
def test_replicas_are_stopped_twenty_times_and_no_stream_is_refused(seed: int):
    async def run() -> None:
        rng = random.Random(seed)
        fleet = Fleet(2, seed=seed)
        texts = [f"innocent {i} " + "x" * 60 for i in range(6)]
        answers = asyncio.ensure_future(outcomes(fleet, [Suspects()], texts, rng))
        stopped = 0
        for _ in patience("the answers"):
            if answers.done():
                break
            for _ in range(rng.randrange(1, 5)):
                await asyncio.sleep(0)
            if any(replica.calls for replica in fleet.replicas) and stopped < 20:
                fleet.lose_one(Meaning.KILLED)
                stopped += 1
        assert await answers == {text: text for text in texts}
        assert stopped == 20

    asyncio.run(run())


@pytest.mark.parametrize("lost", [Meaning.AWAY, Meaning.KILLED])
def test_a_lost_connection_and_an_ordered_death_are_held_against_nobody(lost: Meaning):
    suspects = Suspects()
    backend = FakeBackend(deaths=[1] * 6, lost=lost)

    async def run() -> str:
        found = await outcome(backend, suspects, call_of("hello there"))  # type: ignore[arg-type]
        assert all(call.alone_tokens == 0 for call in backend.calls)
        return found

    assert asyncio.run(run()) == "hello there"


@pytest.mark.parametrize(("silence_s", "expected"), [(5.0, "hello there"), (29.0, "hello there"), (40.0, REFUSED)])
def test_a_replica_that_hangs_is_stopped_by_serve_and_the_request_is_to_blame(silence_s: float, expected: str):
    now = [0.0]

    class Hanging(FakeBackend):
        async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
            try:
                async with aclosing(super().stream(call)) as items:
                    async for item in items:
                        now[0] += 1.0
                        yield item
            except ReplicaLost:
                now[0] += silence_s  # until Serve has lost its patience
                raise

    backend = Hanging(deaths=[1] * 8, lost=Meaning.KILLED)
    found = outcome(backend, Suspects(clock=lambda: now[0]), call_of("hello there"))  # type: ignore[arg-type]
    assert asyncio.run(found) == expected
    assert len(backend.calls) == (3 if expected == REFUSED else 9)


def test_a_request_that_its_caller_sends_again_is_still_the_same():
    """Whoever hangs up after each death, or sends it ten times at once, gets no more replicas for it."""

    async def run() -> None:
        fleet = Fleet(3, seed=1, kills=SCHEDULES["before its first token"])
        suspects = Suspects()
        for _ in range(2):
            stream = answer(fleet, call_of("guilty"), max_resumes=0, suspects=suspects)
            with suppress(Refused):
                await anext(stream)
            await stream.aclose()
        found = await asyncio.gather(*(outcome(fleet, suspects, call_of("guilty")) for _ in range(10)))
        assert Counter(found) == {REFUSED: 10}
        assert len(fleet.deaths) == 3

    asyncio.run(run())


def test_what_ends_well_is_held_responsible_for_nothing():
    """A prompt that is sent all the time is there at many deaths; between them it is answered."""

    async def run() -> None:
        suspects = Suspects()
        backend = FakeBackend()
        for _ in range(5):
            backend.deaths += [2, 2]
            assert await outcome(backend, suspects, call_of("hello")) == "hello"  # type: ignore[arg-type]
        assert len(backend.calls) == 15

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(4))
def test_one_deadly_sample_of_many_costs_three(seed: int):
    """The others end well, one after the other, and acquit it of nothing."""

    def kills(call: Call, life: int) -> bool:
        return call.sample_index == 2 and position(call, life) >= 5

    class Samples(Fleet):
        """A call of n samples is n streams of one."""

        async def _deltas(self, replica: FakeReplica, call: Call) -> AsyncGenerator[OutputDelta]:
            single = [
                super(Samples, self)._deltas(
                    replica,
                    dataclasses.replace(
                        call, sample_index=call.sample_index + i, params=SamplingParams(max_tokens=None)
                    ),
                )
                for i in range(call.params.n)
            ]
            async with aclosing(merge(single)) as merged:
                async for _, delta in merged:
                    yield delta

    async def run() -> None:
        fleet = Samples(2, seed=seed, kills=kills)
        call = call_of("a text of some length", params=SamplingParams(max_tokens=None, n=5))
        async with asyncio.timeout(DEADLINE_S):
            assert await outcome(fleet, Suspects(), call) == REFUSED
        assert len(fleet.deaths) == 3

    asyncio.run(run())


def test_an_answer_whose_end_is_lost_each_time_is_whole_and_costs_three():
    async def run() -> None:
        suspects = Suspects()
        backend = FakeBackend(deaths=[6] * 9)
        found = [await outcome(backend, suspects, call_of("hello")) for _ in range(5)]  # type: ignore[arg-type]
        assert found == ["hello"] * 3 + [REFUSED] * 2
        assert len(backend.calls) == 3

    asyncio.run(run())


def test_suspects_go_on_one_at_a_time_and_others_meanwhile_elsewhere():
    async def run() -> None:
        fleet = Fleet(3, seed=3)
        suspects = Suspects()
        texts = [f"innocent {i} " + "x" * 20 for i in range(6)]
        tasks = [asyncio.ensure_future(outcome(fleet, suspects, call_of(text))) for text in texts]
        peak, calls_alone = 0, 0
        for _ in range(SUSPECT_DEATHS):
            for _ in range(6):
                await asyncio.sleep(0)
            for replica in list(fleet.replicas):
                fleet.lose(replica, Meaning.DIED)
        for _ in patience("the answers"):
            if all(task.done() for task in tasks):
                break
            await asyncio.sleep(0)
            alone = [r for r in fleet.replicas if any(call.alone_tokens for call in r.calls)]
            peak = max(peak, len(alone))
            calls_alone += len(alone)
            assert all(len(replica.calls) == 1 for replica in alone)
        assert [task.result() for task in tasks] == texts
        assert peak == 1
        assert calls_alone

    asyncio.run(run())


def test_a_suspect_whose_reader_is_slow_does_not_keep_others_waiting_for_ever(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deployments.router.suspects.TURN_S", 0.01)

    async def run() -> None:
        suspects = Suspects()
        slow = answer(FakeBackend(deaths=[1, 1]), call_of("slow reader"), max_resumes=8, suspects=suspects)
        for _ in range(3):
            await anext(slow)  # it is a suspect now, has its turn, and nobody reads on
        backend = FakeBackend(deaths=[1, 1])
        async with asyncio.timeout(DEADLINE_S):
            assert await outcome(backend, suspects, call_of("hello")) == "hello"  # type: ignore[arg-type]
        await slow.aclose()

    asyncio.run(run())


def test_a_death_that_is_told_in_two_ways_is_one():
    """A dying engine tells some of its streams so; of others Ray says that the actor died; one was not heard of yet."""

    async def run() -> None:
        suspects = Suspects()
        calls = [call_of(text) for text in ("a", "b", "c")]
        for number in range(SUSPECT_DEATHS + 1):
            async with suspects.run(calls[0]) as (a, _), suspects.run(calls[1]) as (b, _):
                assert not a.is_alone
                assert not b.is_alone
                if number == SUSPECT_DEATHS - 1:
                    break
                for known in (a, b):
                    suspects.heard_from(known, f"r{number}")
                async with suspects.run(calls[2]) as (c, _):
                    suspects.died(a, "")
                    suspects.died(c, f"actor {number}")
                    suspects.died(b, f"actor {number}")
                    for there, death in ((a, ""), (b, f"actor {number}"), (c, f"actor {number}")):
                        suspects.judge(there, death)

    async def alone_in_flight() -> None:
        """A suspect on its way to a replica that others' doing ends is not the one."""
        suspects = Suspects()
        call = call_of("suspect")
        for number in range(SUSPECT_DEATHS):
            async with suspects.run(call) as (run, _):
                suspects.died(run, f"first {number}")
        async with suspects.run(call) as (run, sent), suspects.run(call_of("other")) as (other, _):
            assert sent.alone_tokens
            suspects.heard_from(other, "r1")
            suspects.died(run, "actor")
            suspects.died(other, "actor")
            suspects.judge(run, "actor")

    asyncio.run(run())
    asyncio.run(alone_in_flight())


def test_a_refusal_is_forgotten_after_an_hour():
    now = [0.0]
    suspects = Suspects(clock=lambda: now[0])

    async def run() -> None:
        assert await outcome(FakeBackend(deaths=[0] * 9), suspects, call_of("x")) == REFUSED  # type: ignore[arg-type]
        assert await outcome(FakeBackend(), suspects, call_of("x")) == REFUSED  # type: ignore[arg-type]
        now[0] = 3600.0
        assert await outcome(FakeBackend(), suspects, call_of("x")) == "x"  # type: ignore[arg-type]

    asyncio.run(run())


def test_a_request_is_what_it_asks_for_and_not_who_sent_it_when():
    base = call_of("text")
    same = [
        call_of("text", request_id="other"),
        call_of("text", seed=2, tenant="t", cache_salt="s", avoid=("r1",)),
        call_of("text", resumed_output_token_ids=(1, 2), sample_index=1),
        call_of("text", params=SamplingParams(max_tokens=None, n=3)),
    ]
    other = [
        call_of("texts"),
        call_of("text", adapter="alpha"),
        call_of("text", params=SamplingParams(max_tokens=3)),
    ]
    assert {fingerprint(call) for call in same} == {fingerprint(base)}
    assert len({fingerprint(call) for call in (base, *other)}) == 4
