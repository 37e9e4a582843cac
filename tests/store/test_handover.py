"""Stores that follow each other, and nodes that come and go: what is registered outlives all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from adapter_store import actor as actor_module
from adapter_store.actor import get_or_create_store, store_name
from adapter_store.errors import SpecUnknown, StoreConfigInvalid
from adapter_store.image.packing import pack
from adapter_store.records import Registration, StoreConfig
from adapter_store.sources.base import SourceConfig
from tests.support import waiting
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.ray_session import NAMESPACE, ray_session  # noqa: F401

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
WAIT_S = 60.0


def folder_of(path: Path, *names: str) -> tuple[SourceConfig, ...]:
    for name in names:
        (path / name).mkdir(parents=True)
        for file, content in small_adapter().items():
            (path / name / file).write_bytes(content)
    return (SourceConfig(uri=path.as_uri(), name="local"),)


def until(what: str, condition: Callable[[], Any]) -> Any:
    seen: Any = None

    def holds() -> Any:
        nonlocal seen
        try:
            seen = condition()
        except (RayActorError, SpecUnknown) as error:
            seen = error
            return None
        return seen

    return waiting.until(holds, lambda: f"{what}; last seen: {seen}", WAIT_S, poll_s=0.05)


def is_gone(name: str) -> bool:
    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return True
    return False


def test_a_store_with_other_sources_follows_and_finds_names_and_pins_on_the_disk(tmp_path):
    config = StoreConfig(disk_path=str(tmp_path / "disk"), refresh_s=0.0)
    before, after = folder_of(tmp_path / "one", "a"), folder_of(tmp_path / "two", "a", "b")
    names = {"namespace": NAMESPACE, "name": f"follow-{uuid.uuid4().hex}", "app": "mine"}
    old = get_or_create_store(before, config, **names)
    ray.get(old.register_spec.remote(small_spec()))
    ray.get(old.register.remote((Registration(name="team/x", source="local", location="a"),)))
    ray.get(old.pin.remote("a"))
    new = get_or_create_store(after, config, **names)
    try:
        status = until("the disk", lambda: (s := ray.get(new.status.remote())).degraded == () and s)
        assert (status.num_registered, status.num_pinned) == (1, 1)
        assert ray.get(new.resolve.remote("b")).name == "b", "the new sources are asked"
        assert is_gone(store_name(before, config, names["name"])), "the store that was followed has left"
        # A replica of the application as it was: it gets the successor, and does not bring the old one back.
        late = get_or_create_store(before, config, **names, takes_over=False)
        assert ray.get(late.status.remote()).num_registered == 1
        assert is_gone(store_name(before, config, names["name"]))
    finally:
        ray.kill(new)


@pytest.mark.parametrize("change", ["sources", "settings", "base", "code"])
def test_stores_are_told_apart_by_what_they_serve_and_how(change, tmp_path, monkeypatch):
    sources, config = (SourceConfig(uri=tmp_path.as_uri(), name="local"),), StoreConfig()
    before = store_name(sources, config, "n", "base")
    assert store_name(sources, config, "n", "base") == before
    if change == "code":
        monkeypatch.setattr(actor_module, "code_digest", lambda: "another program")
    after = {
        "sources": lambda: store_name((*sources, SourceConfig(uri="file:///x", name="x")), config, "n", "base"),
        "settings": lambda: store_name(sources, StoreConfig(refresh_s=1.5), "n", "base"),
        "base": lambda: store_name(sources, config, "n", "another base"),
        "code": lambda: store_name(sources, config, "n", "base"),
    }[change]()
    assert after != before


def test_two_applications_have_a_store_each_and_one_disk_is_told_and_not_shared(tmp_path):
    config = StoreConfig(disk_path=str(tmp_path / "disk"), refresh_s=0.0)
    name = f"two-{uuid.uuid4().hex}"
    stores = {}
    try:
        for app in ("first", "second"):
            sources = folder_of(tmp_path / app, "a")
            stores[app] = get_or_create_store(sources, config, namespace=NAMESPACE, name=name, app=app)
            ray.get(stores[app].register_spec.remote(small_spec()))
        first, second = stores["first"], stores["second"]
        ray.get(first.register.remote((Registration(name="team/x", source="local", location="a"),)))
        assert ray.get(first.status.remote()).degraded == ()
        status = ray.get(second.status.remote())
        assert status.degraded == ("disk",)
        assert status.num_registered == 0, "what one application registers is not the other's"
        with pytest.raises(Exception, match="cannot be written now"):
            ray.get(second.register.remote((Registration(name="team/y", source="local", location="a"),)))
        assert ray.get(second.resolve.remote("a")).name == "a", "it serves all the same"
    finally:
        for store in stores.values():
            ray.kill(store)


def test_what_is_registered_outlives_a_store_without_a_disk(tmp_path):
    name = f"memory-{uuid.uuid4().hex}"
    store = get_or_create_store(folder_of(tmp_path, "a"), namespace=NAMESPACE, name=name, app="mine")
    try:
        ray.get(store.register_spec.remote(small_spec()))
        ray.get(
            store.register.remote(tuple(Registration(name=f"x{i}", source="local", location="a") for i in range(9)))
        )
        ray.get(store.unregister.remote(("x3",)))
        ray.get(store.pin.remote("a"))
        os.kill(ray.get(store.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        status = until("the store to come back", lambda: ray.get(store.status.remote()))
        assert (status.num_registered, status.num_pinned) == (8, 1)
        assert ray.get(store.resolve.remote("x4")).source == "catalog"
    finally:
        ray.kill(store)


def test_a_thousand_waiting_leases_do_not_keep_a_heartbeat_from_coming(tmp_path):
    """Their source never answers."""
    fifo = folder_of(tmp_path, "a")
    config = StoreConfig(stat_timeout_s=500.0)
    store = get_or_create_store(fifo, config, namespace=NAMESPACE, name=f"slow-{uuid.uuid4().hex}")
    try:
        digest = ray.get(store.register_spec.remote(small_spec()))
        held = ray.get(store.acquire.remote("a", digest, "me"))
        stop = "import asyncio\nasync def wait(*_): await asyncio.Event().wait()\n"

        def hang(actor: Any) -> None:
            scope: dict[str, Any] = {}
            exec(stop, scope)  # what is sent to an actor must not need this file
            actor._store._resolver.resolve = scope["wait"]

        ray.get(store.__ray_call__.remote(hang))
        waiting = [store.acquire.remote(f"b{i}", digest, "me") for i in range(1200)]
        waiting += [store.resolve.remote(f"b{i}") for i in range(1200)]
        assert ray.get(store.heartbeat.remote("me", (held.version,), digest), timeout=WAIT_S) == ()
        assert ray.get(store.status.remote(), timeout=WAIT_S).num_leases == 1
        ray.get(store.release.remote(held.version, "me", held.number), timeout=WAIT_S)
        assert ray.get(store.status.remote(), timeout=WAIT_S).num_leases == 0
        assert ray.wait(waiting, num_returns=1, timeout=0)[0] == []
    finally:
        ray.kill(store)


def test_a_secret_by_value_never_becomes_an_argument_of_the_actor(tmp_path):
    source = SourceConfig(uri="https://127.0.0.1/adapters", name="web", token="canary-token")
    with pytest.raises(StoreConfigInvalid, match="secrets_env") as caught:
        get_or_create_store((source,), namespace=NAMESPACE, name="refused")
    assert "canary" not in str(caught.value)


@ray.remote(num_cpus=0)
def leased_there(sources: tuple[SourceConfig, ...], config: StoreConfig, name: str) -> tuple[str, bytes, str]:
    """(node, image, its class) as a replica on this node has them."""
    import asyncio

    from deployments.store.client import StoreClient

    def connect() -> Any:
        return get_or_create_store(sources, config, namespace=NAMESPACE, name=name, app="mine", takes_over=False)

    async def main() -> tuple[str, bytes, str]:
        digest = ray.get(connect().register_spec.remote(small_spec(), "far"))
        client = StoreClient([connect], wait_s=20.0, owner="far", spec=small_spec(), digest=digest)
        await client.start()
        _, data = await client.lease("a", None, None)
        return ray.get_runtime_context().get_node_id(), bytes(data), type(data).__name__  # type: ignore[call-overload]

    return asyncio.run(main())


def on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def nodes_program(folder: Path) -> None:
    """Two nodes; run in a process of its own, as it needs a cluster of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        _lose_a_node(cluster, folder)
    finally:
        ray.shutdown()
        cluster.shutdown()
    print("nodes: all is well")


def _lose_a_node(cluster: Any, folder: Path) -> None:
    cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    third = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
    until("three nodes", lambda: sum(node["Alive"] for node in ray.nodes()) == 3)
    sources = folder_of(folder, "a")
    config = StoreConfig(disk_path=str(folder / "disk"), refresh_s=0.0)
    expected = bytes(pack(small_adapter(), small_spec()).data)

    def create(name: str) -> str:
        store = get_or_create_store(sources, config, namespace=NAMESPACE, name=name, app="mine")
        ray.get(store.register.remote((Registration(name="team/x", source="local", location="a"),)))
        ray.get(store.register_spec.remote(small_spec()))
        ray.get(store.pin.remote("a"))
        return str(ray.get(store.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())))

    names = (f"far-{number}" for number in count())
    # It is a wish, and a node that has just come is not known everywhere yet.
    for _ in waiting.patience(f"a store on node {third.node_id}", WAIT_S):
        name = next(names)
        its_node = ray.get(ray.remote(num_cpus=0)(create).options(scheduling_strategy=on(third.node_id)).remote(name))
        if its_node == third.node_id:
            break
        ray.kill(get_or_create_store(sources, config, namespace=NAMESPACE, name=name, app="mine", takes_over=False))
        time.sleep(0.5)
    other = next(node["NodeID"] for node in ray.nodes() if node["NodeID"] != its_node)

    def far() -> Any:
        return leased_there.options(scheduling_strategy=on(other)).remote(sources, config, name)

    node, image, _ = ray.get(far())
    assert (node, image) == (other, expected), "through the object stores of both nodes"

    store = get_or_create_store(sources, config, namespace=NAMESPACE, name=name, app="mine", takes_over=False)

    def fill(actor: Any) -> None:
        """As if the object store were full: what is loaded from now on goes into files."""
        from adapter_store.tiers.blobs import BlobsFull

        async def full(_: Any) -> Any:
            raise BlobsFull("as if")

        actor._store._tiers.host._blobs.put = full
        for key in list(actor._store._tiers.host._held):
            actor._store._tiers.host._lose(key)

    ray.get(store.__ray_call__.remote(fill))
    node, image, kind = ray.get(far())
    assert (node, image, kind) == (other, expected, "ndarray"), "in parts, as no file is on that node"
    assert ray.get(store.status.remote()).degraded == ("host",)

    cluster.remove_node(third, allow_graceful=False)
    # The disk of that node is gone with it: another one has an index of earlier times.
    (folder / "disk").rename(folder / "lost")
    status = until("the store on another node", lambda: ray.get(store.status.remote()))
    assert (status.num_registered, status.num_pinned) == (1, 1), "kept on the head node"
    assert ray.get(store.resolve.remote("team/x")).source == "catalog"
    assert ray.get(far())[1] == expected


@pytest.mark.slow
def test_replicas_on_other_nodes_have_right_images_and_a_lost_node_takes_no_registration(tmp_path):
    program = (
        "from pathlib import Path\nfrom tests.store.test_handover import nodes_program\n"
        f"nodes_program(Path({str(tmp_path)!r}))"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True, timeout=180
    )  # fmt: skip
    assert "nodes: all is well" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
