"""Serve's request router does what calls are aimed at; who runs is told across threads; what is missed is asked for."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from deployments import frames
from deployments.calls import Aim, Batch, Submission
from deployments.reports import Report, pack
from deployments.router import members
from deployments.router.fleet import Fleet
from deployments.router.request_router import MAX_LEAVING, AdapterRequestRouter
from deployments.router.subscriptions import Subscriptions
from tests.serving.test_placement import call
from tests.support.waiting import until_async, within

DEPLOYMENT = DeploymentID("Replica", "placement wiring")
DEADLINE_S = 30.0


class Running:
    """A replica as Serve's request router sees it. Asking for its queue's length is counted."""

    max_ongoing_requests = 10

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.num_probes = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.num_probes += 1
        return 0


def pending(*args: object) -> Any:
    return SimpleNamespace(args=args, kwargs={}, routing_context=SimpleNamespace(should_backoff=False))


def names(groups: Any) -> list[list[str]]:
    return [[replica.replica_id.unique_id for replica in group] for group in groups]


def router_of(*replicas: Running) -> AdapterRequestRouter:
    router = AdapterRequestRouter(
        deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.initialize_state()
    router.update_replicas(list(replicas))  # type: ignore[arg-type]
    return router


@pytest.mark.parametrize(
    ("asked", "groups"),
    [
        (Batch.of([Submission(call(), "router", 1, ("b", "a"))]), [["b"], ["a"]]),
        (Batch.of([Submission(call(), "router", 1, ("gone", "c"))]), [["c"]]),
        (Batch.of([Submission(call(), "router", 1, ("gone",))]), [["a", "b", "c"]]),
        (Batch.of([Submission(call(), "router", 1)]), [["a", "b", "c"]]),
        (Aim("c"), [["c"]]),
        (Aim("gone"), []),
        ("something", [["a", "b", "c"]]),
    ],
    ids=str,
)
def test_a_call_goes_where_it_is_aimed(asked: object, groups: list[list[str]]) -> None:
    async def choose() -> None:
        replicas = [Running(name) for name in "abc"]
        router = router_of(*replicas)
        assert names(await router.choose_replicas(replicas, pending(asked))) == groups  # type: ignore[arg-type]

    asyncio.run(choose())


def test_a_replica_that_was_quiet_is_not_asked_for_its_queue_before_a_call() -> None:
    async def choose() -> None:
        replica = Running("a")
        router = router_of(replica)
        await asyncio.sleep(0.01)  # Serve itself asks once when a replica is new
        replica.num_probes = 0
        router.replica_queue_len_cache.invalidate_key(replica.replica_id)
        ((chosen,),) = await router.choose_replicas([replica], pending(Aim("a")))  # type: ignore[list-item]
        assert await router._select_from_candidate_replicas([chosen], 0) is chosen
        assert replica.num_probes == 0

    asyncio.run(choose())


def test_a_replica_that_serve_found_dead_is_told_and_not_chosen() -> None:
    async def lose() -> None:
        first, second = Running("a"), Running("b")
        router = router_of(first, second)
        heard: list[tuple[str, ...]] = []
        stop = members.listen(str(DEPLOYMENT), asyncio.get_running_loop(), heard.append)
        router.on_replica_actor_died(first.replica_id)
        await asyncio.sleep(0)
        stop()
        assert heard == [("a", "b"), ("b",)]
        assert await router.choose_replicas([second], pending(Aim("a"))) == []  # type: ignore[list-item]

    asyncio.run(lose())


def test_a_replica_that_serve_has_taken_off_is_told_who_is_there_and_gets_no_calls() -> None:
    """Its streams go on for as long as a drain may take, which is longer than it believes a silent router."""

    async def drain() -> None:
        first, second = Running("a"), Running("b")
        router = router_of(first, second)
        router.update_replicas([second])  # type: ignore[list-item]

        async def chosen(*args: object) -> object:
            metadata = RequestMetadata(request_id="q", internal_request_id=str(args))
            asked = PendingRequest(args=list(args), kwargs={}, metadata=metadata)
            return await within(router._choose_replica_for_request(asked), "a choice", DEADLINE_S)

        assert await chosen(Aim("a")) is first
        assert await chosen(Batch.of([Submission(call(), "router", 1, ("a",))])) is second
        assert await chosen(Batch.of([Submission(call(), "router", 2)])) is second
        router.on_replica_actor_died(first.replica_id)
        router.update_replicas([second])  # type: ignore[list-item]
        assert await router.choose_replicas([second], pending(Aim("a"))) == []  # type: ignore[list-item]

    asyncio.run(drain())


def test_of_those_that_serve_has_taken_off_the_last_are_remembered() -> None:
    async def drain() -> None:
        every = [Running(str(number)) for number in range(MAX_LEAVING + 9)]
        router = router_of(*every)
        for number in range(len(every)):
            router.update_replicas(every[number + 1 :])  # type: ignore[arg-type]
        assert list(router._leaving) == [str(number) for number in range(9, len(every))]
        router.update_replicas(every)  # type: ignore[arg-type]
        assert not router._leaving

    asyncio.run(drain())


def test_who_runs_is_told_on_the_loop_that_listens_from_any_thread_in_order() -> None:
    async def listen() -> None:
        heard: list[tuple[str, ...]] = []
        threads: list[int] = []
        done = asyncio.Event()

        def hear(ids: tuple[str, ...]) -> None:
            heard.append(ids)
            threads.append(threading.get_ident())
            if ids == ("99",):
                done.set()

        stop = members.listen("across threads", asyncio.get_running_loop(), hear)
        news = threading.Thread(target=lambda: [members.publish("across threads", [str(i)]) for i in range(100)])
        news.start()
        await within(done.wait(), "the last news", DEADLINE_S)
        news.join(DEADLINE_S)
        stop()
        members.publish("across threads", ["after"])
        await asyncio.sleep(0)
        assert heard == [(str(i),) for i in range(100)]
        assert set(threads) == {threading.get_ident()}

    asyncio.run(listen())


class Frames:
    """A handle whose replicas send what the test puts in."""

    def __init__(self) -> None:
        self.queues: dict[str, asyncio.Queue[bytes | None]] = {}
        self.beats: list[tuple[str, dict[str, bool]]] = []
        self.subscribe = SimpleNamespace(remote=self._subscribe)
        self.cancel = SimpleNamespace(remote=self._cancel)
        self.num_opened: dict[str, int] = {}

    def options(self, **_: object) -> Frames:
        return self

    def _subscribe(self, aim: Aim, router: str, reading: int) -> Any:
        self.num_opened[aim.replica] = self.num_opened.get(aim.replica, 0) + 1
        queue = self.queues[aim.replica] = asyncio.Queue()

        class Response:
            async def __anext__(self) -> bytes:
                frame = await queue.get()
                if frame is None:
                    raise StopAsyncIteration
                return frame

            def cancel(self) -> None:
                pass

        return Response()

    def _cancel(self, aim: Aim, router: str, numbers: tuple[int, ...], **more: bool) -> Any:
        self.beats.append((aim.replica, more))
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def test_what_runs_is_read_from_before_it_is_asked_and_again_after_it_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "SWEEP_S"):
        monkeypatch.setattr(f"deployments.router.subscriptions.{name}", 0.01)

    async def explain(error: Exception, _: str) -> Exception:
        return error

    async def read() -> None:
        handle, fleet = Frames(), Fleet()
        subscriptions = Subscriptions(handle, explain=explain, known_replicas=lambda: {"a", "b"}, fleet=fleet)
        fleet.on_members(["a", "b"])
        subscriptions.read_from(["a", "b"])
        await until_async(lambda: set(handle.queues) == {"a", "b"}, "subscriptions to both")

        def report(number: int, *, is_full: bool = False) -> bytes:
            told = Report(epoch=1, number=number, load=3, capacity=8, is_full=is_full)
            return frames.write(3, (), pack(told))

        handle.queues["a"].put_nowait(report(0, is_full=True))
        handle.queues["a"].put_nowait(report(1))
        await until_async(lambda: fleet.place(call())[0] == "b", "the load of a")
        assert handle.beats == []
        handle.queues["a"].put_nowait(report(3))
        await until_async(lambda: handle.beats, "a word that a report was missed")
        assert handle.beats == [("a", {"is_report_missed": True})]
        handle.queues["b"].put_nowait(None)
        await until_async(lambda: handle.num_opened == {"a": 1, "b": 2}, "a new subscription to b")
        assert fleet.place(call())[-1] == "b", "nothing was heard of it since it broke"
        await subscriptions.close()

    asyncio.run(read())
