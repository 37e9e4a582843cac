"""The promises of a server hold behind HAProxy and behind Serve's own proxy, in one loop and in several."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import FALLBACK, Bucket, started
from tests.e2e.server import Server
from tests.e2e.test_sockets import ports_of
from tests.support.waiting import ended, within

BACK_S = 90.0
LONG, NUM_LEAVING = 450, 32
LINE = "One base, many voices\n"


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory, bucket: Bucket) -> Iterator[Server]:
    yield from started(tmp_path_factory, bucket, FALLBACK)


@pytest.fixture(scope="module", params=[{}, FALLBACK], ids=["haproxy", "fallback"])
def direct(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bucket: Bucket
) -> Iterator[Server]:
    yield from started(tmp_path_factory, bucket, request.param, direct=True)


def ask(server: Server, model: str = "upper", max_tokens: int = 64) -> httpx.Response:
    body = {"model": model, "prompt": LINE, "max_tokens": max_tokens, "temperature": 0}
    return server.client.post("/v1/completions", json=body)


def streamed(server: Server, model: str = "upper") -> str:
    body = {"model": model, "prompt": LINE, "max_tokens": 64, "temperature": 0, "stream": True}
    text, is_whole = "", False
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            is_whole = line == "data: [DONE]" or (line == "" and is_whole)
    assert is_whole
    return text


def is_right(server: Server) -> bool:
    """Whether it answers; while it cannot, it says so in a way that clients try again."""
    try:
        response = ask(server)
    except httpx.TransportError:
        return False  # the proxy itself is away, or was while it answered
    if response.status_code == 200:
        assert response.json()["choices"][0]["text"] == LINE.strip().upper()
        return True
    assert response.status_code == 503 or not server.is_behind_haproxy, response.text
    return False


def test_serve_s_own_proxy_answers_the_same(fallback: Server) -> None:
    assert ask(fallback).json()["choices"][0]["text"] == streamed(fallback) == LINE.strip().upper()
    assert httpx.get(f"{fallback.url}/v1/models", trust_env=False).status_code == 401
    assert "Serve's own proxy is used" in fallback.log.read_text()
    assert not fallback.processes("haproxy -db")


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Router", "Replica", "AdapterStore"])
def test_a_part_that_is_killed_is_replaced_and_answers_are_right_again(either: Server, title: str) -> None:
    assert streamed(either) == LINE.strip().upper()
    for pid in either.processes("AdapterStore" if title == "AdapterStore" else f"ServeReplica:chorus:{title}"):
        os.kill(pid, signal.SIGKILL)
    either.wait_until(lambda: is_right(either), f"right answers after the death of {title}", BACK_S)
    assert streamed(either, "reverse") == "enO esab, ynam seciov"


PROXIES = ["haproxy -db", "HAProxyManager", "ProxyActor"]  # the first two are HAProxy's; beside it the third stands by


@pytest.mark.slow
@pytest.mark.parametrize("title", [*PROXIES, "ServeReplica:chorus:Router"])
def test_who_is_asked_while_a_part_on_its_way_dies_gets_all_of_an_answer_or_a_fault(either: Server, title: str) -> None:
    """Never a part of one that looks whole, and afterwards all is right."""
    pids = either.processes(title)
    if not pids:
        pytest.skip("a server has this part behind the other proxy only")
    with Load(either) as load:
        load.wait_for_more("answers before the death")
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        either.wait_until(lambda: not set(pids) & set(either.processes()), "the killed to be gone", 30.0)
        either.wait_until(lambda: is_right(either), f"right answers after the death of {title}", BACK_S)
        load.wait_for_more("answers after the death")
    assert not load.wrong
    assert streamed(either) == LINE.strip().upper()


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_costs_no_answer(either: Server) -> None:
    either.wait_until(lambda: len(either.stats()["replicas"]) == 2, "two replicas", BACK_S)
    with Load(either) as load:
        load.wait_for_more("answers before the death")
        os.kill(either.stats()["replicas"][0]["pid"], signal.SIGKILL)
        load.wait_for_more("answers after the death")
    assert not load.wrong
    assert not load.faults
    either.wait_until(lambda: len(either.stats()["replicas"]) == 2, "two replicas again", BACK_S)


@pytest.mark.slow
def test_a_new_configuration_under_load_costs_no_answer(either: Server) -> None:
    """It replaces the router and both replicas, one by one."""
    title = "ServeReplica:chorus:"
    either.wait_until(lambda: len(either.processes(title)) == 3, "a router and two replicas", BACK_S)
    old = set(either.processes(title))
    with Load(either) as load:
        load.wait_for_more("answers before the change")
        either.deploy(drain_s=12.0)
        either.wait_until(
            lambda: len(new := set(either.processes(title))) == 3 and not new & old, "three new processes", BACK_S
        )
        load.wait_for_more("answers after the change")
    assert not load.wrong
    assert not load.faults


class Load:
    """Streams, asked for as fast as they end, in as many threads as `WIDTH`."""

    WIDTH = 6

    def __init__(self, server: Server) -> None:
        self._server, self._stop = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(self.WIDTH)]
        self.num_right = 0
        self.wrong: list[str] = []
        self.faults: list[str] = []

    def _ask(self) -> None:
        for _ in iter(self._stop.is_set, True):
            try:
                text = streamed(self._server)
            except Exception as error:
                self.faults.append(repr(error))
                self._stop.wait(0.05)
                continue
            if text == LINE.strip().upper():
                self.num_right += 1
            else:
                self.wrong.append(text)

    def wait_for_more(self, what: str) -> None:
        wanted = self.num_right + 3 * self.WIDTH
        self._server.wait_until(lambda: self.num_right >= wanted, what, BACK_S)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            ended(thread, "a client's last answer", BACK_S)


@pytest.mark.slow
def test_a_second_server_on_the_machine_and_its_sudden_end_are_nothing_to_the_first(
    either: Server, tmp_path_factory: pytest.TempPathFactory, bucket: Bucket
) -> None:
    """Only their ports differ. When `serve run` itself is killed, no process of it keeps its port."""
    same_folder = {"RAY_TMPDIR": str(either.folder)}
    for second in started(tmp_path_factory, bucket, same_folder):
        assert streamed(second) == streamed(either) == LINE.strip().upper()
        assert not set(second.processes()) & set(either.processes())
        assert not ports_of(second) & ports_of(either), "the kernel deals out what comes to a port of two"
        second.kill()
        either.wait_until(lambda: is_free(second.port), "the port of a killed server to be free", 60.0)  # noqa: B023
        for title in ("haproxy -db", "ServeReplica", "ProxyActor"):  # agents of Ray's own may stay for minutes
            what = f"{title} of a killed server to end"
            either.wait_until(lambda: not second.processes(title), what, 60.0)  # noqa: B023
    assert streamed(either, "reverse") == "enO esab, ynam seciov"


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # but for connections that were closed
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "application/json"}, b'{"model": "demo", "prompt": ', 400),
        ({"content-type": "application/json"}, b"[" * 5000, 400),
        ({"content-type": "application/json"}, b" " * (5 << 20), 413),
        ({"content-type": "application/json", "x-request-id": "mine-1"}, b'{"model": "nobody", "prompt": "a"}', 404),
    ],
    ids=["cut off", "deep", "large", "unknown model"],
)
def test_a_bad_body_gets_the_same_answer(either: Server, headers: dict[str, str], body: bytes, status: int) -> None:
    response = either.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


@pytest.mark.slow
def test_clients_that_go_away_free_their_sequences(either: Server) -> None:
    """More than the engines could compute at once, so that they are not done when the clients leave."""
    either.wait_until(lambda: len(either.stats()["replicas"]) == 2, "two replicas", BACK_S)
    before = generated(either)
    asyncio.run(leave_after_one_answers(either))
    either.wait_until(lambda: either.in_engines() == 0, "the sequences of clients that left to be freed", 60.0)
    assert 0 < generated(either) - before < NUM_LEAVING * LONG


def generated(server: Server) -> int:
    """Tokens, so far."""
    return sum(replica["engine"]["total_generated_tokens"] for replica in server.stats()["replicas"])


async def leave_after_one_answers(server: Server) -> None:
    begun = asyncio.Event()

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "demo", "prompt": f"{number}\n", "max_tokens": LONG, "ignore_eos": True, "stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                begun.set()

    key = server.client.headers["authorization"]
    async with httpx.AsyncClient(
        base_url=server.url, headers={"authorization": key}, timeout=60, trust_env=False
    ) as client:
        tasks = [asyncio.ensure_future(stream(client, number)) for number in range(NUM_LEAVING)]
        await within(begun.wait(), "the first token of the first stream")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.slow
def test_ctrl_c_ends_it_with_code_0_and_no_native_trace(last_either: Server) -> None:
    assert last_either.stop() == 0
    last_either.wait_until(lambda: not last_either.processes(), "every process to end", 30.0)
    log = last_either.log.read_text()
    assert "*** SIG" not in log
    assert "Stack trace" not in log


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "upper"])
def test_a_replica_that_answers_http_itself_says_the_same(direct: Server, model: str) -> None:
    expected = LINE.strip().upper() if model == "upper" else LINE.strip()
    assert ask(direct, model).json()["choices"][0]["text"] == streamed(direct, model) == expected
    assert not direct.processes("ServeReplica:chorus:Router")


@pytest.mark.slow
def test_a_replica_that_answers_http_itself_has_the_same_gate(direct: Server) -> None:
    assert httpx.get(f"{direct.url}/v1/models", trust_env=False).status_code == 401
    assert ask(direct, "nobody").status_code == 404
    assert direct.client.post("/v1/completions", json={"model": "demo", "prompt": "a", "top_p": 7}).status_code == 400


@pytest.mark.slow
def test_a_replica_that_answers_http_itself_is_replaced_when_it_is_killed(direct: Server) -> None:
    for pid in direct.processes("ServeReplica:chorus:Replica"):
        os.kill(pid, signal.SIGKILL)
    direct.wait_until(lambda: is_right(direct), "right answers after the death of all replicas", BACK_S)
