"""How many adapters that nobody has asked for before a store brings in a second, and what CPU each costs.

Stores as actors, asked by `deployments.store.client`; demo-size adapters of one content under many names. A source is a
folder, or a web server in a process of its own that answers each question after `--latency-ms`. Cases are measured in
turns; each round has new stores and asks for every name once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import workload
from benchmarks.adapters.stores import WAIT_S, running_ray, write_adapters
from deployments.settings.app import AdapterSettings
from deployments.store.actor import connectors
from deployments.store.client import StoreClient
from engine.config import EngineConfig
from engine.engine import Engine
from engine.image_spec import ImageSpec
from tests.support.ray_session import NAMESPACE

_TICKS = os.sysconf("SC_CLK_TCK")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=240)
    parser.add_argument("--at-once", type=int, default=128, help="leases that are waited for at a time")
    parser.add_argument("--latency-ms", type=float, default=100.0)
    parser.add_argument("--shards", default="1,4")
    parser.add_argument("--sources", default="file,http")
    parser.add_argument("--fetches", type=int, help="at a time from a source; default: the store's own")
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> None:
    engine = Engine(EngineConfig(model=args.model, dtype=args.dtype, num_threads=1))
    names = [f"cold-{number:05d}" for number in range(args.adapters)]
    cases = [(source, int(shards)) for source in args.sources.split(",") for shards in args.shards.split(",")]
    with tempfile.TemporaryDirectory() as folder, running_ray(1 << 30), _server(folder, args.latency_ms) as url:
        num_bytes = write_adapters(Path(folder), engine, args.rank, names)
        rounds = [{case: _measure(args, case, folder, url, engine.image_spec, names) for case in cases}
                  for _ in range(args.rounds)]  # fmt: skip
        for source, shards in cases:
            figures = workload.spread([figures[source, shards] for figures in rounds])
            row = {"case": f"{source}, {shards} shards", "source": source, "shards": shards, "image_bytes": num_bytes}
            workload.print_figures({**row, **figures}, args)


def _measure(
    args: argparse.Namespace, case: tuple[str, int], folder: str, url: str, spec: ImageSpec, names: list[str]
) -> workload.Figures:
    source, shards = case
    settings = AdapterSettings.model_validate(
        {
            "sources": [{"kind": "file", "path": folder} if source == "file" else {"kind": "http", "base_url": url}],
            "host_bytes": shards * (128 << 20),
            "max_adapter_bytes": 16 << 20,
            "parallel_fetches": args.fetches,
            "shards": shards,
            "namespace": NAMESPACE,
            "store_name": f"cold-{uuid.uuid4().hex}",
        }
    )
    return asyncio.run(_lease_all(args, settings, spec, names))


async def _lease_all(
    args: argparse.Namespace, settings: AdapterSettings, spec: ImageSpec, names: list[str]
) -> workload.Figures:
    import ray

    connects = connectors(settings)
    client = StoreClient(connects, wait_s=WAIT_S, owner="replica", spec=spec.to_dict(), digest=spec.digest)
    await client.start()
    actors = [connect() for connect in connects]
    pids = [ray.get(actor.__ray_call__.remote(lambda _: os.getpid())) for actor in actors]
    turns = asyncio.Semaphore(args.at_once)

    async def lease(name: str) -> None:
        async with turns:
            leased, _ = await client.lease(name, None, None)
            await client.release(leased)

    before_s, start_s = sum(map(_cpu_s, pids)), time.perf_counter()
    await asyncio.gather(*(lease(name) for name in names))
    seconds, cpu_s = time.perf_counter() - start_s, sum(map(_cpu_s, pids)) - before_s
    for actor in actors:
        ray.kill(actor)
    return {"adapters_per_s": len(names) / seconds, "cpu_ms_per_adapter": 1e3 * cpu_s / len(names)}


def _cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def _server(folder: str, latency_ms: float) -> Iterator[str]:
    """The folder behind a web server that is far away; its address."""
    command = [sys.executable, "-m", "benchmarks.adapters.far_server", folder, str(latency_ms)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.stdin.close()
        process.wait(timeout=60)
