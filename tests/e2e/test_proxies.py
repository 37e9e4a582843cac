"""The promises of a server hold behind HAProxy and behind Serve's own proxy, in one loop and in several."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import ADAPTERS, BUCKET, Bucket
from tests.e2e.server import Server

FALLBACK = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
BACK_S = 90.0
LINE = "One base, many voices\n"


def started(
    tmp_path_factory: pytest.TempPathFactory, bucket: Bucket, environment: dict[str, str], direct: bool = False
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(ADAPTERS, folder, dirs_exist_ok=True)
    server = Server(folder, bucket.endpoint, BUCKET, environment, direct)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory, bucket: Bucket) -> Iterator[Server]:
    yield from started(tmp_path_factory, bucket, FALLBACK)


@pytest.fixture(scope="module", params=[{}, FALLBACK], ids=["haproxy", "fallback"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bucket: Bucket
) -> Iterator[Server]:
    yield from started(tmp_path_factory, bucket, request.param)


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
    text = ""
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
    assert line == "" or line == "data: [DONE]"
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
@pytest.mark.parametrize("title", ["ServeReplica:chorus:Router", "ServeReplica:chorus:Replica", "AdapterStore"])
def test_a_part_that_is_killed_is_replaced_and_answers_are_right_again(either: Server, title: str) -> None:
    assert streamed(either) == LINE.strip().upper()
    for pid in either.processes(title):
        os.kill(pid, signal.SIGKILL)
    either.wait_until(lambda: is_right(either), f"right answers after the death of {title}", BACK_S)
    assert streamed(either, "reverse") == "enO esab, ynam seciov"


@pytest.mark.slow
def test_a_proxy_that_is_killed_is_replaced(either: Server) -> None:
    proxies = either.processes("haproxy -db") or either.processes("ProxyActor")
    assert proxies
    for pid in proxies:
        os.kill(pid, signal.SIGKILL)
    either.wait_until(lambda: is_right(either), "right answers after the death of the proxy", BACK_S)


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
def test_a_client_that_goes_away_frees_its_sequence(either: Server) -> None:
    body = {"model": "demo", "prompt": LINE, "max_tokens": 450, "ignore_eos": True, "stream": True}
    with either.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
        either.wait_until(lambda: either.in_engines() == 1, "the sequence to be seen in an engine", 10.0)
    either.wait_until(lambda: either.in_engines() == 0, "the sequence of a client that left to be freed", 10.0)


@pytest.mark.slow
def test_ctrl_c_ends_it_with_code_0_and_no_native_trace(either: Server) -> None:
    assert either.stop() == 0
    either.wait_until(lambda: not either.processes(), "every process to end", 30.0)
    log = either.log.read_text()
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
