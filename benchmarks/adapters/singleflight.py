"""How often an adapter is read from its source when many ask for it at once, and none has before.

As many replicas as `--requests` lease it at the same moment; then as many requests of one replica ask for another. The
source is a folder; its reads are counted. `times_read` 1.0 is what a single request costs: every byte once.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter
from pathlib import Path

from adapter_store.sources.base import RangeRead, SourceFile, SourceListing
from adapter_store.sources.local import LocalSource
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from benchmarks import workload
from benchmarks.adapters.stores import write_adapters
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams
from tests.support.replica_parts import LocalStore, ReplicaParts

ADAPTERS = ["leased", "asked"]


class CountingSource(LocalSource):
    """A folder that counts how it is used, by adapter."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reads: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.stats: Counter[str] = Counter()

    async def stat(self, name: str) -> SourceListing | None:
        self.stats[name] += 1
        return await super().stat(name)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        self.reads[name] += 1
        self.bytes[name] += part.num_missing
        await super().read(name, file, part)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")


def run(args: argparse.Namespace) -> None:
    engine = Engine(EngineConfig(model=args.model, dtype=args.dtype, num_threads=args.threads))
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), engine, args.rank, ADAPTERS)
        asyncio.run(measure(args, engine, CountingSource(Path(folder))))


async def measure(args: argparse.Namespace, engine: Engine, source: CountingSource) -> None:
    store = AdapterStore([source], MemoryBlobs())
    digest = await store.register_spec(engine.image_spec.to_dict())
    parts = ReplicaParts(engine, LocalStore(store, digest))
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)

    async def ask(i: int) -> None:
        async for _ in parts.generate(f"r{i}", "asked", (10 + i % 200,), params):
            pass

    start_s = time.perf_counter()
    await asyncio.gather(*(store.acquire("leased", digest, f"replica-{i}") for i in range(args.requests)))
    leased_s = time.perf_counter() - start_s
    await asyncio.gather(*(ask(i) for i in range(args.requests)))
    asked_s = time.perf_counter() - start_s - leased_s
    num_stats = Counter(source.stats)
    listings = {name: await source.stat(name) for name in ADAPTERS}
    await parts.close()
    await store.close()
    for name, seconds in zip(ADAPTERS, (leased_s, asked_s), strict=True):
        listing = listings[name]
        assert listing is not None
        figures = {
            "case": {"leased": "leases of as many replicas", "asked": "requests of one replica"}[name],
            "files": len(listing.files),
            "reads": source.reads[name],
            "times_read": round(source.bytes[name] / listing.num_bytes, 3),
            "stats": num_stats[name],
            "seconds": round(seconds, 3),
        }
        workload.print_figures(figures, args)
