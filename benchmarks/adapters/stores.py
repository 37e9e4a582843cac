"""A replica's parts beside a store: in one process, or with the store in an actor's process as in production."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore
from benchmarks.make_model import TARGETS, write_adapter
from engine.engine import Engine
from engine.request import SamplingParams
from tests.support.ray_session import NAMESPACE, start_ray, stop_ray
from tests.support.replica_parts import LocalStore, ReplicaParts

WAIT_S = 60.0


class SharedBlobs:
    """Images as files of a folder in memory (/dev/shm), mapped by who leases them, as Ray's object store has them."""

    def __init__(self, folder: Path, *, keep_maps: bool) -> None:
        self._folder = folder
        self._numbers = count()
        self._maps: dict[Path, NDArray[np.uint8]] | None = {} if keep_maps else None

    async def put(self, data: NDArray[np.uint8]) -> Path:
        path = self._folder / str(next(self._numbers))
        await asyncio.to_thread(data.tofile, path)
        return path

    async def has(self, handle: Path) -> bool:
        return handle.exists()

    async def view(self, handle: Path) -> NDArray[np.uint8]:
        return np.memmap(handle, dtype=np.uint8, mode="r")

    def drop(self, handle: Path) -> None:
        handle.unlink()
        if self._maps is not None:
            self._maps.pop(handle, None)

    def open(self, handle: Path) -> NDArray[np.uint8]:
        """Its bytes; a map that is not kept has all its page faults before it."""
        mapped: NDArray[np.uint8] = np.memmap(handle, dtype=np.uint8, mode="r")
        return mapped if self._maps is None else self._maps.setdefault(handle, mapped)


class Station:
    """Where a store's adapters are asked for."""

    def __init__(self, parts: ReplicaParts, store: Any, digest: str) -> None:
        self.parts = parts
        self._store = store  # an AdapterStore, or the actor's handle
        self._digest = digest
        self._numbers = count()

    async def call(self, method: str, *args: Any) -> Any:
        """A method of the store."""
        function = getattr(self._store, method)
        return await (function.remote(*args) if hasattr(function, "remote") else function(*args))

    async def bring(self, name: str) -> None:
        """`name` is on the host, and leased by nobody."""
        lease = await self.call("acquire", name, self._digest, "bringer")
        await self.call("release", lease.version, "bringer")

    async def first_token_s(self, name: str | None, prompt_tokens: int) -> float:
        """Seconds from asking to the first token, of a prompt that was never asked before."""
        number = next(self._numbers)
        rng = random.Random(f"{id(self)} {number}")
        prompt = tuple(rng.randrange(10, 250) for _ in range(prompt_tokens))
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        start_s, seconds = time.perf_counter(), 0.0
        async with aclosing(self.parts.generate(f"{name} {number}", name, prompt, params)) as deltas:
            async for delta in deltas:
                if delta.token_ids:
                    seconds = time.perf_counter() - start_s
        return seconds


@asynccontextmanager
async def local_station(
    engine: Engine, source: SourceConfig, config: StoreConfig, blobs: SharedBlobs
) -> AsyncIterator[Station]:
    """The store on the loop of the requests."""
    store = AdapterStore([open_source(source)], blobs, config)
    digest = await store.register_spec(engine.image_spec.to_dict())
    parts = ReplicaParts(engine, LocalStore(store, digest, open_image=blobs.open))
    try:
        yield Station(parts, store, digest)
    finally:
        await parts.close()
        await store.close()


@asynccontextmanager
async def ray_station(engine: Engine, source: SourceConfig, config: StoreConfig) -> AsyncIterator[Station]:
    """The store in an actor, asked by `deployments.store.client`. Ray must run."""
    from adapter_store.actor import get_or_create_store
    from deployments.store.client import StoreClient

    name = f"benchmark-{uuid.uuid4().hex}"
    connect = functools.partial(get_or_create_store, (source,), config, namespace=NAMESPACE, name=name)
    spec = engine.image_spec
    client = StoreClient([connect], wait_s=WAIT_S, owner="replica", spec=spec.to_dict(), digest=spec.digest)
    await client.start()
    parts = ReplicaParts(engine, client)
    actor = connect()
    try:
        yield Station(parts, actor, spec.digest)
    finally:
        await parts.close()
        import ray

        ray.kill(actor)


@contextmanager
def running_ray(object_store_bytes: int) -> Iterator[None]:
    """Ray on this machine; its workers find the modules that this program runs from."""
    os.environ["PYTHONPATH"] = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    start_ray(object_store_bytes)
    try:
        yield
    finally:
        stop_ray()


def write_adapters(folder: Path, engine: Engine, rank: int, names: list[str]) -> int:
    """PEFT adapters of one content under many names, for the engine's base. Returns: bytes of an image."""
    spec = engine.image_spec
    shapes = {
        site.name: (site.out_features, site.in_features)
        for site in spec.sites
        if site.name.rpartition(".")[2] in TARGETS
    }
    first = folder / names[0]
    write_adapter(first, Path(engine.config.model), shapes, rank, seed=0)
    for name in names[1:]:
        (folder / name).mkdir()
        for file in first.iterdir():
            os.link(file, folder / name / file.name)
    item_bytes = 4 if spec.dtype == "float32" else 2
    return sum(rank * (out_features + in_features) * item_bytes for out_features, in_features in shapes.values())
