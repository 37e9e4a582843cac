"""A request that ends its replicas, on real ones: it costs three, and the streams beside it are whole."""

from __future__ import annotations

import asyncio
import tempfile
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
        self._folder = Path(tempfile.mkdtemp(prefix="chorus-", dir="/tmp"))
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["import_path"] = "tests.e2e.deadly:build"
        self._config = self._folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self.log = self._folder / "log.txt"
        self.deaths = self._folder / "deaths.txt"
        self.client = httpx.Client(base_url=self.url, timeout=DEADLINE_S, trust_env=False)

    def num_deaths(self) -> int:
        return len(self.deaths.read_text().splitlines()) if self.deaths.exists() else 0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeadlyServer]:
    running = DeadlyServer()
    monkeypatch.setenv(LOG, str(running.deaths))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    try:
        running.start()
        yield running
    finally:
        running.remove()


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
    server.wait_until(lambda: len(server.stats()["replicas"]) == 2, 120)
