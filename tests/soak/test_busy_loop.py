"""No lease is left behind, however late the event loop comes to read what the engine did."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from adapter_store.records import StoreConfig
from adapter_store.sources.local import LocalSource
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
from tests.support.replica_parts import LocalStore, ReplicaParts

DEMO = Path(__file__).parents[2] / "demo"
NUM_CLIENTS = 6
LIMIT_S = 1200.0


async def _keep_busy(busy_s: float) -> None:
    """The loop of a loaded replica: everything else waits for it again and again."""
    while True:
        if busy_s:
            time.sleep(busy_s)  # that is the point
        await asyncio.sleep(0.001)


async def _run(busy_s: float, num_requests: int) -> tuple[int, int, int]:
    """(adapters in the engine, versions held, leases in the store) at the end."""
    engine = Engine(
        EngineConfig(
            model=str(DEMO / "base"),
            dtype="float32",
            adapter_bytes=1_400_000,  # two of them: nearly each request evicts one
            max_num_seqs=8,
            max_num_batched_tokens=256,
            kv_cache_bytes=8 << 20,
            num_threads=1,
        )
    )
    source = LocalSource(str(DEMO / "adapters"), "local")
    store = AdapterStore([source], MemoryBlobs(), StoreConfig(host_bytes=1 << 26, max_adapter_bytes=1 << 24))
    names = sorted(path.parent.name for path in (DEMO / "adapters").glob("*/adapter_model.safetensors"))
    parts = ReplicaParts(engine, LocalStore(store, await store.register_spec(engine.image_spec.to_dict())))
    busy = asyncio.ensure_future(_keep_busy(busy_s))
    rng, params = random.Random(0), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)

    async def client(number: int) -> None:
        for i in range(number, num_requests, NUM_CLIENTS):
            stream = parts.generate(f"{i}", rng.choice(names), tuple(b"hello\n"), params)
            async with aclosing(stream) as deltas:
                async for _ in deltas:
                    if i % 7 == 0:
                        break  # a caller that goes away

    try:
        await asyncio.gather(*(client(number) for number in range(NUM_CLIENTS)))
        busy.cancel()
        await parts.settled()
        seen = len(engine.stats().resident_adapters), len(parts.held.versions), (await store.status()).num_leases
    finally:
        busy.cancel()
        await parts.close()
        await store.close()
    return seen


@pytest.mark.parametrize(
    ("busy_ms", "num_requests"), [(10, 120), *(pytest.param(ms, 2000, marks=pytest.mark.slow) for ms in (0, 5, 10, 20))]
)
def test_a_busy_event_loop_leaves_no_lease_behind(busy_ms: int, num_requests: int) -> None:
    started_s = time.perf_counter()
    resident, held, leases = asyncio.run(asyncio.wait_for(_run(busy_ms / 1000, num_requests), LIMIT_S))
    print(
        f"loop blocked {busy_ms} ms at a time, {num_requests} requests in {time.perf_counter() - started_s:.0f} s: "
        f"{resident} adapters in the engine, {held} held, {leases} leases, {leases - resident} left behind"
    )
    assert resident == held == leases
