"""Shards of the store as actors: one that is killed comes back with what was registered, and fewer follow more."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from pathlib import Path

import pytest
import ray

from adapter_store.records import Registration, shard_of
from deployments.settings.app import AdapterSettings
from deployments.store.actor import connectors
from deployments.store.client import StoreClient
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.ray_session import NAMESPACE, ray_session  # noqa: F401
from tests.support.waiting import until, within

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WAIT_S = 60.0


def _settings(tmp_path: Path, name: str, shards: int) -> AdapterSettings:
    return AdapterSettings.model_validate(
        {
            "sources": [{"kind": "file", "path": str(tmp_path / "adapters")}],
            "host_bytes": 8 << 20,
            "max_adapter_bytes": 1 << 20,
            "disk_path": str(tmp_path / "disk"),
            "shards": shards,
            "refresh_s": 0.1,
            "namespace": NAMESPACE,
            "store_name": name,
        }
    )


def _alive(name: str) -> list[str]:
    return [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].startswith(name)
    ]


def test_a_shard_that_is_killed_keeps_what_was_registered_and_fewer_shards_follow_more(tmp_path: Path):
    name = f"shards-{uuid.uuid4().hex}"
    for folder in ("a", "b"):
        (tmp_path / "adapters" / folder).mkdir(parents=True)
        for file, content in small_adapter(seed=ord(folder)).items():
            (tmp_path / "adapters" / folder / file).write_bytes(content)
    rows = tuple(Registration(name=f"r-{number}", source="local", location="ab"[number % 2]) for number in range(8))
    assert len({shard_of(row.name, 3) for row in rows}) == 3

    async def main() -> None:
        connects = connectors(_settings(tmp_path, name, 3), app="app")
        client = StoreClient(connects, wait_s=WAIT_S, owner="me", spec=small_spec(), digest="")
        await client.start()
        await client.register(rows)
        for connect in connects[1:]:
            actor = connect()
            os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        for row in rows:
            assert (await within(client.resolve(row.name), f"{row.name} to be known", WAIT_S)).source == "catalog"
        page = await client.list_adapters(None, 100)
        assert [record.name for record in page.records] == [row.name for row in rows]
        fewer = StoreClient(connectors(_settings(tmp_path, name, 1), app="app"), wait_s=WAIT_S)
        await fewer.start()
        for row in rows:
            assert (await fewer.resolve(row.name)).source == "catalog"
        old = StoreClient(connects[:1], wait_s=WAIT_S)
        assert (await old.status()).num_registered == len(rows), "who was there before follows the application"

    try:
        asyncio.run(main())
        until(lambda: len(_alive(name)) == 1, lambda: f"one store; there are {_alive(name)}", WAIT_S)
    finally:
        for left in _alive(name):
            ray.kill(ray.get_actor(left, namespace=NAMESPACE))
