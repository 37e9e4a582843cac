"""Answers that survive their replica, and streams put together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from deployments.calls import Call, Fault, Refused, StreamItem
from deployments.losses import Meaning
from deployments.router.streams import all_primed, answer, merge
from engine.request import FinishReason, SamplingParams
from tests.serving.fakes import EOS, FakeBackend


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.router.streams.FIRST_PAUSE_S", 0.0)


def _call(text: str = "hello there", **params: object) -> Call:
    return Call(
        request_id="q",
        prompt_token_ids=tuple(text.encode()),
        params=SamplingParams(max_tokens=None, **params),  # type: ignore[arg-type]
        seed=7,
        adapter="alpha",
    )


async def _texts(backend: FakeBackend, call: Call, max_resumes: int = 8) -> dict[int, str]:
    texts: dict[int, str] = {}
    finishes = 0
    async for delta in answer(backend, call, max_resumes=max_resumes):
        texts[delta.sample_index] = texts.get(delta.sample_index, "") + delta.text
        finishes += delta.finish_reason is FinishReason.STOP
    assert finishes == call.params.n
    return texts


@pytest.mark.parametrize("deaths", [[0], [1], [5], [3, 4, 2], [0, 0, 0], [11], [12], [2, 0, 5]])
def test_nothing_is_lost_or_repeated_when_replicas_die(deaths: list[int]):
    """Somebody stops the replicas: of those that end by themselves, tests/serving/test_suspects.py tells."""
    backend = FakeBackend(deaths=deaths.copy(), lost=Meaning.KILLED)
    assert asyncio.run(_texts(backend, _call())) == {0: "HELLO THERE"}
    assert backend.open_streams == 0


def test_what_is_resent_continues_and_does_not_extend_the_prompt():
    backend = FakeBackend(deaths=[3, 2])
    asyncio.run(_texts(backend, _call()))
    first, second, third = backend.calls
    assert [call.prompt_token_ids for call in (second, third)] == [first.prompt_token_ids] * 2
    assert bytes(second.resumed_output_token_ids) == b"HEL"
    assert bytes(third.resumed_output_token_ids) == b"HELLO"
    assert {second.seed, third.seed} == {7}
    assert (first.adapter_version, second.adapter_version, third.adapter_version) == (None, "v1", "v1")
    assert second.avoid == ("replica-1",)
    assert third.avoid == ("replica-1", "replica-2")
    assert len({call.request_id for call in backend.calls}) == 3


@pytest.mark.parametrize("deaths", [[0], [2], [6], [4, 1, 1], [36]])
def test_each_unfinished_sample_is_resumed_under_its_own_index(deaths: list[int]):
    backend = FakeBackend(deaths=deaths.copy(), number_samples=True, lost=Meaning.KILLED)
    assert asyncio.run(_texts(backend, _call(n=3))) == {i: f"HELLO THERE{i}" for i in range(3)}
    resumed = [call for call in backend.calls if call.resumed_output_token_ids]
    assert all(call.params.n == 1 for call in resumed)


def test_the_tries_are_bounded():
    backend = FakeBackend(deaths=[1] * 20, lost=Meaning.AWAY)
    with pytest.raises(Refused) as caught:
        asyncio.run(_texts(backend, _call(), max_resumes=3))
    assert caught.value.fault.code == "replica_lost"
    assert len(backend.calls) == 4


def test_whoever_stops_replicas_may_stop_as_many_as_they_like():
    backend = FakeBackend(deaths=[0, 1] * 20, lost=Meaning.KILLED)
    text = "a text of more than twenty characters"
    assert asyncio.run(_texts(backend, _call(text), max_resumes=0)) == {0: text.upper()}


def test_calls_that_run_at_once_never_share_an_id():
    """Two samples that were lost before they had a token go on under ids of their own."""
    backend = FakeBackend(deaths=[0, 0, 0, 0, 1, 1, 0, 0, 1], number_samples=True, lost=Meaning.KILLED)
    asyncio.run(_texts(backend, _call(n=3)))
    assert len({call.request_id for call in backend.calls}) == len(backend.calls)


def test_a_dead_engine_counts_as_a_lost_replica():
    class Dying(FakeBackend):
        async def stream(self, call: Call) -> AsyncGenerator:
            self.fault = Fault(code="engine_dead", message="boom") if not self.calls else None
            self.fault_after = 4
            async for item in super().stream(call):
                yield item

    backend = Dying()
    assert asyncio.run(_texts(backend, _call())) == {0: "HELLO THERE"}
    assert len(backend.calls) == 2


class Full(FakeBackend):
    """Replicas that are full, by name, in the order in which they are asked; the next has room."""

    def __init__(self, *full: str) -> None:
        super().__init__()
        self.full = list(full)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        if self.full:
            self.calls.append(call)
            yield StreamItem(replica=self.full.pop(0), fault=Fault(code="queue_full", message="24 requests wait"))
            return
        async for item in super().stream(call):
            yield item


@pytest.mark.parametrize("full", [["a"], ["a", "b"]])
def test_a_full_replica_is_passed_over_while_another_may_have_room(full: list[str]):
    backend = Full(*full)
    assert asyncio.run(_texts(backend, _call(), max_resumes=0)) == {0: "HELLO THERE"}
    assert [call.avoid for call in backend.calls] == [tuple(full[:i]) for i in range(len(full) + 1)]


@pytest.mark.parametrize("full", [["a", "a"], ["a", "b", "b"], ["a", "b", "c"]])
def test_a_caller_hears_of_full_queues_when_no_replica_is_left_or_enough_were_asked(full: list[str]):
    backend = Full(*full, "never asked")
    with pytest.raises(Refused) as caught:
        asyncio.run(_texts(backend, _call()))
    assert caught.value.fault.code == "queue_full"
    assert backend.full == ["never asked"]


@pytest.mark.parametrize("code", ["context_length_exceeded", "adapter_not_found"])
def test_a_refusal_is_told_and_not_retried(code: str):
    backend = FakeBackend(fault=Fault(code=code, message="no"))
    with pytest.raises(Refused) as caught:
        asyncio.run(_texts(backend, _call()))
    assert caught.value.fault.code == code
    assert len(backend.calls) == 1


def test_a_reader_that_leaves_closes_the_stream_at_the_replica():
    async def leave() -> int:
        backend = FakeBackend()
        async with aclosing(answer(backend, _call(), max_resumes=1)) as deltas:
            await anext(deltas)
            assert backend.open_streams == 1
        return backend.open_streams

    assert asyncio.run(leave()) == 0


def test_one_refused_prompt_of_many_leaves_none_running():
    async def ask() -> int:
        good = FakeBackend()
        bad = FakeBackend(fault=Fault(code="queue_full", message="full"), pause_s=0.01)
        with pytest.raises(Refused):
            await all_primed([answer(b, _call(), max_resumes=0) for b in (good, bad, good)])
        return good.open_streams + bad.open_streams

    assert asyncio.run(ask()) == 0


def test_merge_tells_which_stream_an_item_is_of_and_closes_all_when_left():
    async def run() -> tuple[set[tuple[int, int]], int, int]:
        backend = FakeBackend()
        streams = await all_primed([answer(backend, _call(text), max_resumes=0) for text in ("ab", "c")])
        items = {(index, token) async for index, delta in merge(streams) for token in delta.token_ids}
        left = FakeBackend()
        streams = await all_primed([answer(left, _call(), max_resumes=0) for _ in range(2)])
        opened = left.open_streams
        async with aclosing(merge(streams)) as merged:
            await anext(merged)
        return items, opened, left.open_streams

    items, opened, still_open = asyncio.run(run())
    assert items == {(0, ord("A")), (0, ord("B")), (0, EOS), (1, ord("C")), (1, EOS)}
    assert (opened, still_open) == (2, 0)
