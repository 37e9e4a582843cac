"""The demo without keys, on real replicas: who may change it, one that hangs, and a request that ends three."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.e2e.deadly import LOG
from tests.e2e.server import ROOT, Server, free_port

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DEADLINE_S = 300.0
LONG = {"max_tokens": 400, "temperature": 0, "ignore_eos": True}


class DeadlyServer(Server):
    """The demo, without keys, with replicas that one prompt ends."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="chorus-", dir="/tmp"))
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["import_path"] = "tests.e2e.deadly:build"
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self.log = self.folder / "log.txt"
        self.deaths = self.folder / "deaths.txt"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def num_deaths(self) -> int:
        return len(self.deaths.read_text().splitlines()) if self.deaths.exists() else 0


@pytest.fixture(scope="module")
def server() -> Iterator[DeadlyServer]:
    running = DeadlyServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(LOG, str(running.deaths))
        patch.setenv("PYTHONPATH", str(ROOT))
        try:
            running.start()
            yield running
        finally:
            running.remove()


def test_on_a_loopback_address_this_machines_user_may_change_without_a_key(server: DeadlyServer):
    """Where it listens the server has from Serve itself."""
    row = {"name": "shout", "source": "local", "location": "upper"}
    assert server.client.post("/adapters", json=row).json() == {"registered": 1}
    refused = server.client.post("/adapters", json=row, headers={"origin": "http://evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "cross_origin")
    assert server.client.post("/adapters", json=row, headers={"host": "evil.example"}).status_code == 403
    as_text = {"content-type": "text/plain"}
    assert server.client.post("/adapters", content=json.dumps(row), headers=as_text).status_code == 415


def test_a_frozen_replica_is_named_and_the_server_is_well(server: DeadlyServer):
    frozen = server.stats()["replicas"][0]
    os.kill(frozen["pid"], signal.SIGSTOP)
    try:
        stats = server.stats()
        assert len(stats["replicas"]) == 1
        assert [part["replica"] for part in stats["missing"]] == [frozen["replica"]]
        for _ in range(3):
            time.sleep(1.1)  # what /health said is remembered for a second
            assert server.client.get("/health").status_code == 200
    finally:
        os.kill(frozen["pid"], signal.SIGCONT)


def test_a_deadly_request_costs_three_replicas_and_no_other_stream(server: DeadlyServer):
    async def ask(client: httpx.AsyncClient, prompt: str) -> tuple[int, str]:
        body = {"model": "upper", "prompt": f"{prompt}\n", **LONG}
        response = await client.post("/v1/completions", json=body)
        if response.status_code != 200:
            return response.status_code, response.text
        return 200, response.json()["choices"][0]["text"]

    async def run() -> None:
        prompts = [f"line {number}" for number in range(6)]
        async with asyncio.timeout(DEADLINE_S), httpx.AsyncClient(base_url=server.url, timeout=None) as client:
            before = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
            tasks = [asyncio.ensure_future(ask(client, prompt)) for prompt in [*prompts, "deadly"]]
            *found, (status, text) = await asyncio.gather(*tasks)
            assert found == before
            assert status == 422, text
            assert "request_ends_replicas" in text
            assert server.num_deaths() == 3
            assert (await ask(client, "deadly"))[0] == 422
            assert server.num_deaths() == 3

    asyncio.run(run())
    server.wait_until(lambda: len(server.stats()["replicas"]) == 2, "two replicas", 120)
